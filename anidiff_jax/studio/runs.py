"""Runs of training as the page shows them: their curves, samples, data and cost, read from what a run leaves while it trains."""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anidiff_jax.training.runs import DATA, LOG, best_of, data_of, read_log, steps_in
from anidiff_jax.training.summary import SMOOTH

QUIET = 600  # seconds after the last update from which on a run without report counts as stopped


@dataclass(frozen=True)
class Run:
    """A run's folder, read once."""

    folder: Path
    log: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        return cls(folder, read_log(folder))

    @property
    def updates(self) -> list[dict[str, Any]]:
        return [entry for entry in self.log if "loss" in entry]

    @property
    def data(self) -> dict[str, Any]:
        return _json(self.folder / DATA)

    def status(self) -> str:
        """In a line: how far it is, how fast, how it is doing."""
        if not self.updates:
            return "No update yet: it reads its data, or compiles."
        last, whole = self.updates[-1], self.data.get("updates")
        words = [f"**Update {last['step']}{f' of {whole}' if whole else ''}**, {self.state()}", f"loss {self._mean_loss():.4f}"]
        words.append(f"{last['clips_per_second']:.2f} clips a second")
        if whole and self.state() == "training":
            seconds = statistics.median(entry["seconds"] for entry in self.updates[-SMOOTH:])
            words.append(f"{duration((whole - last['step']) * seconds)} left")
        if best := best_of(self.folder, self.log):
            words.append(f"lowest validation loss {best['validation_loss']:.4f} at update {best['step']}")
        return " · ".join(words)

    def state(self) -> str:
        changed = (self.folder / LOG).stat().st_mtime
        if self.ended:
            whole = self.data.get("updates")
            return "finished" if not whole or not self.updates or self.updates[-1]["step"] >= whole else "stopped"
        return "training" if time.time() - changed < QUIET else f"silent for {(time.time() - changed) / 60:.0f} min: stopped, it seems"

    @property
    def ended(self) -> bool:
        """Whether the report was written, and nothing after it, as a run does that is gone on with."""
        report = self.folder / "report.md"
        return report.exists() and report.stat().st_mtime >= (self.folder / LOG).stat().st_mtime

    def _mean_loss(self) -> float:
        return statistics.fmean(entry["loss"] for entry in self.updates[-SMOOTH:])

    def losses(self) -> list[tuple[int, float, str]]:
        """(update, loss, which): of each update, and the mean of the last SMOOTH; of a long run every so many."""
        values = [entry["loss"] for entry in self.updates]
        every = max(1, len(values) // 500)
        rows = []
        for i in range(0, len(values), every):
            step = self.updates[i]["step"]
            rows += [(step, values[i], "each"), (step, statistics.fmean(values[max(0, i - SMOOTH + 1) : i + 1]), f"mean of {SMOOTH}")]
        return rows

    def validation(self) -> list[tuple[int, float, str]]:
        """(update, loss, bucket of timesteps, or "mean")."""
        name = lambda key: "mean" if key == "validation_loss" else key.removeprefix("validation_loss_")
        return self._examined(lambda key: key.startswith("validation_loss"), name)

    def scores(self) -> list[tuple[int, float, str]]:
        """(update, value, which score of the samples)."""
        return self._examined(lambda key: not key.startswith("validation_loss"), lambda key: key.replace("_", " "))

    def _examined(self, chosen, name) -> list[tuple[int, float, str]]:
        seen = [entry for entry in self.log if "loss" not in entry]
        return [(entry["step"], value, name(key)) for entry in seen for key, value in entry.items() if key != "step" and chosen(key)]

    def sampled(self) -> list[int]:
        """The updates of which there are samples."""
        return steps_in(self.folder / "samples")

    def samples(self, step: int) -> list[tuple[str, str]]:
        """(file, prompt) of each sample of an update."""
        folder = self.folder / "samples" / f"iter-{step}"
        return [(str(path), path.stem.replace("-", " ")) for path in sorted(folder.glob("*.gif"))]

    def settings(self) -> list[tuple[str, str, str]]:
        """(argument, value, whether it was given)."""
        said = _json(self.folder / "config.json")
        given = set(said.pop("given", []))
        rows = [(name, str(value), "given" if name in given else "") for name, value in said.items()]
        return sorted(rows, key=lambda row: row[2] == "")

    def data_report(self) -> str:
        """What it trains on, and which videos could not be used and why."""
        return "\n".join(data_of(self.folder)) or "Not written yet."

    def seen_clips(self) -> list[tuple[str, str]]:
        """(file, caption) of the first clips, as the network gets them."""
        return [(str(path), path.stem.partition("-")[2].replace("-", " ")) for path in sorted((self.folder / "sanity_check").glob("*.gif"))]

    def cost(self) -> list[tuple[str, str]]:
        """(what, how much): of a finished run what its report says, else what is known by now."""
        report = self.folder / "report.md"
        if self.ended:
            part = report.read_text(encoding="utf-8").partition("## Cost")[2].partition("\n## ")[0]
            cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")]
            return [(cell[0], cell[1]) for cell in cells if len(cell) == 2 and cell[0]]
        if not self.updates:
            return []
        seconds = [entry["seconds"] for entry in self.updates]
        usual = statistics.median(seconds[1:] or seconds)
        return [
            ("first update, compiling included", f"{seconds[0]:.1f} s"),
            ("an update", f"{usual:.3f} s (median)"),
            ("all updates", f"{sum(seconds):.0f} s"),
        ]


def duration(seconds: float) -> str:
    return f"{max(0.0, seconds):.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def runs_in(folder: Path) -> list[str]:
    """The runs of a folder, the newest first."""
    logs = [path for pattern in ("ad-*/metrics.jsonl", "*/ad-*/metrics.jsonl") for path in folder.glob(pattern)]
    return [str(path.parent) for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True)]


def changed(folder: Path) -> float:
    """Another number when there is something new in a run, or it is silent for one more minute; nothing is read for it."""
    paths = [folder / LOG, folder / "report.md", folder / DATA, folder / "samples"]
    silent = time.time() - (folder / LOG).stat().st_mtime
    return sum(path.stat().st_mtime for path in paths if path.exists()) + (silent // 60 if silent > QUIET else 0)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet
        return {}
