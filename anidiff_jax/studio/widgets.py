"""What the tabs of the page have in common."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from anidiff_jax.errors import UserError
from anidiff_jax.studio import gallery
from anidiff_jax.studio.library import NONE, Library
from anidiff_jax.studio.maker import Maker, Stopped
from anidiff_jax.studio.runs import runs_in
from anidiff_jax.studio.settings import Settings

Fields = dict[str, Any]  # name of an argument → component
PICTURES: Any = {
    "columns": 6,
    "height": 200,
    "object_fit": "contain",
    "interactive": False,
    "fit_columns": False,
    "elem_classes": "gallery",
}
HIDDEN: Any = {"api_visibility": "private", "show_progress": "hidden"}


def told(work: Callable[[], Any]) -> Any:
    """What `work` gives; a mistake of the user's is shown on the page in its own words, and so is a job that was cancelled."""
    try:
        return work()
    except UserError as error:
        raise gr.Error(str(error), duration=None) from None
    except Stopped:
        raise gr.Error("Cancelled; nothing was written.", duration=5) from None


def shown_errors(work: Callable) -> Callable:
    """The same function; mistakes of the user's are shown on the page."""

    @wraps(work)
    def function(*args):
        return told(lambda: work(*args))

    return function


def shown_of(record: Path) -> tuple[str, list[str], dict[str, Any]]:
    """(video, files, settings) of what was made."""
    entry = gallery.entry_of(record)
    assert entry is not None
    return str(entry.shown), [str(path) for path in entry.files], entry.record


def session_of(request: gr.Request) -> str:
    return request.session_hash or "nobody"


def stopping(maker: Maker) -> Callable:
    """What a Cancel button does."""

    def stop(request: gr.Request) -> str:
        return "Stopping at the next step." if maker.cancel(session_of(request)) else "Nothing of yours is being made."

    return stop


def on_load(fn, inputs=None, outputs=None, **how: Any):
    """When somebody opens the page."""
    page = gr.context.Context.root_block
    assert page is not None
    return page.load(fn, inputs, outputs, **how)


def name_of(path: str, library: Library) -> str:
    """A path as it is called below its folder."""
    folder = next(folder for folder in library.folders if Path(path).is_relative_to(folder))
    return f"{folder.name}/{Path(path).relative_to(folder)}"


def some_runs(settings: Settings) -> list[tuple[str, str]]:
    return [(NONE, ""), *((Path(run).name, run) for run in runs_in(settings.runs))]
