"""The Hugging Face Hub and ModelScope: ids and paths → local folders or files, and files → a repository."""

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from anidiff_jax.errors import UserError
from anidiff_jax.weights.tensors import PICKLES

HUBS = ("hf", "modelscope")
PARTS = ["unet/*", "vae/*", "text_encoder/*"]
WANTED = ["model_index.json", "config.json", "diffusion_pytorch_model*.safetensors*", "diffusion_pytorch_model*.bin*", "tokenizer/*",
          "scheduler/*", "pytorch_lora_weights.*", "adapter_model.*", "adapter_config.json",
          "default/adapter_model.*", "default/adapter_config.json",
          "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "vocab.json", "merges.txt", "tokenizer*.json"]  # fmt: skip


def resolve(path_or_id: str, revision: str | None = None, hub: str | None = None) -> Path:
    """A local path as it is, or what a hub has, downloaded into its cache: owner/name, or owner/name/FILE for one file of a repository.

    Of a repository no file more than is read is downloaded. hub: None tries Hugging Face, and then ModelScope where its package is
    installed.
    """
    if hub is not None and hub not in HUBS:
        raise UserError(f"hub={hub!r} is not one of {', '.join(HUBS)}")
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    parts = path_or_id.split("/")
    is_file = parts[-1].endswith((".safetensors", *PICKLES))
    of_hub = len(parts) > 2 and ".." not in parts if is_file else len(parts) == 2
    if not of_hub or not all(parts) or path_or_id.startswith((".", "/", "~")):
        raise UserError(f"{path_or_id} does not exist here, and is not a hub id such as owner/name or owner/name/file.safetensors")
    repo, inside = "/".join(parts[:2]), "/".join(parts[2:])
    reasons = []
    for name in [hub] if hub else ["hf", *(["modelscope"] if find_spec("modelscope_hub") else [])]:
        token = token_of(name)
        try:
            return (_from_modelscope if name == "modelscope" else _from_huggingface)(repo, revision, inside)
        except Exception as error:  # many kinds: offline, unknown id, gated, no such revision
            reasons.append(f"{name}: {in_a_line(error, token)}")
    raise UserError(f"{path_or_id} is not a local folder, and no hub gave it ({'; '.join(reasons)})")


def _from_huggingface(repo: str, revision: str | None, inside: str) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    api = HfApi()
    if inside:
        return [Path(api.hf_hub_download(repo, name, revision=revision)) for name in _with_scale(inside)][-1]
    try:
        there = api.list_repo_files(repo, revision=revision)
    except Exception as error:  # of many kinds: offline, the hub is down, or refuses
        try:
            return _downloaded_before(repo, revision)
        except LocalEntryNotFoundError:
            raise error from None
    return Path(api.snapshot_download(repo, revision=revision, allow_patterns=_wanted_of(repo, there)))


def _downloaded_before(repo: str, revision: str | None) -> Path:
    """The folder of an earlier download from Hugging Face; LocalEntryNotFoundError where there is none, or is known to be in part."""
    import huggingface_hub

    files = None
    with suppress(Exception):  # a version that keeps no list, or a download by one; by a list, what was never wanted would be missed
        files = wanted(file.path for file in huggingface_hub.get_cached_repo_tree(repo, revision=revision))
    return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=files, local_files_only=True))


def _from_modelscope(repo: str, revision: str | None, inside: str) -> Path:
    modelscope = _modelscope()
    api, revision = modelscope.HubApi(modelscope.HubConfig()), revision or "master"
    try:
        files = api.list_repo_files(repo, "model", revision=revision)
    except (OSError, modelscope.ServerError):  # offline: what an earlier run downloaded
        return api.download_repo(repo, "model", revision=revision, local_files_only=True) / inside
    there = [file.path for file in files if file.type != "tree"]
    if inside and inside not in there:
        raise UserError(f"{repo} has no file {inside}")
    chosen = _with_scale(inside) if inside else _wanted_of(repo, there)
    listed = [{"Path": file.path, "Size": file.size or None, "Sha256": file.sha256} for file in files if file.path in chosen]
    try:
        return api.download_repo(repo, "model", revision=revision, file_list=listed) / inside
    except modelscope.FileDownloadError as error:  # counts the files; each has its own reason
        raise next(iter(error.failed_files.values())) from None


def _with_scale(file: str) -> list[str]:
    """The file, and before it, of a LoRA as PEFT saves it, the one beside it that says its scale."""
    path = PurePosixPath(file)
    return [*([str(path.with_name("adapter_config.json"))] if path.stem == "adapter_model" else []), file]


def _wanted_of(repo: str, files: list[str]) -> list[str]:
    """`wanted`; a UserError where no weights are among these, but single files that can be asked for by name."""
    chosen, weights = wanted(files), [name for name in files if name.endswith((".safetensors", *PICKLES))]
    if weights and not set(weights) & set(chosen):
        some = ", ".join(f"{repo}/{name}" for name in weights[:3]) + (f" and {len(weights) - 3} more" if len(weights) > 3 else "")
        raise UserError(f"{repo} holds no model in diffusers layout, but single files: give one of {some}")
    return chosen


def wanted(files: Iterable[str]) -> list[str]:
    """Those of a repository's files that loading reads: no pickles beside safetensors, no single-file copies, no half precision beside
    full."""
    files = [name for name in files if not name.endswith((".msgpack", ".onnx", ".pb", ".md")) and ".non_ema." not in name]
    safe = {PurePosixPath(name).parent for name in files if name.endswith(".safetensors")}
    files = [name for name in files if not name.endswith((".bin", ".bin.index.json")) or PurePosixPath(name).parent not in safe]
    named = [name for name in files if any(fnmatch(name, p) for p in WANTED)]
    weights = [name for name in files if any(fnmatch(name, p) for p in PARTS) and name.endswith((".safetensors", ".bin", ".json"))]
    chosen = sorted({*named, *weights})
    folder = lambda name: PurePosixPath(name).parent
    full = {folder(name) for name in chosen if name.endswith((".safetensors", ".bin")) and ".fp16" not in name}
    return [name for name in chosen if ".fp16" not in name or folder(name) not in full]


def public_name(place: str | None) -> str | None:
    """What may be told of where weights came from: a hub id, or the last name of a path on this machine."""
    return None if place is None else Path(place).name if Path(place).expanduser().exists() else place


def hub_tokenizer(repo: str) -> Path:
    """The tokenizer's files of a model on the Hugging Face Hub, which a single file of weights does not hold."""
    from huggingface_hub import HfApi

    try:
        return Path(HfApi().snapshot_download(repo, allow_patterns=["vocab.json", "merges.txt", "tokenizer*.json"]))
    except Exception as error:  # of many kinds: offline, a mirror without it
        reason = in_a_line(error, token_of("hf"))
        raise UserError(f"a single file holds no tokenizer; {repo} was not to be had ({reason}): give --text_encoder_path SD15") from None


def upload(hub: str | None, repo: str, files: Mapping[str, Path | bytes], message: str, private: bool, token: str | None) -> str:
    """Files, by their names there, → a repository, which is made where there is none; returns its full name. Raises as the hub does."""
    return (_to_modelscope if hub == "modelscope" else _to_huggingface)(repo, files, message, private, token)


def _to_huggingface(repo: str, files: Mapping[str, Path | bytes], message: str, private: bool, token: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    added = [CommitOperationAdd(name, str(x) if isinstance(x, Path) else x) for name, x in files.items()]
    api.create_commit(repo, added, commit_message=message)
    return repo


def _to_modelscope(repo: str, files: Mapping[str, Path | bytes], message: str, private: bool, token: str | None) -> str:
    """A commit a file: its package commits several together only from a folder that holds just them."""
    modelscope = _modelscope()
    api = modelscope.HubApi(modelscope.HubConfig(token=token))
    if not api.repo_exists(repo, "model"):  # else upload_file would make it, and public
        # Unsaid, the license would become Apache-2.0, which is not ours to say.
        api.create_repo(repo, "model", visibility="private" if private else "public", license="Other")
    for name, content in files.items():
        api.upload_file(repo, "model", content, name, commit_message=message, disable_tqdm=True)
    return repo


def token_of(hub: str | None, given: str | None = None) -> str | None:
    """The access token: the given one, else the environment's, else that of an earlier login."""
    if hub == "modelscope":
        return given or _modelscope().HubConfig().token
    from huggingface_hub import get_token

    return given or get_token()


def in_a_line(error: Exception, token: str | None) -> str:
    """What went wrong, without the token, which a server may have repeated."""
    text = str(error).replace(token, "…") if token else str(error)
    lines = list(filter(None, map(str.strip, text.splitlines()))) or [type(error).__name__]
    code = re.match(r"\d{3} .* Error", lines[0])  # and a request's number; what it is about stands below
    return " ".join(lines[1:])[:300] if code and len(lines) > 1 else lines[0]


def _modelscope():
    try:
        import modelscope_hub
    except ImportError:
        raise UserError("hub modelscope needs the package modelscope-hub: pip install modelscope-hub") from None
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # it repeats what servers answer; errors reach us anyway
    return modelscope_hub
