"""Model ids and paths → local folders or files."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from anidiff_jax.errors import UserError

PARTS = ["unet/*", "vae/*", "text_encoder/*"]
WANTED = ["model_index.json", "config.json", "diffusion_pytorch_model*.safetensors*", "tokenizer/*", "scheduler/*"]


def resolve(path_or_id: str, revision: str | None = None) -> Path:
    """A local path as it is, or a Hugging Face Hub id downloaded into the hub's cache, no file more than is read."""
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    parts = path_or_id.split("/")
    if len(parts) != 2 or not all(parts) or path_or_id.startswith((".", "/", "~")):
        raise UserError(f"{path_or_id} does not exist here, and is not a hub id such as owner/name")
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        try:
            files = wanted(list_repo_files(path_or_id, revision=revision))
        except OSError:  # offline: what an earlier run downloaded
            return Path(snapshot_download(path_or_id, revision=revision, local_files_only=True))
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=files))
    except Exception as error:  # many kinds: offline, unknown id, gated, no such revision
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path_or_id} is not a local folder, and the hub did not give it: {reason}") from None


def wanted(files: Iterable[str]) -> list[str]:
    """Those of a repository's files that loading reads: no pickles, no single-file copies, no half precision beside full."""
    files = [name for name in files if not name.endswith((".bin", ".msgpack", ".onnx", ".pb", ".md")) and ".non_ema." not in name]
    named = [name for name in files if any(fnmatch(name, p) for p in WANTED)]
    weights = [name for name in files if any(fnmatch(name, p) for p in PARTS) and name.endswith((".safetensors", ".json"))]
    chosen = sorted({*named, *weights})
    folder = lambda name: PurePosixPath(name).parent
    full = {folder(name) for name in chosen if name.endswith(".safetensors") and ".fp16" not in name}
    return [name for name in chosen if ".fp16" not in name or folder(name) not in full]


def hub_tokenizer(repo: str) -> Path:
    """The tokenizer's files of a model on the Hugging Face Hub, which a single file of weights does not hold."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]))
    except Exception as error:  # of many kinds: offline, a mirror without it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"a single file holds no tokenizer, and {repo} could not be had ({reason}): give --text_encoder_path SD15") from None
