"""Progress bars, on stderr: stdout is for results."""

import threading
from collections.abc import Iterable
from typing import TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None, shown: bool = True) -> Iterable[T]:
    """The items, and a bar that says how far they are; `total` where their number is not known from themselves.

    None in other threads than the main one, which may show a bar of its own.
    """
    shown = shown and threading.current_thread() is threading.main_thread()
    return rich.progress.track(items, what, total, console=Console(stderr=True), disable=not shown)
