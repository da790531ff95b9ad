"""What a video of the embedded world shows, by plain image analysis: nothing here knows its prompt, or any network.

A frame is compared with every background, its remaining pixels with every colour, the outline of what is left with every thing.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from anidiff_jax.shapes.render import BACKGROUNDS, COLORS, FRONTS, THINGS, ground, outline

GRID = 28  # samples a side of an outline at standard size and place
REACH = 1.3  # half its side, in units of the square root of the outline's area


@dataclass(frozen=True)
class Frame:
    """One frame: lengths in fractions of its side; thing and front are None where the outline is too unlike all of them."""

    background: str
    color: str | None  # None: nothing is there
    area: float = 0.0
    x: float = float("nan")
    y: float = float("nan")
    thing: str | None = None
    front: str | None = None
    likeness: float = 0.0  # intersection over union with the best outline
    inside: bool = False  # it does not touch the border
    stray: float = 0.0  # area of the thing's colour that is not connected with it, as a share


def observe(frame) -> Frame:
    """Reads one frame (side, side, 3) in [0, 1]."""
    picture = np.asarray(frame, float) * 255
    side = len(picture)
    rows = ((np.arange(side) + 0.5) / side)[:, None, None]
    off = {name: np.abs(picture - ground(name, rows)).sum(-1) for name in BACKGROUNDS}
    background = min(off, key=lambda name: np.median(off[name]))
    behind = ground(background, rows)
    behind = behind + np.clip(np.median(picture - behind, axis=(0, 1)), -20, 20)

    from_behind = np.linalg.norm(picture - behind, axis=-1)
    from_colors = {name: np.linalg.norm(picture - color, axis=-1) for name, color in COLORS.items()}
    nearest = np.argmin(np.stack([*from_colors.values(), from_behind]), axis=0)
    votes = np.bincount(nearest[nearest < len(COLORS)], minlength=len(COLORS))
    if votes.sum() < 0.003 * side * side:
        return Frame(background, None)
    color = list(COLORS)[int(votes.argmax())]
    toward = np.array(COLORS[color]) - behind
    cover = np.clip(((picture - behind) * toward).sum(-1) / np.square(toward).sum(-1), 0, 1)  # soft, as it was drawn

    pieces, count = ndimage.label(cover > 0.5)
    if count == 0:
        return Frame(background, None)
    sizes = np.bincount(pieces.flat)[1:]
    body = pieces == 1 + sizes.argmax()
    cover = cover * ndimage.binary_dilation(body)
    area = cover.sum() / side**2
    y, x = (np.array(ndimage.center_of_mass(cover)) + 0.5) / side
    inside = not (body[0].any() or body[-1].any() or body[:, 0].any() or body[:, -1].any())
    thing, front, likeness = _recognise(_standard(cover, x, y, area))
    return Frame(background, color, float(area), float(x), float(y), thing, front, likeness, inside, float(1 - sizes.max() / sizes.sum()))


def _standard(cover, x: float, y: float, area: float):
    """The outline at standard place and size, (GRID, GRID)."""
    side = len(cover)
    at = np.linspace(-REACH, REACH, GRID) * np.sqrt(area)
    rows, columns = np.meshgrid((y + at) * side - 0.5, (x + at) * side - 0.5, indexing="ij")
    return ndimage.map_coordinates(cover, [rows, columns], order=1, cval=0.0)


@cache
def _outlines():
    """{(thing, front): standard outline}, drawn large."""
    side, size = 256, 0.25
    grid = ((np.arange(side) + 0.5) / side - 0.5) / size
    result = {}
    for thing in THINGS:
        for front in FRONTS.get(thing, (None,)):
            cover = outline(thing, front, grid[None, :], grid[:, None]).astype(float)
            y, x = (np.array(ndimage.center_of_mass(cover)) + 0.5) / side
            result[thing, front] = _standard(cover, x, y, cover.sum() / side**2)
    return result


def _recognise(found):
    alike = {key: float(np.minimum(found, one).sum() / np.maximum(found, one).sum()) for key, one in _outlines().items()}
    thing, front = max(alike, key=lambda key: alike[key])
    likeness = alike[thing, front]
    return (thing, front, likeness) if likeness > 0.6 else (None, None, likeness)
