"""`--eval_human`: prompts typed one after the other, with commands between them that change how they are sampled.

The model and its compiled program stay; what is computed anew is said by each command's help.
"""

import atexit
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from anidiff_jax.arguments import value_of
from anidiff_jax.config import SampleConfig, path_and_scale
from anidiff_jax.errors import UserError

# Commands that set an argument, and what to know of it.
SETTINGS = {
    "seed": ("seed", "another video of the same prompt"),
    "neg": ("negative_prompt", "what the video should not show; nothing after it: no negative prompt"),
    "guidance": ("guidance_scale", "how closely the prompt is followed"),
    "steps": ("num_inference_steps", "denoising steps"),
    "scheduler": ("scheduler", "ddim, euler, dpmpp_2m, … (compiles anew for some)"),
    "frames": ("sample_n_frames", "frames of a video (compiles anew)"),
    "size": ("sample_size", "pixels, 256 or 256x384 (compiles anew)"),
    "fps": ("fps", "frames a second of what is written"),
}
HELP = {
    **{f"/{name} VALUE": text for name, (_, text) in SETTINGS.items()},
    "/lora PATH[:SCALE]": "applies a LoRA besides those there are (compiles anew); /lora none takes all off",
    "/again": "the last prompt once more, with a new seed, or with what was changed since",
    "/settings": "what is set",
    "/help": "this list",
    "exit, Ctrl-D or an empty line": "ends it",
}
FARTHEST = 2**32  # seeds end here


def requests(config: SampleConfig, pipeline) -> Iterator[SampleConfig]:
    """The arguments of one video after the other, as the user types prompts and commands, or as they come through a pipe."""
    with_terminal = sys.stdin.isatty()
    if with_terminal:
        _remember_lines()
        print("A prompt makes a video; /help lists the commands.", file=sys.stderr)
    session = Session(config, pipeline)
    while True:
        try:
            line = input("prompt> " if with_terminal else "").strip()
        except EOFError:
            return
        if line in ("", "exit"):
            return
        try:
            asked = session.answer(line)
        except UserError as error:  # told, and asked again
            print(f"error: {error}", file=sys.stderr)
            continue
        if asked is not None:
            yield asked


@dataclass
class Session:
    """What a conversation has set so far; `sampled` the arguments of its last video."""

    config: SampleConfig
    pipeline: Any
    sampled: SampleConfig | None = None

    def answer(self, line: str) -> SampleConfig | None:
        """The arguments of the video that the line asks for; None where it only sets something. UserError: what is wrong with it."""
        if not line.startswith("/"):
            self.config = self.config.but(prompt=line)
            return self._sample()
        command, _, value = line[1:].partition(" ")
        value = value.strip()
        if command in SETTINGS:
            name, _ = SETTINGS[command]
            if not value and command != "neg":
                raise UserError(f"/{command} needs a value; it is {getattr(self.config, name)}")
            value = value_of(SampleConfig, name, value)
            self.config = self.config.but(**{name: value})
        elif command == "lora":
            self._lora(value)
        elif command == "again":
            return self._again()
        elif command == "settings":
            print(self.settings(), file=sys.stderr)
        elif command == "help":
            print("\n".join(f"  {what:32s} {text}" for what, text in HELP.items()), file=sys.stderr)
        else:
            names = ", ".join(f"/{name}" for name in (*SETTINGS, "lora", "again", "settings", "help"))
            raise UserError(f"/{command} is no command; there are {names}")
        return None

    def settings(self) -> str:
        set_now = {command: getattr(self.config, name) for command, (name, _) in SETTINGS.items()}
        return "  ".join(f"/{name} {value}" for name, value in {**set_now, "lora": ", ".join(self.config.lora) or "none"}.items())

    def _sample(self) -> SampleConfig:
        self.sampled = self.config
        return self.config

    def _again(self) -> SampleConfig:
        if self.sampled is None:
            raise UserError("/again repeats the last prompt, and there was none yet: type one")
        if self.config == self.sampled:
            videos = self.config.num_videos_per_prompt
            self.config = self.config.but(seed=(self.config.seed + videos) % (FARTHEST - videos))
            print(f"seed {self.config.seed}", file=sys.stderr)
        return self._sample()

    def _lora(self, given: str) -> None:
        if not given:
            raise UserError("/lora needs a path, as /lora style.safetensors:0.8, or none")
        if given == "none":
            stays = self.config.merge_lora or self.config.sft_type != "lora"  # what ckpt_dir holds is in the weights
            self.config = self.config.but(lora=[], ckpt_dir=self.config.ckpt_dir if stays else None)
            self.pipeline.loras = []
            return
        self.pipeline.load_lora(*path_and_scale(given), self.config.hub)
        self.config = self.config.but(lora=[*self.config.lora, given])


def show(video, out: TextIO | None = None) -> None:
    """The frames (f, h, w, 3) in [0, 1] side by side as coloured half blocks, in terminals of 24-bit colour; elsewhere nothing."""
    out = out or sys.stderr
    if not out.isatty() or os.environ.get("COLORTERM") not in ("truecolor", "24bit"):
        return
    print(strip(video, shutil.get_terminal_size().columns), file=out)


def strip(video, columns: int) -> str:
    """At most eight of the frames in a row of `columns` characters: each character shows two pixels, one above the other."""
    chosen = np.asarray(video)[np.linspace(0, len(video) - 1, min(8, len(video))).round().astype(int)]
    _, height, width, _ = chosen.shape
    across = max(1, min(width, columns // len(chosen) - 1))  # pixels of a frame, one empty column between two
    down = max(2, 2 * round(across * height / width / 2))
    rows, cols = ((np.arange(n) + 0.5) * side / n for n, side in ((down, height), (across, width)))
    pixels = (chosen[:, rows.astype(int)][:, :, cols.astype(int)] * 255).round().astype(int)  # f down across 3
    block = lambda top, bottom: "\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*top, *bottom)
    line = lambda frame, y: "".join(block(frame[y, x], frame[y + 1, x]) for x in range(across)) + "\x1b[0m"
    return "\n".join(" ".join(line(frame, y) for frame in pixels) for y in range(0, down, 2))


def _remember_lines() -> None:
    """Line editing, and a history that outlives the session, where Python has readline."""
    try:
        import readline
    except ImportError:  # Windows
        return
    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "anidiff-jax" / "prompts"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            readline.read_history_file(path)
    except OSError:  # a home that cannot be written: no history
        return
    readline.set_history_length(1000)

    def keep() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    atexit.register(keep)
