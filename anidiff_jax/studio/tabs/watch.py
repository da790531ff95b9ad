"""Watch: a run of training."""

from pathlib import Path

import gradio as gr
import pandas as pd

from anidiff_jax.errors import UserError
from anidiff_jax.studio.library import Library
from anidiff_jax.studio.runs import Run, changed, runs_in
from anidiff_jax.studio.settings import Settings
from anidiff_jax.studio.widgets import HIDDEN, PICTURES, on_load, some_runs, told
from anidiff_jax.training.runs import LOG

WATCH = 3  # seconds from a look at a run to the next


def watch_tab(settings: Settings, library: Library) -> None:
    """A run of training, looked at again every few seconds."""
    there = runs_in(settings.runs)
    run = gr.Dropdown(some_runs(settings)[1:], value=there[0] if there else None, label="Run", elem_id="run", allow_custom_value=True,
                      info="the newest first")  # fmt: skip
    status = gr.Markdown(elem_id="status")
    with gr.Row():
        loss = gr.LinePlot(x="update", y="value", color="which", title="Training loss", height=260, min_width=300)
        validation = gr.LinePlot(
            x="update", y="value", color="which", title="Validation loss", color_title="bucket of timesteps", height=260, min_width=300
        )
        scores = gr.LinePlot(x="update", y="value", color="which", title="Scores of the samples", height=260, min_width=300)
    at = gr.Slider(1, 2, 1, step=1, label="Samples", visible=False, elem_id="at")
    samples = gr.Gallery(label="Samples", elem_id="samples", **PICTURES)
    with gr.Accordion("Data", open=False):
        data = gr.Markdown()
        clips = gr.Gallery(label="The first clips, as the network gets them", **PICTURES)
    with gr.Row():
        with gr.Accordion("Cost", open=False):
            cost = gr.Dataframe(headers=["what", "how much"], interactive=False, show_label=False)
        with gr.Accordion("Settings", open=False):
            table = gr.Dataframe(headers=["argument", "value", ""], interactive=False, show_label=False)
    seen = gr.State(("", 0.0, 0))  # the run that is shown, its last change, and how many updates were sampled
    outputs = [status, loss, validation, scores, at, samples, data, clips, cost, table, seen]

    def folder_of(folder: str | None) -> Path:
        """UserError where there is no such run."""
        permitted = library.permitted(folder, "run")
        if permitted is None:
            raise UserError("No run yet: train.py makes one.")
        if not (Path(permitted) / LOG).exists():
            raise UserError(f"{folder} is no run of training, or not yet")
        return Path(permitted)

    def read(folder: str | None) -> Run:
        return Run.read(folder_of(folder))

    def look(folder: str | None, now: float, seen: tuple[str, float, int]):
        """All of a run, where there is something new in it."""
        try:
            there = folder_of(folder)
            mark = (str(there), changed(there))
            if tuple(seen[:2]) == mark:
                return [gr.skip()] * 11
            found = Run.read(there)
            steps = found.sampled()
            new = str(found.folder) != seen[0]
            number = len(steps) if new or now >= seen[2] else max(1, int(now))  # who stands at the newest goes on with it
            slider = gr.Slider(minimum=1, maximum=max(2, len(steps)), value=max(1, number), visible=len(steps) > 1)
            return [
                found.status(), curves(found.losses()), curves(found.validation()), curves(found.scores()), slider, sampled(found, number),
                found.data_report(), found.seen_clips() if new else gr.skip(), found.cost(), found.settings() if new else gr.skip(),
                (*mark, len(steps)),
            ]  # fmt: skip
        except UserError as error:  # at every look: no message that pops up
            return [str(error), *[gr.skip()] * 9, ("", 0.0, 0)]

    def sampled(run: Run, number: int) -> gr.Gallery:
        """The samples of the number-th update that was sampled, from 1."""
        steps = run.sampled()
        if not steps:
            return gr.Gallery(value=[], label="Samples: none yet")
        step = steps[min(max(int(number), 1), len(steps)) - 1]
        return gr.Gallery(value=run.samples(step), label=f"Samples at update {step}, {len(steps)} times sampled until update {steps[-1]}")

    def report(run: str) -> dict:
        """A run: status, losses, validation, scores, samples by update, cost, data, settings."""
        found = told(lambda: read(run))
        return {"status": found.status(), "losses": found.losses(), "validation": found.validation(), "scores": found.scores(),
                "samples": {str(step): [path for path, _ in found.samples(step)] for step in found.sampled()}, "cost": found.cost(),
                "data": found.data_report(), "settings": found.settings()}  # fmt: skip

    timer = gr.Timer(WATCH)
    for event in (timer.tick, run.input, on_load):
        event(look, [run, at, seen], outputs, queue=False, **HIDDEN)
    timer.tick(lambda now: _runs(settings, now), run, run, queue=False, **HIDDEN)
    at.input(lambda folder, number: sampled(told(lambda: read(folder)), number), [run, at], samples, queue=False, **HIDDEN)

    def runs() -> list[str]:
        """The runs, newest first."""
        return runs_in(settings.runs)

    gr.api(runs, api_name="runs", queue=False)
    gr.api(report, api_name="watch", queue=False)


def curves(rows: list[tuple[int, float, str]]) -> gr.LinePlot:
    """(update, value, which) as lines, once there are two points for one."""
    return gr.LinePlot(value=pd.DataFrame(rows, columns=["update", "value", "which"]), visible=len({step for step, *_ in rows}) > 1)


def _runs(settings: Settings, now: str | None):
    """The runs there are, and the newest where none was chosen."""
    there = runs_in(settings.runs)
    return gr.Dropdown(choices=some_runs(settings)[1:], value=now if now in there else there[0] if there else None)
