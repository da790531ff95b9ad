"""What a run shows and leaves behind: its folder, the bar, `metrics.jsonl`."""

import json
import logging
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anidiff_jax.config import TrainConfig
from anidiff_jax.errors import UserError
from anidiff_jax.weights.files import save_json

console = Console(stderr=True)
log = logging.getLogger(__name__)


def start_log() -> None:
    """Our messages to the terminal, above the bar."""
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False, markup=False, highlighter=NullHighlighter())
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("anidiff_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def new_run_folder(config: TrainConfig) -> Path:
    """<output_dir>/ad-<time>/ with config.json in it; never one that exists."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        run = Path(config.output_dir).expanduser() / f"ad-{stamp}{suffix}"
        try:
            run.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"output_dir {config.output_dir} cannot be written: {error.strerror}") from None
    save_json(config.to_json(), run / "config.json")
    return run


class Report:
    """The bar over updates and the log file; on a terminal that cannot show a bar, a line now and then."""

    def __init__(self, run: Path, config: TrainConfig, updates: int, clips_per_update: int):
        self.file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self.clips_per_update, self.updates = clips_per_update, updates
        self.clock = time.perf_counter()
        self.wandb = start_wandb(run, config) if config.use_wandb else None
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=updates, figures="compiling")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def update(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Records one finished update."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        speed = self.clips_per_update / seconds
        entry = {"step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "seconds": round(seconds, 4)}
        self.write({**entry, "clips_per_second": round(speed, 3)})
        figures = f"loss {loss:.4f}  lr {learning_rate:.2e}  {speed:.2f} clips/s"
        self.bar.update(self.task, completed=step, figures=figures)
        if self.bar.disable and (step == self.updates or step % max(1, self.updates // 20) == 0):
            console.print(
                f"update {step}/{self.updates}  {figures}  {(self.updates - step) * seconds:.0f} s left", highlight=False, soft_wrap=True
            )

    def write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(entry, step=entry["step"])

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Reports the scores of validation videos, if any, and leaves out of the clock what came since the last update."""
        if scores:
            self.write({"step": step, **{name: round(value, 4) for name, value in scores.items()}})
            log.info("samples at update %d: %s", step, ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items()))
        self.clock = time.perf_counter()


def start_wandb(run: Path, config: TrainConfig):
    import wandb

    return wandb.init(project="anidiff-jax", name=run.name, dir=str(run), config=config.to_json())
