"""Videos longer than the motion modules know: the network sees windows of frames that overlap, and its predictions are averaged.

After FreeNoise (Qiu et al., 2023, arXiv:2310.15169), which averages in every temporal block; here the network's predictions are averaged,
as in MultiDiffusion (Bar-Tal et al., 2023, arXiv:2302.08113), so that memory grows with the latents only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.errors import UserError

SCHEDULES = ("uniform", "static")
FREE_NOISE = ("shuffle", "repeat", "mirror", "none")


@dataclass(frozen=True)
class Context:
    """How a long video is cut.

    frames: of a window; None is as many as the model is made for, and windows only where a video is longer than it knows.
    overlap: frames that neighbours share; None is a quarter of the window, in a loop half of it.
    schedule: uniform, windows move from step to step, so that no seam stays; static, they stay.
    batch: windows that the network sees at once. closed_loop: windows go on from the last frame to the first.
    Raises UserError for values that mean nothing.
    """

    frames: int | None = None
    overlap: int | None = None
    schedule: str = "uniform"
    batch: int = 1
    closed_loop: bool = False

    def __post_init__(self):
        if self.frames is not None and self.frames < 1:
            raise UserError(f"context_frames {self.frames} must be at least 1")
        if self.overlap is not None and not 0 <= self.overlap < (self.frames or np.inf):
            raise UserError(f"context_overlap {self.overlap} must be at least 0 and less than context_frames")
        if self.schedule not in SCHEDULES:
            raise UserError(f"context_schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.batch < 1:
            raise UserError(f"context_batch {self.batch} must be at least 1")

    def window(self, num_frames: int, usual: int, most: int) -> int:
        """Frames of a window, 0 where the network sees the whole video. most: that it knows, usual: that it is made for."""
        if self.frames is not None and self.frames > most:
            raise UserError(f"context_frames {self.frames} are more than the motion modules know ({most}, their motion_max_seq_length)")
        length = self.frames or (num_frames if num_frames <= most else min(usual, most))
        if num_frames <= length and not self.closed_loop:
            return 0
        length = min(length, num_frames)
        if self.overlap is not None and self.overlap >= length:
            raise UserError(f"context_overlap {self.overlap} must be less than the frames of a window, which are {length} here")
        return length

    def stride(self, window: int) -> int:
        """Frames from a window to the next."""
        share = 2 if self.closed_loop else 4
        return window - (window // share if self.overlap is None else self.overlap)

    def starts(self, num_frames: int, window: int, rows: int) -> np.ndarray:
        """(rows, windows) int32: where the windows begin, in every row."""
        stride = self.stride(window)
        shifts = np.array([int(stride * _halving(row)) if self.schedule == "uniform" else 0 for row in range(rows)])
        last = num_frames - window
        if self.closed_loop:
            starts = (np.arange(0, num_frames, stride) + shifts[:, None]) % num_frames
        elif self.schedule == "static":
            starts = np.minimum(np.arange(0, last + stride, stride), last) + shifts[:, None]
        else:  # one more, since they begin up to a stride before the video
            starts = np.clip(np.arange(0, last + 2 * stride, stride) - shifts[:, None], 0, last)
        return starts.astype(np.int32)


def _halving(number: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, …: the bits of `number` mirrored at the point (van der Corput, 1935)."""
    return sum(int(bit) / 2**place for place, bit in enumerate(reversed(f"{number:b}"), 1))


def pyramid(length: int) -> np.ndarray:
    """(length,) weights 1, 2, … 2, 1: a window counts least at its ends, where it sees one side only (FreeNoise, eq. 9)."""
    place = np.arange(length)
    return np.minimum(place, place[::-1]).astype(np.float32) + 1


def over_windows(ask: Callable, x, text, starts, length: int, at_once: int):
    """The mean of ask's predictions over windows: x (1, f, h, w, c), text (n, [f,] tokens, d), starts (windows,) → (n, f, h, w, c).

    ask(x (b, length, h, w, c), text (b, [length,] tokens, d)) → as x; b is n × at_once. A window that runs over the end goes on at frame 0.
    """
    n, frames, windows = text.shape[0], x.shape[1], starts.shape[0]
    at_once = min(at_once, windows)
    starts = jnp.pad(starts, (0, -windows % at_once), constant_values=-1).reshape(-1, at_once)  # those at -1 count for nothing

    def some(sums, begin):
        seen = (begin[:, None] + jnp.arange(length)) % frames  # at_once length
        weights = jnp.where(begin[:, None] >= 0, pyramid(length), 0)
        theirs = text[:, seen] if text.ndim == 4 else jnp.repeat(text[:, None], at_once, axis=1)
        join = lambda y: y.reshape(n * at_once, *y.shape[2:])  # n at_once … -> (n at_once) …
        prediction = ask(join(jnp.repeat(x[:, seen], n, axis=0)), join(theirs))
        prediction = prediction.reshape(n, at_once, *prediction.shape[1:]) * weights[..., None, None, None]
        return (sums[0].at[:, seen].add(prediction), sums[1].at[seen].add(weights)), None

    empty = jnp.zeros((n, *x.shape[1:]), x.dtype), jnp.zeros(frames)
    (total, weight), _ = jax.lax.scan(some, empty, starts)
    return total / weight[:, None, None, None]


def noise_order(kind: str, num_frames: int, window: int, stride: int, permuted: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """(num_frames,) which frame of a window's noise each frame starts from (FreeNoise, sec. 3.2).

    shuffle: a window's own, and then, a stride at a time, those of a window before in another order; repeat: again and again the same;
    mirror: forwards and backwards by turns, so that neighbours across a seam start alike and what moves comes back (not in the paper).
    permuted(frame, n) → 0 … n - 1 in the order for the frames that begin there.
    """
    if kind == "repeat":
        return np.arange(num_frames) % window
    if kind == "mirror":
        place = np.arange(num_frames) % (2 * window)
        return np.minimum(place, 2 * window - 1 - place)
    order = np.arange(num_frames)
    for i in range(window, num_frames, stride):
        order[i : i + stride] = order[i - window : i - window + stride][permuted(i, stride)][: num_frames - i]
    return order
