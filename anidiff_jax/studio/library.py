"""Weights that may be chosen on the page: those below the chosen folders, and ids of a hub. Nothing else is read."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from anidiff_jax.errors import UserError
from anidiff_jax.weights import kinds
from anidiff_jax.weights.kinds import recognise
from anidiff_jax.weights.tensors import PICKLES

EMBEDDED, NONE = "embedded", "none"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
DEEPEST = 6  # folders below a chosen one
FOLDER_SIGNS = ("model_index.json", "config.json", "adapter_config.json", "pytorch_lora_weights.safetensors", "unet")


class Library:
    """Folders of weights, and what is in them; a file is looked into once, and again when it changed."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = [folder.expanduser().resolve() for folder in folders]
        self._seen: dict[tuple[str, int], str | None] = {}  # path and time of change → kind

    def found(self) -> dict[str, list[str]]:
        """Kind of weights → paths, in order of their names."""
        result: dict[str, list[str]] = {kinds.BASE: [], kinds.MOTION: [], kinds.LORA: []}
        for folder in self.folders:
            for path in self._candidates(folder):
                kind = self._kind_of(path)
                if kind in result:
                    result[kind].append(str(path))
        return {kind: sorted(dict.fromkeys(paths)) for kind, paths in result.items()}

    def permitted(self, given: str | None, what: str) -> str | None:
        """A path below the chosen folders, or a hub's id as it is given; None for none. UserError for anything else."""
        if given is None or given.strip() in ("", NONE, EMBEDDED):
            return None
        given = given.strip()
        try:
            path = Path(given).expanduser()
            below, exists = any(path.resolve().is_relative_to(folder) for folder in self.folders), path.exists()
        except (OSError, RuntimeError, ValueError):  # too long, nobody's home, no path
            raise UserError(f"{what} {given[:200]!r} is no path") from None
        if below:
            if not exists:
                raise UserError(f"{what} {given} is not there any more: choose another")
            return str(path)
        if not HUB_ID.fullmatch(given) or ".." in given or exists:
            raise UserError(f"{what} {given} is not below the folders of the studio: start it with --models FOLDER, or give a hub id")
        return given

    def _candidates(self, folder: Path):
        for here, folders, files in os.walk(folder):
            at = Path(here)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "samples", "sanity_check", "state")))
            if len(at.relative_to(folder).parts) >= DEEPEST:
                folders.clear()
            weights = [name for name in files if name.endswith((".safetensors", *PICKLES))]
            if any((at / sign).exists() for sign in FOLDER_SIGNS) and at != folder and not _is_run(at):
                folders[:] = [name for name in folders if name == "motion_adapter"]
                yield at
            else:
                yield from (at / name for name in weights)

    def _kind_of(self, path: Path) -> str | None:
        """None for what is no weights, is damaged or not supported."""
        try:
            key = str(path), path.stat().st_mtime_ns
        except OSError:  # gone since it was listed
            return None
        if key not in self._seen:
            try:
                found = recognise(path)
            except (UserError, OSError):  # not remembered: it may be half copied
                return None
            self._seen[key] = found.kind if found.supported else None
        return self._seen[key]


def _is_run(folder: Path) -> bool:
    """A run of training has a config.json too."""
    return (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists()
