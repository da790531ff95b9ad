"""The page: what stands where, and which function answers which button. The work is done by `maker`, `gallery`, `runs` and `convert`."""

import secrets
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import pandas as pd

from anidiff_jax.config import SampleConfig
from anidiff_jax.defaults import EMBEDDED_DEFAULTS
from anidiff_jax.errors import UserError
from anidiff_jax.studio import convert, gallery
from anidiff_jax.studio.asked import LONGEST
from anidiff_jax.studio.library import EMBEDDED, NONE, Library
from anidiff_jax.studio.maker import AXES, Maker, Stopped
from anidiff_jax.studio.runs import Run, changed, runs_in
from anidiff_jax.studio.settings import LORAS, Settings
from anidiff_jax.training.runs import LOG
from anidiff_jax.weights import kinds
from anidiff_jax.weights.base import EMBEDDED as EMBEDDED_MODEL

CSS = """
video, .grid-wrap img, .preview img {image-rendering: pixelated}
#video video, #compared video {width: 100%; height: 100%; object-fit: contain}
.gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)) !important}
.hint {font-size: 0.9em; opacity: 0.8; min-height: 1.5em}
@media (max-width: 700px) {
  .gradio-container main {padding: 8px !important}
  .tab-container button {padding: 0 10px !important}
  button.lg {padding: 8px !important; white-space: nowrap}
  #shown {order: -1}
  #video {height: 300px !important}
}
"""
THEME = gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
WATCH = 3  # seconds from a look at a run to the next
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
SCHEDULERS = get_args(SampleConfig.__dataclass_fields__["scheduler"].type)


def build(settings: Settings, maker: Maker) -> gr.Blocks:
    """The page, ready to be launched."""

    def leave(request: gr.Request) -> None:
        maker.cancel(session_of(request))

    with gr.Blocks(title="anidiff-jax studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Tab("Make", id="make"):
            fields = make_tab(settings, maker)
        with gr.Tab("Compare", id="compare"):
            compare_tab(settings, maker, fields)
        with gr.Tab("Watch", id="watch"):
            watch_tab(settings, maker.library)
        with gr.Tab("Convert", id="convert"):
            convert_tab(settings, maker.library, fields)
        page.unload(leave)
    return page.queue(default_concurrency_limit=4)


def launch(page: gr.Blocks, settings: Settings, **more: Any):
    """Serves the page; files other than those of output_path and of the runs are not given out."""
    return page.launch(
        server_name=settings.host, server_port=settings.port, auth=settings.login, max_file_size=settings.max_upload, share=False,
        allowed_paths=[str(folder.resolve()) for folder in (settings.output_path, settings.runs)],
        show_error=True, max_threads=settings.queue + 40, theme=THEME, css=CSS, footer_links=["api", "settings"], **more,
    )  # fmt: skip


def make_tab(settings: Settings, maker: Maker) -> Fields:
    """Fields of a video, the video, and what was made before → the fields by name."""
    with gr.Row():
        fields: Fields = {
            "prompt": gr.Textbox("a red circle on a white background", label="Prompt", lines=2, max_lines=8, max_length=LONGEST, scale=3,
                                 placeholder="What it shows; to travel, a line for each: 0: a calm sea, 16: a storm", min_width=280,
                                 elem_id="prompt"),
            "negative_prompt": gr.Textbox("", label="Negative prompt", lines=2, max_length=LONGEST, scale=2, min_width=280),
        }  # fmt: skip
    with gr.Row():
        make = gr.Button("Make", variant="primary", scale=3, min_width=100)
        again = gr.Button("Again", min_width=70)
        new_seed = gr.Button("New seed", min_width=100)
        cancel = gr.Button("Cancel", variant="stop", min_width=70)
    note = gr.Markdown(elem_classes="hint", elem_id="note")
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            fields |= size_fields(settings)
            fields |= model_fields(maker.library)
            with gr.Accordion("More settings", open=False):
                fields["output_format"] = gr.CheckboxGroup(["gif", "webp", "png", "sheet"], label="Formats besides mp4")
                fields["more"] = gr.Textbox("", label="Other arguments of sample.py", info="as --freeu 0.9,0.2,1.2,1.4 --pag_scale 3")
        with gr.Column(scale=4, min_width=320, elem_id="shown"):
            video = gr.Video(label="Video", autoplay=True, loop=True, interactive=False, elem_id="video", height=400)
            files = gr.Files(label="Files", interactive=False, height=120)
            with gr.Accordion("Its settings", open=False):
                record = gr.JSON(show_label=False, elem_id="record")
    made = gr.Gallery(label="Made before, newest first", columns=6, height=280, object_fit="contain", interactive=False, elem_id="gallery",
                      elem_classes="gallery", fit_columns=False, buttons=["download"])  # fmt: skip
    with gr.Row():
        chosen = gr.Markdown("Choose a video above to see its settings.", elem_classes="hint")
        load = gr.Button("Load these settings", min_width=180, interactive=False, elem_id="load")
    shown, picked = gr.State([]), gr.State(None)  # records' files: of the gallery as this page has it, and of the one that was chosen

    def run(request: gr.Request, progress=gr.Progress(), **asked):  # noqa: B008  as gradio wants it
        path = told(lambda: maker.make(asked, session_of(request), lambda share, text: progress(share, desc=text)))
        return shown_of(path)

    def show_made():
        now = gallery.entries(settings.output_path)
        return [(str(entry.thumbnail), entry.caption) for entry in now], [str(entry.files[-1]) for entry in now]

    def pick(shown: list[str], event: gr.SelectData):
        entry = gallery.entry_of(Path(shown[event.index])) if isinstance(event.index, int) and event.index < len(shown) else None
        if entry is None:
            return None, "It is not there any more.", gr.Button(interactive=False)
        return str(entry.files[-1]), f"**{entry.shown.name}** · {entry.caption}", gr.Button(interactive=True)

    def take(path: str | None) -> list[Any]:
        entry = gallery.entry_of(Path(path)) if path else None
        values = told(lambda: gallery.fields_of(entry.record)) if entry else None
        if values is None:
            raise gr.Error("It is not there any more.")
        return [values[name] if values[name] is not None else _nothing(name) for name in fields]

    use: Any = {"inputs_kwargs": fields, "outputs": [video, files, record], "concurrency_limit": None, "show_progress_on": [video]}
    refresh: Any = {"fn": show_made, "outputs": [made, shown], **HIDDEN}
    look: Any = {"fn": lambda **asked: maker.note(asked), "inputs_kwargs": fields, "outputs": note, "queue": False, **HIDDEN}
    jobs = [make.click(run, api_name="make", api_description="Makes a video: (mp4, all files, its settings).", **use)]
    drawn = new_seed.click(lambda: secrets.randbelow(2**32 - 1), outputs=fields["seed"], queue=False, **HIDDEN)
    jobs.append(drawn.then(run, api_visibility="private", **use))
    last = again.click(lambda record: (record or {}).get("seed", gr.skip()), record, fields["seed"], queue=False, **HIDDEN)
    jobs.append(last.then(run, api_visibility="private", **use))
    for job in jobs:
        job.then(**refresh).then(**look)
    cancel.click(stopping(maker), outputs=note, queue=False, api_name="cancel", show_progress="hidden",
                 api_description="Ends this client's jobs, a running one at its next step.")  # fmt: skip
    for component in fields.values():
        component.change(**look)
    made.select(pick, shown, outputs=[picked, chosen, load], queue=False, **HIDDEN)
    load.click(take, picked, list(fields.values()), queue=False, **HIDDEN)
    on_load(**refresh)
    on_load(**look)

    def records() -> list[str]:
        """The JSON files of what was made, newest first."""
        return [str(entry.files[-1]) for entry in gallery.entries(settings.output_path)]

    gr.api(records, api_name="made", queue=False)
    return fields


def size_fields(settings: Settings) -> Fields:
    """What a video is like, as the embedded model is used to it."""
    side, frames = int(EMBEDDED_DEFAULTS["sample_size"]), EMBEDDED_DEFAULTS["sample_n_frames"]
    with gr.Row():
        numbers: Fields = {
            "sample_n_frames": gr.Number(frames, label="Frames", precision=0, elem_id="frames", min_width=80),
            "width": gr.Number(side, label="Width", precision=0, step=8, elem_id="width", min_width=80),
            "height": gr.Number(side, label="Height", precision=0, step=8, min_width=80),
            "fps": gr.Number(8, label="FPS", min_width=80),
        }
    with gr.Row():
        numbers |= {
            "scheduler": gr.Dropdown(list(SCHEDULERS), value="ddim", label="Scheduler", min_width=120),
            "num_inference_steps": gr.Slider(1, settings.max_steps, 25, step=1, label="Steps", elem_id="steps", min_width=140),
            "guidance_scale": gr.Slider(1, 20, EMBEDDED_DEFAULTS["guidance_scale"], step=0.5, label="Guidance", min_width=140),
        }
    with gr.Row(equal_height=True):
        numbers |= {
            "seed": gr.Number(42, label="Seed", precision=0, elem_id="seed", min_width=120),
            "closed_loop": gr.Checkbox(False, label="Loop", info="The last frame meets the first", min_width=140),
        }
    return numbers


def model_fields(library: Library) -> Fields:
    """Model, adapter and LoRAs: found ones to choose from, or a hub's id typed in."""
    with gr.Accordion("Model, adapter and LoRAs", open=False):
        choices = choices_of(library)
        free: Any = {"allow_custom_value": True, "filterable": True}
        parts: Fields = {
            "model_id_or_path": gr.Dropdown(choices[kinds.BASE], value=EMBEDDED, label="Model", info="found, or a hub id", **free),
            "motion_adapter_id_or_path": gr.Dropdown(choices[kinds.MOTION], value=NONE, label="Motion adapter", **free,
                                                     info="none: the embedded model's own; of others, the image model alone"),
        }  # fmt: skip
        for i in range(1, LORAS + 1):
            with gr.Row():
                parts[f"lora_{i}"] = gr.Dropdown(choices[kinds.LORA], value=NONE, label=f"LoRA {i}", scale=2, min_width=160, **free)
                parts[f"lora_scale_{i}"] = gr.Slider(-2, 2, 1, step=0.05, label=f"Scale {i}", min_width=140)
        find = gr.Button("Look again for files", size="sm")
    lists = {"model_id_or_path": kinds.BASE, "motion_adapter_id_or_path": kinds.MOTION}
    lists |= {f"lora_{i}": kinds.LORA for i in range(1, LORAS + 1)}

    def look():
        now = choices_of(library)
        return [gr.Dropdown(choices=now[kind]) for kind in lists.values()]

    for event in (find.click, on_load):
        event(look, outputs=[parts[name] for name in lists], queue=False, **HIDDEN)
    return parts


def compare_tab(settings: Settings, maker: Maker, fields: Fields) -> None:
    """A grid over one list of values or two; all else is as on the Make tab."""
    gr.Markdown("What differs from column to column, and from row to row. All else is as on the Make tab.")
    names = [(name.replace("_1", " 1").replace("_", " "), name) for name in AXES]
    with gr.Row():
        with gr.Column(min_width=280):
            columns = gr.Dropdown(names, value="seed", label="Columns")
            column_values = gr.Textbox("1, 2, 3", label="Their values", info="with commas between; of prompts with | between")
        with gr.Column(min_width=280):
            rows = gr.Dropdown([("none", ""), *names], value="", label="Rows")
            row_values = gr.Textbox("", label="Their values")
        with gr.Column(min_width=280):
            run = gr.Dropdown(
                some_runs(settings),
                value="",
                label="Run, for checkpoints",
                allow_custom_value=True,
                info="values: its updates; none = all of them",
            )
            with gr.Row():
                go = gr.Button("Compare", variant="primary", elem_id="compare-go")
                cancel = gr.Button("Cancel", variant="stop")
    note = gr.Markdown(elem_classes="hint")
    video = gr.Video(label="Side by side", autoplay=True, loop=True, interactive=False, elem_id="compared", height=480)
    files = gr.Files(label="Files", interactive=False, height=120)

    def compare(request: gr.Request, progress=gr.Progress(), *, columns, column_values, rows, row_values, run, **asked):  # noqa: B008
        say = lambda share, text: progress(share, desc=text)
        axes = (columns, column_values or ""), (rows or "", row_values or "")
        return shown_of(told(lambda: maker.compare(asked, *axes, run, session_of(request), say)))[:2]

    own: Fields = {"columns": columns, "column_values": column_values, "rows": rows, "row_values": row_values, "run": run}
    go.click(compare, inputs_kwargs=own | fields, outputs=[video, files], concurrency_limit=None,
                   show_progress_on=[video], api_name="compare", api_description="Videos side by side: (mp4, all files).")  # fmt: skip
    cancel.click(stopping(maker), outputs=note, queue=False, **HIDDEN)
    on_load(lambda: gr.Dropdown(choices=some_runs(settings)), outputs=run, queue=False, **HIDDEN)


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


def convert_tab(settings: Settings, library: Library, fields: Fields) -> None:
    """A file: what it is, and what it can become."""
    gr.Markdown(
        f"A file of weights, dropped here (at most {settings.max_upload}) or found below the folders of the studio. "
        "A LoRA with kohya's names is read for the model and adapter of the Make tab."
    )
    with gr.Row():
        with gr.Column(min_width=300):
            upload = gr.File(label="File", file_types=[".safetensors", ".ckpt", ".pt", ".pth", ".bin"], elem_id="upload")
            found = gr.Dropdown(all_of(library), value=NONE, label="or one that is here", allow_custom_value=True, elem_id="found")
            what = gr.Button("What is it?", variant="primary")
        with gr.Column(min_width=300):
            said = gr.Code(label="What it is", language=None, interactive=False, lines=9, elem_id="said", wrap_lines=True)
            target = gr.Dropdown([], label="Export as", interactive=True, allow_custom_value=True)
            dtype = gr.Dropdown(["as it is", "float32", "float16", "bfloat16"], value="as it is", label="Type of the weights")
            go = gr.Button("Export")
            result = gr.File(label="The result", interactive=False, elem_id="result")

    def source(upload: str | None, found: str | None) -> str:
        path = upload or library.permitted(found, "file")
        if path is None:
            raise UserError("there is no file: drop one, or choose one that is here")
        return path

    def describe(upload: str | None, found: str | None):
        text, targets = told(lambda: convert.describe(source(upload, found)))
        return text, gr.Dropdown(choices=targets, value=targets[0] if targets else None)

    def export(
        upload: str | None, found: str | None, target: str | None, dtype: str, model_id_or_path: str, motion_adapter_id_or_path: str
    ):
        kind = None if dtype == "as it is" else dtype
        base, adapter = library.permitted(model_id_or_path, "model"), library.permitted(motion_adapter_id_or_path, "motion adapter")
        if base is None:
            base, adapter = str(EMBEDDED_MODEL), adapter or str(EMBEDDED_MODEL / "motion_adapter")
        if not target:
            raise UserError("ask what it is first; then choose what it should become")
        return str(convert.export(source(upload, found), target, kind, settings.converted, base, adapter))

    one: Any = {"concurrency_id": "disk", "concurrency_limit": 1}
    what.click(describe, [upload, found], [said, target], api_name="describe", **one)
    upload.upload(describe, [upload, found], [said, target], api_visibility="private", **one)
    model, adapter = fields["model_id_or_path"], fields["motion_adapter_id_or_path"]
    go.click(shown_errors(export), [upload, found, target, dtype, model, adapter], result, api_name="export", **one)
    on_load(lambda: gr.Dropdown(choices=all_of(library)), outputs=found, queue=False, **HIDDEN)


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


def choices_of(library: Library) -> dict[str, list[tuple[str, str]]]:
    found = library.found()
    first = {kinds.BASE: EMBEDDED, kinds.MOTION: NONE, kinds.LORA: NONE}
    return {kind: [(first[kind], first[kind]), *((name_of(path, library), path) for path in paths)] for kind, paths in found.items()}


def all_of(library: Library) -> list[tuple[str, str]]:
    return [(NONE, NONE), *((f"{name_of(path, library)} ({kind})", path) for kind, paths in library.found().items() for path in paths)]


def name_of(path: str, library: Library) -> str:
    """A path as it is called below its folder."""
    folder = next(folder for folder in library.folders if Path(path).is_relative_to(folder))
    return f"{folder.name}/{Path(path).relative_to(folder)}"


def curves(rows: list[tuple[int, float, str]]) -> gr.LinePlot:
    """(update, value, which) as lines, once there are two points for one."""
    return gr.LinePlot(value=pd.DataFrame(rows, columns=["update", "value", "which"]), visible=len({step for step, *_ in rows}) > 1)


def some_runs(settings: Settings) -> list[tuple[str, str]]:
    return [(NONE, ""), *((Path(run).name, run) for run in runs_in(settings.runs))]


def _runs(settings: Settings, now: str | None):
    """The runs there are, and the newest where none was chosen."""
    there = runs_in(settings.runs)
    return gr.Dropdown(choices=some_runs(settings)[1:], value=now if now in there else there[0] if there else None)


def _nothing(name: str) -> str | None:
    return EMBEDDED if name == "model_id_or_path" else NONE if name.startswith(("motion_adapter", "lora_")) else None
