"""The folder of a run: how it begins, what its checkpoints are called, and where it is gone on with."""

import contextlib
import json
import logging
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.records import Records
from anidiff_jax.errors import UserError
from anidiff_jax.weights import files

log = logging.getLogger(__name__)

LOG, DATA = "metrics.jsonl", "data.json"


def run_folder(config: TrainConfig, checkpoint: Path | None) -> Path:
    """The folder to write to, with config.json in it.

    A new run's is <output_dir>/ad-<time>/, never one that exists. The last checkpoint of a run is gone on from in its own folder,
    whose log is cut back to it; an earlier one in a new folder that begins with the log up to it, so that nothing is lost; one that
    was copied out of its run in a new folder too.
    """
    if checkpoint is None:
        run = _new_folder(config)
    else:
        old, step = run_of(checkpoint), int(checkpoint.name[5:])
        run = old if old and steps_in(checkpoint.parent)[-1] == step else _new_folder(config)
        write_log(run, [entry for entry in read_log(old) if entry["step"] <= step] if old else [])
    files.save_json(config.to_json(), run / "config.json")
    return run


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run in which a checkpoint lies; None where it lies elsewhere."""
    run = checkpoint.parent.parent
    return run if checkpoint.parent.name == "checkpoints" and (run / "config.json").is_file() else None


def tell_changes(checkpoint: Path, clips: Records, clips_per_update: int, parted: bool) -> None:
    """Says it where a run is gone on with on other clips or so many an update: then it is not the run that was interrupted.

    parted: whether the clips that validate are a share of the same ones.
    """
    run = run_of(checkpoint)
    then = files.read_json(run / DATA) if run and (run / DATA).is_file() else {}
    now = {"clips": len(clips), "clips_per_update": clips_per_update, "clips_hash": clips.hash}
    others = [name for name, value in now.items() if then.get(name, value) != value]
    said = [f"{now[name]} {name.replace('_per_', ' an ')}, not {then[name]}" for name in others if name != "clips_hash"]
    if others:
        log.warning(
            "%s: from here on clips come in another order than they would have, and epochs and the learning rate's course may be others",
            ", ".join(said) or "other clips or captions",
        )
    if parted and {"clips", "clips_hash"} & set(others):
        log.warning("and clips that were trained on may be among those held out for validation: its losses may look better than they are")


def _new_folder(config: TrainConfig) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        run = Path(config.output_dir).expanduser() / f"ad-{stamp}{suffix}"
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"output_dir {config.output_dir} cannot be written: {error.strerror}") from None
        return run
    raise UserError(f"output_dir {config.output_dir} holds a hundred runs of this second")


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's log; a killed run may have left the last one half written."""
    path = run / LOG
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def data_of(run: Path) -> list[str]:
    """What a run's data.json says, in lines of Markdown; none where there is none."""
    if not (run / DATA).exists():
        return []
    data = files.read_json(run / DATA)
    counts = f"{data['clips']} clips, {data['held_out']} held out for validation; {data['clips_per_update']} an update."
    named = [f"- `{name}`: {why}" for name, why in list(data["skipped"].items())[:50]]
    return [counts, "", f"{len(data['skipped'])} videos could not be used{':' if named else '.'}", "", *named]


def write_log(run: Path, entries: list[dict[str, Any]]) -> None:
    aside = run / f".{LOG}.part"
    aside.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    aside.replace(run / LOG)


def steps_in(folder: Path) -> list[int]:
    """The updates of which `folder` holds whole checkpoints, in order."""
    return sorted(int(path.name[5:]) for path in folder.glob("iter-*") if path.name[5:].isdecimal() and path.is_dir())


def best_of(run: Path, log: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """The log's entry of the checkpoint with the lowest validation loss; None where none was validated."""
    saved = set(steps_in(run / "checkpoints"))
    seen = [
        entry
        for entry in (read_log(run) if log is None else log)
        if entry["step"] in saved and math.isfinite(entry.get("validation_loss", math.nan))
    ]
    return min(seen, key=lambda entry: entry["validation_loss"], default=None)


def find_checkpoint(where: str, output_dir: str) -> Path:
    """The checkpoint to go on from: iter-N itself, the last one of a run's folder, or "latest", of the newest run of output_dir."""
    if where == "latest":
        runs = sorted(Path(output_dir).expanduser().glob("ad-*"), key=lambda run: run.stat().st_mtime, reverse=True)
        candidates = [run for run in runs if steps_in(run / "checkpoints")]
        if not candidates:
            raise UserError(f"resume_from_checkpoint latest: no run in {output_dir} has a checkpoint; leave the argument out to begin one")
        where = str(candidates[0])
    path = Path(where).expanduser().resolve()  # of `best -> iter-100` and of `.` the name says which update it is
    if (path / "state").is_dir():
        if not re.fullmatch(r"iter-\d+", path.name):
            raise UserError(f"resume_from_checkpoint {path}: a checkpoint is called iter-N, after its update: give it that name back")
        return path
    for folder in (path, path / "checkpoints"):
        if steps := steps_in(folder):
            return folder / f"iter-{steps[-1]}"
    raise UserError(f"resume_from_checkpoint {where} holds no checkpoint: give a run's folder (output/ad-…), or a checkpoint iter-N in it")
