"""Scores of a video of the embedded world against what was asked for, from its frames alone (see `observe`)."""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from anidiff_jax.shapes.observe import Frame, observe
from anidiff_jax.shapes.render import DIRECTIONS, Scene

MOVED = 0.008  # of the picture's side a frame: slower is standing still
GREW = 0.015  # of the logarithm of the size a frame


@dataclass(frozen=True)
class Reading:
    """What a video shows: the most frequent answer of its frames, and its motion a frame (velocity in sides, growth in log size)."""

    color: str | None
    background: str | None
    thing: str | None
    front: str | None
    velocity: tuple[float, float]
    growth: float
    motion: str  # still | right | left | up | down | growing | shrinking | incoherent
    coherent: bool  # it moves or grows: straight, evenly, without a jump or a flicker
    identity: bool  # the same thing, in the same colour, steady in size, in every frame


def read(video) -> Reading:
    """Reads (frames, side, side, 3) in [0, 1]."""
    frames = [observe(frame) for frame in video]
    whole = [f for f in frames if f.inside] or frames
    thing, front = _most((f.thing, f.front) for f in whole)
    color = _most(f.color for f in frames)
    velocity, growth, straight, steady = _track(frames)
    speed = float(np.hypot(*velocity))
    moves, grows = speed > MOVED, abs(growth) > GREW
    there = all(f.color is not None for f in frames)
    coherent = there and straight and steady and (moves or grows)
    kept = there and steady and all(f.color == color for f in frames)
    same = thing is not None and sum(f.thing == thing for f in whole) >= 0.8 * len(whole)
    identity = kept and same and all(f.stray < 0.2 for f in frames)
    if not there or not (straight and steady):
        motion = "incoherent"
    elif moves and speed > 0.4 * abs(growth):
        motion = max(DIRECTIONS, key=lambda d: float(np.dot(DIRECTIONS[d], velocity)))
    else:
        motion = ("growing" if growth > 0 else "shrinking") if grows else "still"
    return Reading(color, _most(f.background for f in frames), thing, front, velocity, growth, motion, coherent, identity)


def _track(frames: list[Frame]) -> tuple[tuple[float, float], float, bool, bool]:
    """(velocity, growth, straight and even, steady in size) by least squares over the frames that show something."""
    times = np.array([i for i, f in enumerate(frames) if f.color is not None])
    if len(times) < 2 or len(times) < 0.75 * len(frames):
        return (0.0, 0.0), 0.0, False, False
    seen = [frames[i] for i in times]
    places, sizes = np.array([(f.x, f.y) for f in seen]), np.log([f.area for f in seen]) / 2
    line = np.polyfit(times, places, 1)
    off = _residual(times, places, line)
    growth = np.polyfit(times, sizes, 1)
    uneven = np.abs(sizes - np.polyval(growth, times))
    speed = np.linalg.norm(line[0])
    travelled = np.diff(places @ (line[0] / speed)) / np.diff(times) if speed > MOVED else np.zeros(1)
    even = speed <= MOVED or (travelled.min() > -0.4 * speed and travelled.max() < 2.6 * speed)
    straight = bool(off < 0.025 + 0.5 * speed and even)
    steady = bool(uneven.max() < 0.25 and np.sqrt(np.mean(uneven**2)) < 0.12)
    return (float(line[0, 0]), float(line[0, 1])), float(growth[0]), straight, steady


def _residual(times, places, line) -> float:
    """Root mean square distance from the straight line, in sides."""
    return float(np.sqrt(np.mean(np.sum((places - (times[:, None] * line[0] + line[1])) ** 2, axis=-1))))


def _most(answers: Iterable[Hashable]):
    return Counter(answers).most_common(1)[0][0]


def scores(video, asked: Scene) -> dict[str, bool | None]:
    """Right or wrong, point by point; None where a question does not arise. `asked` is the scene that the prompt describes."""
    return judge(read(video), asked)


def judge(seen: Reading, asked: Scene) -> dict[str, bool | None]:
    """The same of a video that was read."""
    along = lambda front: np.dot(DIRECTIONS[front], seen.velocity) > max(MOVED, 0.7 * np.hypot(*seen.velocity))
    return {
        "color": seen.color == asked.color,
        "background": seen.background == asked.background,
        "thing": seen.thing == asked.thing,
        "front": (seen.thing, seen.front) == (asked.thing, asked.front) if asked.front else None,
        "coherent": seen.coherent,
        "identity": seen.identity,
        "asked direction": bool(seen.motion != "incoherent" and along(asked.front)) if asked.front else None,
        "along its front": bool(seen.motion != "incoherent" and along(seen.front)) if seen.front else None,
    }
