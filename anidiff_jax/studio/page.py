"""The page: its tabs, its looks, and how it is served. The work is done by `maker`, `gallery`, `runs` and `convert`."""

from typing import Any

import gradio as gr

from anidiff_jax.studio.maker import Maker
from anidiff_jax.studio.settings import Settings
from anidiff_jax.studio.tabs.compare import compare_tab
from anidiff_jax.studio.tabs.convert import convert_tab
from anidiff_jax.studio.tabs.make import make_tab
from anidiff_jax.studio.tabs.watch import watch_tab
from anidiff_jax.studio.widgets import session_of

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
