"""The studio: a page in the browser to make videos, compare them, watch a training run, and convert files.

    python studio.py                                             # the embedded tiny model, runs in output, videos in generated
    python studio.py --models ~/models --runs output             # weights found below a folder may be chosen
    python studio.py --host 0.0.0.0 --auth ann:a-long-password   # for other machines too

Only files below the folders that are given can be read. docs/studio.md says how programs use it.
"""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

from anidiff_jax.errors import UserError, run_script
from anidiff_jax.studio.settings import Settings


def main() -> None:
    settings = arguments()
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the studio needs gradio: pip install 'anidiff-jax[studio]', or here pip install -e '.[studio]'")

    with tempfile.TemporaryDirectory(prefix="anidiff-studio-") as uploads:  # what is uploaded stays apart, and goes when the studio ends
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}

        from anidiff_jax.parallel import set_up_jax
        from anidiff_jax.studio.library import Library
        from anidiff_jax.studio.maker import Maker
        from anidiff_jax.studio.page import build, launch
        from anidiff_jax.terminal import start_log

        set_up_jax()
        start_log()
        for folder in (settings.output_path, settings.runs):
            folder.mkdir(parents=True, exist_ok=True)
        maker = Maker(settings, Library(settings.folders))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder of uploads goes then too
        launch(build(settings, maker), settings)


def arguments() -> Settings:
    plain = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", type=folder, action="append", default=[], help="folder of weights that may be chosen; repeatable")
    parser.add_argument("--runs", type=folder, default=plain.runs, help="folder of training runs, train.py's output_dir")
    parser.add_argument("--output_path", type=folder, default=plain.output_path, help="folder for what is made")
    parser.add_argument("--host", default=plain.host, help="address to listen at; any but this machine's own needs --auth")
    parser.add_argument("--port", type=int, help="port; none = the first free one from 7860 on")
    parser.add_argument(
        "--auth", help="user:password, which the page asks for; better from ANIDIFF_AUTH in the environment, where `ps` does not show it"
    )
    parser.add_argument("--queue", type=int, default=plain.queue, help="jobs that may wait")
    parser.add_argument("--max_frames", type=int, default=plain.max_frames, help="of a video")
    parser.add_argument("--max_side", type=int, default=plain.max_side, help="pixels of a side")
    parser.add_argument("--max_steps", type=int, default=plain.max_steps, help="denoising steps of a video")
    parser.add_argument("--max_videos", type=int, default=plain.max_videos, help="videos of a comparison")
    parser.add_argument("--max_upload", default=plain.max_upload, help="largest file that may be dropped")
    args = parser.parse_args()
    return Settings(**{**vars(args), "models": tuple(args.models), "auth": args.auth or os.environ.get("ANIDIFF_AUTH")})


def folder(given: str) -> Path:
    return Path(given).expanduser()


if __name__ == "__main__":
    run_script(main)
