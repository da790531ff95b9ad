"""Video file → frames of one clip."""

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

try:  # no wheel for Linux on ARM
    import decord

    # AssertionError: decord's own of a video without frames
    UNREADABLE: tuple[type[Exception], ...] = (decord.DECORDError, RuntimeError, OSError, ValueError, IndexError, AssertionError)
except ImportError:
    decord = None
    UNREADABLE = (RuntimeError, OSError, ValueError, IndexError)

log = logging.getLogger(__name__)

BYTES_AT_ONCE = 256 * 1024 * 1024  # of frames that are held in the video's own size: ten of 4K
PASSING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT}  # errors that say nothing of the video
PATIENCE = 60.0  # seconds of one read, after which the log names the video


class BadVideo(Exception):
    """A video that training must do without, and why."""


def read_clip(path: Path, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """The frames `choose(number of frames)` asks for, uint8 (f, h, w, 3). Raises BadVideo for a file that cannot be decoded."""
    return _read(path, lambda: _with_decord(path, choose) if decord else _with_imageio(path, choose))


def _read(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives. BadVideo where the file is at fault; an OSError where it is the disk, or all files at once."""
    try:
        with _named_when_it_hangs(path):
            return read()
    except BadVideo:
        raise
    except UNREADABLE as error:
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as deeper:
            if deeper.errno in PASSING:
                raise
        reason = str(error).strip().splitlines()
        raise BadVideo(f"it cannot be decoded ({reason[-1][:80] if reason else type(error).__name__})") from None


@contextmanager
def _named_when_it_hangs(path: Path) -> Iterator[None]:
    """A decoder that hangs cannot be stopped from within its process, but one line says where: whichever process it is in, so an error."""
    words = (
        "%s: its decoder has been silent for %.0f s; if it stays so, end the run, and see --check_data true, which leaves such videos out"
    )
    timer = threading.Timer(PATIENCE, log.error, (words, path, PATIENCE))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_whole(path: Path, height: int, width: int) -> np.ndarray:
    """Every frame of a video, cut and resized to (frames, height, width, 3); only some at a time are held in its own size."""
    return np.concatenate([fit(part, height, width) for part in read_parts(path)])


def read_parts(path: Path) -> Iterator[np.ndarray]:
    """Every frame of a video in its own size, as many at a time as BYTES_AT_ONCE holds, the first alone; raises BadVideo as `read_clip`."""
    parts, any_frame = _parts_of_decord(path) if decord else _parts_of_imageio(path), False
    while (part := _read(path, lambda: next(parts, None))) is not None:
        any_frame = True
        yield part
    if not any_frame:
        raise BadVideo("it has no frames")


def _parts_of_decord(path: Path) -> Iterator[np.ndarray]:
    reader = decord.VideoReader(str(path), num_threads=1)
    start, at_once = 0, 1
    while start < len(reader):
        part = reader.get_batch(np.arange(start, min(start + at_once, len(reader)))).asnumpy()
        yield part
        start, at_once = start + len(part), max(1, BYTES_AT_ONCE // part[0].nbytes)


def _parts_of_imageio(path: Path) -> Iterator[np.ndarray]:
    import imageio.v3 as iio

    kept: list[np.ndarray] = []
    for frame in iio.imiter(path, plugin="FFMPEG"):
        kept.append(frame)
        if len(kept) * frame.nbytes >= BYTES_AT_ONCE:
            yield np.stack(kept)
            kept = []
    if kept:
        yield np.stack(kept)


def timestamps(path: Path) -> np.ndarray | None:
    """When each frame is shown, in seconds; None where the reader cannot say."""
    if decord is None:
        return None
    reader = decord.VideoReader(str(path), num_threads=1)
    return np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]


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


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest central part of uint8 (f, h, w, 3) that has the shape height : width, resized to it with antialiasing."""
    _, h, w, _ = frames.shape
    if (h, w) == (height, width):
        return frames
    scale = min(h / height, w / width)
    top, left = (h - scale * height) / 2, (w - scale * width) / 2
    box = (left, top, left + scale * width, top + scale * height)
    resize = lambda frame: np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box=box))
    return np.stack([resize(frame) for frame in frames])
