"""Model ids and paths → local folders or files."""

from pathlib import Path

from anidiff_jax.errors import UserError

WANTED = ["*.json", "*.txt", "*.safetensors"]


def resolve(path_or_id: str, revision: str | None = None) -> Path:
    """A local path as it is, or a Hugging Face Hub id downloaded into the hub's cache."""
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    parts = path_or_id.split("/")
    if len(parts) != 2 or not all(parts) or path_or_id.startswith((".", "/", "~")):
        raise UserError(f"{path_or_id} does not exist here, and is not a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=WANTED))
    except Exception as error:  # many kinds: offline, unknown id, gated, no such revision
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path_or_id} is not a local folder, and the hub did not give it: {reason}") from None
