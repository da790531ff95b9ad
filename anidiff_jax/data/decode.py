"""Video file → frames of one clip."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

try:  # no wheel for Linux on ARM
    import decord

    UNREADABLE: tuple[type[Exception], ...] = (decord.DECORDError, RuntimeError, OSError, ValueError, IndexError)
except ImportError:
    decord = None
    UNREADABLE = (RuntimeError, OSError, ValueError, IndexError)


class BadVideo(Exception):
    """A video that training must do without, and why."""


def read_clip(path: Path, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """The frames `choose(number of frames)` asks for, uint8 (f, h, w, 3). Raises BadVideo for a file that cannot be decoded."""
    try:
        return _with_decord(path, choose) if decord else _with_imageio(path, choose)
    except BadVideo:
        raise
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()
        raise BadVideo(f"it cannot be decoded ({reason[-1][:80] if reason else type(error).__name__})") from None


def _with_decord(path, choose):
    reader = decord.VideoReader(str(path), num_threads=1)
    if len(reader) == 0:
        raise BadVideo("it has no frames")
    return reader.get_batch(choose(len(reader))).asnumpy()


def _with_imageio(path, choose):
    import imageio.v3 as iio

    chosen = choose(sum(1 for _ in iio.imiter(path, plugin="FFMPEG")))  # the header's count is often wrong
    kept = {i: frame for i, frame in enumerate(iio.imiter(path, plugin="FFMPEG")) if i in set(chosen)}
    return np.stack([kept[i] for i in chosen])


def window(length: int, frames: int, stride: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `frames` frames, `stride` apart, from a random start; a shorter video is spread over what it has."""
    if length < frames:
        raise BadVideo(f"it has {length} frames, a clip needs {frames}")
    span = min(length, (frames - 1) * stride + 1)
    start = int(rng.integers(length - span + 1))
    return np.linspace(start, start + span - 1, frames, dtype=int)


def square(frames: np.ndarray, side: int) -> np.ndarray:
    """The central square of uint8 (f, h, w, 3), resized to `side` pixels with antialiasing."""
    _, h, w, _ = frames.shape
    if h == w == side:
        return frames
    edge = min(h, w)
    top, left = (h - edge) / 2, (w - edge) / 2
    box = (left, top, left + edge, top + edge)
    resize = lambda frame: np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BILINEAR, box=box))
    return np.stack([resize(frame) for frame in frames])
