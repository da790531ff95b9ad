"""What goes to the terminal, all of it on stderr: messages and bars. stdout is for results."""

import logging
import threading
from collections.abc import Iterable
from typing import TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")

console = Console(stderr=True)


def start_log() -> None:
    """Our messages to the terminal, above the bar: those of the main process, and of any which videos it leaves out; after `set_up_jax`."""
    from anidiff_jax.parallel import is_main

    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        from rich.highlighter import NullHighlighter
        from rich.logging import RichHandler

        handler = RichHandler(console=console, show_path=False, show_time=False, markup=False, highlighter=NullHighlighter())
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("anidiff_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_main() else logging.ERROR)
    logger.propagate = False
    logging.getLogger("anidiff_jax.data.loader").setLevel(logging.NOTSET if is_main() else logging.WARNING)


def track(items: Iterable[T], what: str, total: int | None = None, shown: bool = True) -> Iterable[T]:
    """The items, and a bar that says how far they are; `total` where their number is not known from themselves.

    None in other threads than the main one, which may show a bar of its own.
    """
    shown = shown and threading.current_thread() is threading.main_thread()
    return rich.progress.track(items, what, total, console=console, disable=not shown)
