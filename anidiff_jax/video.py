"""Frames → GIF and mp4 files. A file appears under its name only when it is whole, and never replaces another."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def to_uint8(frames) -> np.ndarray:
    """(f, h, w, 3) in [0, 1] → uint8, rounded."""
    frames = np.asarray(frames)
    return frames if frames.dtype == np.uint8 else np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def save_gif(frames, path: Path, fps: float = 8, settings: Mapping[str, Any] | None = None, replace: bool = False) -> None:
    """Writes an endless GIF of (f, h, w, 3) frames, uint8 or in [0, 1], with one palette made from the whole video.

    A palette a frame makes flat areas flicker. `settings` go into the file as a JSON comment. GIF knows hundredths of a
    second only: delays are spread so that the clip's length is right.
    """
    frames = to_uint8(frames)
    every = Image.fromarray(frames.reshape(-1, frames.shape[2], 3))  # f h w 3 -> (f h) w 3
    palette = every.quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    ticks = np.round(np.arange(len(frames) + 1) * 100 / fps).astype(int)
    options: dict[str, Any] = {"duration": [int(t) * 10 for t in np.diff(ticks)], "loop": 0, "disposal": 1}
    if settings:
        options["comment"] = json.dumps(dict(settings), ensure_ascii=False).encode()
    with written_aside(path, replace) as part:
        images[0].save(part, "GIF", save_all=True, append_images=images[1:], **options)


def save_mp4(frames, path: Path, fps: float = 8) -> None:
    """Writes (f, h, w, 3) frames, of even height and width, as H.264 in yuv420p; overwrites."""
    import imageio.v3 as iio

    part = path.with_name(f".{path.stem}.part.mp4")
    iio.imwrite(part, to_uint8(frames), fps=fps, codec="libx264", macro_block_size=2, output_params=["-crf", "14"])
    os.replace(part, path)


class written_aside:
    """Gives a temporary file beside `path`, and moves it there when all went well; an existing file is replaced only if so asked."""

    def __init__(self, path: Path, replace: bool = False):
        self.path, self.replace = Path(path), replace

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(handle)
        self.part = Path(name)
        self.part.chmod(0o644)
        return self.part

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.path.touch(exist_ok=self.replace)  # takes the name, or fails where it is taken
                os.replace(self.part, self.path)
        finally:
            self.part.unlink(missing_ok=True)


def free_path(folder: Path, prompt: str, seed: int, suffix: str = ".gif") -> Path:
    """A name from prompt and seed that no file in the folder has yet."""
    number, path = 1, folder / f"{slug(prompt)}-seed{seed}{suffix}"
    while path.exists():
        number += 1
        path = folder / f"{slug(prompt)}-seed{seed}-{number}{suffix}"
    return path


def slug(text: str) -> str:
    """Text as a file name of at most 80 bytes."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-")
    return words.encode()[:80].decode(errors="ignore").rstrip("-") or "empty"
