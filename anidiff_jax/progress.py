"""What sampling shows while it works, and what it cost."""

import resource
import statistics
import time
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

COMPILING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")  # JAX's names for what it measures


class Steps:
    """A bar over the steps of videos, on a terminal; `step` is what the pipeline calls. `cost()` says in words what they took."""

    def __init__(self, what: str, console: Console):
        self.begun, self.compiled = time.perf_counter(), compile_seconds()
        self.ends: list[float] = []  # of the steps
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task(what, total=None)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.took, self.compiling = time.perf_counter() - self.begun, compile_seconds() - self.compiled
        self.bar.stop()

    def step(self, done: int, of: int) -> None:
        self.ends.append(time.perf_counter())
        self.bar.update(self.task, completed=done, total=of)

    def cost(self) -> str:
        """Once it is over. A step's time is the median, since the first may wait for a compiler."""
        between = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        usual = f"{len(self.ends)} steps of {statistics.median(between):.3f} s" if between else "one step"
        memory, whose = peak_memory()
        first = self.ends[0] - self.begun if self.ends else 0.0
        return (
            f"{self.took:.1f} s in all: {self.compiling:.1f} s compiling, first step done after {first:.1f} s, {usual}, "
            f"{self.took - (self.ends[-1] - self.begun if self.ends else 0):.1f} s decoding and the rest after the last; "
            f"peak memory of {whose} {memory:.2f} GB"
        )


_seconds: list[float] = []


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event.rsplit("/", 1)[-1] in COMPILING:
        _seconds.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Spent by this process on compiling, or on fetching what was compiled before, since this module was imported."""
    return sum(_seconds)


def peak_memory() -> tuple[float, str]:
    """(GB, of what): of the device where it says, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9, "a device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "the process"
