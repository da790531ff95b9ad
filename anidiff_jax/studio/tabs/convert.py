"""Convert: a file of weights, what it is and what it can become."""

from typing import Any

import gradio as gr

from anidiff_jax.errors import UserError
from anidiff_jax.studio import convert
from anidiff_jax.studio.library import NONE, Library
from anidiff_jax.studio.settings import Settings
from anidiff_jax.studio.widgets import HIDDEN, Fields, name_of, on_load, shown_errors, told
from anidiff_jax.weights.base import EMBEDDED as EMBEDDED_MODEL


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


def all_of(library: Library) -> list[tuple[str, str]]:
    return [(NONE, NONE), *((f"{name_of(path, library)} ({kind})", path) for kind, paths in library.found().items() for path in paths)]
