"""Frames → GIF, MP4, WebP and PNG files. A file appears under its name only when it is whole, and never replaces another unasked."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anidiff_jax.errors import UserError

DITHER = {"floyd_steinberg": Image.Dither.FLOYDSTEINBERG, "none": Image.Dither.NONE}
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286  # of Exif 2.32
ASCII = b"ASCII\0\0\0"  # how a user comment begins that is ASCII


def to_uint8(frames) -> np.ndarray:
    """(f, h, w, 3) in [0, 1] → uint8, rounded."""
    frames = np.asarray(frames)
    return frames if frames.dtype == np.uint8 else np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def save_gif(
    frames,
    path: Path,
    fps: float = 8,
    settings: Mapping[str, Any] | None = None,
    replace: bool = False,
    dither: str = "floyd_steinberg",
    plays: int = 0,
) -> None:
    """Writes a GIF of (f, h, w, 3) frames, uint8 or in [0, 1], with one palette made from the whole video.

    A palette a frame makes flat areas flicker. `settings` go into the file as a JSON comment. GIF knows hundredths of a
    second only: delays are spread so that the clip's length is right. dither: floyd_steinberg | none. plays: how often; 0 = endless.
    """
    frames = to_uint8(frames)
    every = Image.fromarray(frames.reshape(-1, frames.shape[2], 3))  # f h w 3 -> (f h) w 3
    palette = every.quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=DITHER[dither]) for frame in frames]
    options: dict[str, Any] = {"duration": [10 * ticks for ticks in delays(len(frames), fps, 100)], "disposal": 1}
    if plays != 1:
        options["loop"] = max(plays - 1, 0)  # the file says how often it plays again; 0 = endless
    if settings:
        options["comment"] = as_json(settings).encode()
    with written_aside(path, replace) as part:
        images[0].save(part, "GIF", save_all=True, append_images=images[1:], **options)


def save_webp(
    frames,
    path: Path,
    fps: float = 8,
    settings: Mapping[str, Any] | None = None,
    replace: bool = False,
    quality: int = 90,
    plays: int = 0,
) -> None:
    """Writes an animated WebP of (f, h, w, 3) frames; `settings` go into its EXIF user comment.

    quality: 0 to 100, where 100 loses nothing. plays: how often; 0 = endless.
    """
    images = [Image.fromarray(frame) for frame in to_uint8(frames)]
    options: dict[str, Any] = {"duration": delays(len(images), fps, 1000), "loop": plays}
    options |= {"lossless": True, "exact": True} if quality == 100 else {"quality": quality}
    if settings:
        exif = Image.Exif()
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = ASCII + json.dumps(dict(settings)).encode()  # json escapes what is not ASCII
        options["exif"] = exif
    with written_aside(path, replace) as part:
        images[0].save(part, "WEBP", save_all=True, append_images=images[1:], **options)


def save_mp4(frames, path: Path, fps: float = 8, settings: Mapping[str, Any] | None = None, replace: bool = False, crf: int = 14) -> None:
    """Writes (f, h, w, 3) frames as H.264 in yuv420p, which plays everywhere; `settings` go into the file as its comment.

    yuv420p keeps colours for two by two pixels, so an odd height or width gets its last row or column twice.
    crf: x264's constant rate factor, 0 to 51; lower is better, and 6 less makes files twice as large. sample.py's own default is 17.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    frames = to_uint8(frames)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    pixels = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-framerate", str(fps), "-i", "-"]
    coded = ["-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p", "-colorspace", "smpte170m", "-movflags", "+faststart"]
    with written_aside(path, replace) as part, tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as said:
        comment = []
        if settings:  # in a file: a word of a command line is at most 128 KB
            said.write(";FFMETADATA1\ncomment=" + re.sub(r"([=;#\\\n])", r"\\\1", as_json(settings)) + "\n")
            said.flush()
            comment = ["-f", "ffmetadata", "-i", said.name, "-map", "0:v", "-map_metadata", "1"]
        command = [get_ffmpeg_exe(), "-y", "-v", "error", *pixels, *comment, *coded, "-f", "mp4", str(part)]
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
        if done.returncode:
            said = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"{path} could not be written: ffmpeg says {said[:200]}")


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None, replace: bool = False) -> None:
    """Writes one picture; `settings` go into its text entry Comment."""
    info = PngInfo()
    if settings:
        info.add_itxt("Comment", as_json(settings))
    with written_aside(path, replace) as part:
        image.save(part, "PNG", pnginfo=info)


def save_frames(frames, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes each of (f, h, w, 3) frames as a PNG into a new folder: 0000.png and so on, each with the settings."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        whole = Path(aside) / folder.name
        for i, frame in enumerate(to_uint8(frames)):
            save_png(Image.fromarray(frame), whole / f"{i:04d}.png", settings)
        os.rename(whole, folder)  # fails where another took the name and wrote into it


def delays(frames: int, fps: float, ticks: int) -> list[int]:
    """How long each frame stays, in ticks of which a second has so many; whole ones, spread so that their sum is right."""
    return np.diff(np.round(np.arange(frames + 1) * ticks / fps).astype(int)).tolist()


def as_json(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), ensure_ascii=False)


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


def free_name(folder: Path, name: str, suffixes: Sequence[str]) -> str:
    """The name, with a number where need be, under which no file with any of the suffixes lies in the folder yet."""
    number, free = 1, name
    while any(os.path.lexists(folder / f"{free}{suffix}") for suffix in suffixes):
        number += 1
        free = f"{name}-{number}"
    return free


def free_path(folder: Path, prompt: str, seed: int, suffix: str = ".gif") -> Path:
    """A name from prompt and seed that no file in the folder has yet."""
    return folder / f"{free_name(folder, f'{slug(prompt)}-seed{seed}', [suffix])}{suffix}"


def slug(text: str) -> str:
    """Text as a file name of at most 80 bytes."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-")
    return words.encode()[:80].decode(errors="ignore").rstrip("-") or "empty"
