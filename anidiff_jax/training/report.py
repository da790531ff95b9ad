"""What a run shows and logs: the bar, `metrics.jsonl`."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.loader import Clips
from anidiff_jax.errors import UserError
from anidiff_jax.parallel import is_main
from anidiff_jax.terminal import console
from anidiff_jax.training.runs import DATA, LOG, read_log
from anidiff_jax.weights.files import save_json

log = logging.getLogger(__name__)
MOST_LOST = 10  # updates in a row whose gradient is not finite, after which a run ends


class Report:
    """The bar over updates and the log file; on a terminal that cannot show a bar, a line now and then. Silent but in the main process."""

    def __init__(self, run: Path, config: TrainConfig, updates: int, clips_per_update: int, first: int = 0):
        self.file = (run / LOG if is_main() else Path(os.devnull)).open("a", encoding="utf-8")
        self.clips_per_update, self.updates = clips_per_update, updates
        self.clock = time.perf_counter()
        self.lost = 0  # updates until now whose gradient was not finite, in a row
        self.scored = {line["step"] for line in read_log(run) if "loss" not in line}  # updates that were examined
        self.entries: list[dict[str, Any]] = []  # of this process's updates
        self.wandb = start_wandb(run, config) if config.use_wandb and is_main() else None
        self.tensorboard = start_tensorboard(run) if config.use_tensorboard and is_main() else None
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            console=console, disable=not (console.is_terminal and is_main()),
        )  # fmt: skip
        self.task = self.bar.add_task("", total=updates, completed=first, figures="compiling")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def update(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Records one finished update, and names it where its gradient is not finite: `step.unless_lost` left it out.

        Raises UserError after MOST_LOST of these in a row.
        """
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        speed = self.clips_per_update / seconds
        entry = {"step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "seconds": round(seconds, 4)}
        self.entries.append({**entry, "clips_per_second": round(speed, 3)})
        self.write(self.entries[-1])
        self.lost = 0 if math.isfinite(grad_norm) else self.lost + 1
        if self.lost:
            log.warning("update %d is left out: its gradient is not finite (loss %s)", step, loss)
        if self.lost == MOST_LOST:
            raise UserError(
                f"the gradients of updates {step - MOST_LOST + 1} to {step} are not finite, and nothing trains: go on from the last "
                "checkpoint with a lower --learning_rate, or with --mixed_precision false"
            )
        figures = f"loss {loss:.4f}  lr {learning_rate:.2e}  {speed:.2f} clips/s"
        self.bar.update(self.task, completed=step, figures=figures)
        if self.bar.disable and is_main() and (step == self.updates or step % max(1, self.updates // 20) == 0):
            console.print(
                f"update {step}/{self.updates}  {figures}  {(self.updates - step) * seconds:.0f} s left", highlight=False, soft_wrap=True
            )

    def write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(entry, step=entry["step"])
        if self.tensorboard is not None:
            for name, value in entry.items():
                self.tensorboard.add_scalar(name, value, entry["step"])

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Reports validation losses and scores of videos, if any; leaves out of the clock what came since the last update."""
        if scores:
            self.scored.add(step)
            self.write({"step": step, **{name: round(value, 5) for name, value in scores.items()}})
            log.info("update %d: %s", step, ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items()))
        self.clock = time.perf_counter()


def save_data_report(run: Path, clips: Clips, held_out: int, updates: int, clips_per_update: int) -> None:
    """data.json: how much a run trains on and how long, and which videos could not be used until now, and why."""
    skipped = {clips.records.names[row]: why for row, why in sorted(clips.skipped.items())}
    counts = {"clips": len(clips.records), "held_out": held_out, "updates": updates, "clips_per_update": clips_per_update}
    # By the hash a run that goes on knows its clips again.
    save_json({**counts, "clips_hash": clips.records.hash, "skipped": skipped}, run / DATA)


def start_wandb(run: Path, config: TrainConfig):
    import wandb

    return wandb.init(project="anidiff-jax", name=run.name, dir=str(run), config=config.to_json())


def start_tensorboard(run: Path):
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))
