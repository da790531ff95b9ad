"""Looks once at every video of a data set, in processes that can be killed: a decoder may hang or crash on what it is given."""

import csv
import logging
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.progress import track

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.ahead import in_order
from anidiff_jax.data.decode import BadVideo, read_parts, timestamps
from anidiff_jax.data.records import Records
from anidiff_jax.errors import UserError
from anidiff_jax.weights.files import save_json

log = logging.getLogger(__name__)

PATIENCE = 20.0  # seconds without a chunk of frames, after which a video counts as hanging the decoder


@dataclass(frozen=True)
class Finding:
    """What is known of a video. problem: why training must do without it; remark: what its owner may want to know."""

    frames: int = 0
    width: int = 0
    height: int = 0
    problem: str | None = None
    remark: str | None = None


def look_at(path: Path, least_frames: int, alive=lambda: None) -> Finding:
    """Decodes all of a video, some frames at a time; calls `alive` after each part."""
    frames, shape = 0, (0, 0)
    try:
        for part in read_parts(path):
            frames, shape = frames + len(part), part.shape[1:3]
            alive()
        if frames < least_frames:
            raise BadVideo(f"it has {frames} frames, a clip needs {least_frames}")
    except (BadVideo, OSError) as bad:
        return Finding(frames, shape[1], shape[0], problem=str(bad))
    times = timestamps(path)
    remark = None
    if times is not None and len(times) > 2:
        gaps = np.diff(times)
        if gaps.min() <= 0:
            remark = "its timestamps do not rise"
        elif gaps.max() > 1.5 * np.median(gaps):
            remark = "its frame rate varies: frames are taken as evenly spaced"
    return Finding(frames, shape[1], shape[0], remark=remark)


def _serve(connection: Connection, least_frames: int) -> None:
    """The child: a path comes, signs of life and a Finding go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the decoder's own complaints
    connection.send(None)
    while True:
        try:
            path = connection.recv()
        except EOFError:
            return
        connection.send(look_at(path, least_frames, lambda: connection.send(None)))


class _Worker:
    """A child that looks at videos; killed and replaced when it hangs or dies."""

    def __init__(self, least_frames: int, patience: float):
        self.least_frames, self.patience = least_frames, patience
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.least_frames), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()  # it has imported what it needs

    def look_at(self, path: Path) -> Finding:
        try:
            self.connection.send(path)
            while self.connection.poll(self.patience):
                if (finding := self.connection.recv()) is not None:
                    return finding
            problem = f"the decoder hangs: nothing for {self.patience:.0f} s"
        except (EOFError, OSError):
            problem = "the decoder crashes on it"
        self.end()
        self._start()
        return Finding(problem=problem)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def vet(records: Records, least_frames: int, workers: int, patience: float = PATIENCE) -> Iterator[Finding]:
    """A Finding for each row, in order."""
    ours = threading.local()
    all_workers: list[_Worker] = []

    def one(name: str) -> Finding:
        if not hasattr(ours, "worker"):
            ours.worker = _Worker(least_frames, patience)
            all_workers.append(ours.worker)
        return ours.worker.look_at(records.folder / name)

    try:
        yield from in_order(one, records.names, workers)
    finally:
        for worker in all_workers:
            worker.end()


def check_data(records: Records, config: TrainConfig) -> None:
    """Vets every row; writes clean.csv with those that can be used and data_report.json into output_dir, and says what was found."""
    folder = Path(config.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    findings = list(track(vet(records, config.sample_n_frames, config.dataloader_num_workers), "checking", len(records)))
    usable = [i for i, finding in enumerate(findings) if finding.problem is None]
    part = folder / ".clean.csv.part"
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "contentUrl"])
        writer.writerows([records.captions[i], records.names[i]] for i in usable)
    part.replace(folder / "clean.csv")
    named = {records.names[i]: asdict(finding) for i, finding in enumerate(findings)}
    small = sum(findings[i].width < config.width or findings[i].height < config.height for i in usable)
    frames = [findings[i].frames for i in usable]
    summary = {
        "videos": len(records),
        "usable": len(usable),
        "problems": dict(Counter(f.problem for f in findings if f.problem)),
        "remarks": dict(Counter(f.remark for f in findings if f.remark)),
        "smaller than sample_size, enlarged in training": small,
        "frames": {"least": min(frames, default=0), "median": float(np.median(frames or [0])), "most": max(frames, default=0)},
    }
    save_json({**summary, "of each": named}, folder / "data_report.json")
    for name, value in summary.items():
        log.info("%s: %s", name, value)
    if not usable:
        raise UserError(f"no video of {records.folder} can be used: see {folder / 'data_report.json'}")
    print(folder / "clean.csv")
