"""Make: a video, and what was made before."""

import secrets
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from anidiff_jax.config import SampleConfig
from anidiff_jax.defaults import EMBEDDED_DEFAULTS
from anidiff_jax.studio import gallery
from anidiff_jax.studio.asked import LONGEST
from anidiff_jax.studio.library import EMBEDDED, NONE, Library
from anidiff_jax.studio.maker import Maker
from anidiff_jax.studio.settings import LORAS, Settings
from anidiff_jax.studio.widgets import HIDDEN, Fields, name_of, on_load, session_of, shown_of, stopping, told
from anidiff_jax.weights import kinds

SCHEDULERS = get_args(SampleConfig.__dataclass_fields__["scheduler"].type)


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


def choices_of(library: Library) -> dict[str, list[tuple[str, str]]]:
    found = library.found()
    first = {kinds.BASE: EMBEDDED, kinds.MOTION: NONE, kinds.LORA: NONE}
    return {kind: [(first[kind], first[kind]), *((name_of(path, library), path) for path in paths)] for kind, paths in found.items()}


def _nothing(name: str) -> str | None:
    return EMBEDDED if name == "model_id_or_path" else NONE if name.startswith(("motion_adapter", "lora_")) else None
