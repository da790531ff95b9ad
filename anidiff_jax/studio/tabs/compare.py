"""Compare: videos side by side."""

import gradio as gr

from anidiff_jax.studio.maker import AXES, Maker
from anidiff_jax.studio.settings import Settings
from anidiff_jax.studio.widgets import HIDDEN, Fields, on_load, session_of, shown_of, some_runs, stopping, told


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
