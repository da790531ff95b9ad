"""Draws one shape moving over a background, anti-aliased, from signed distances."""

from dataclasses import dataclass

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (20, 20, 20), "gray": (128, 128, 128)}
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}


def _polygon(x, y, corners):
    """Distance to a convex polygon about the origin with `corners` sides, one pointing up, inradius 1 at its sides' middles."""
    angle = np.arctan2(x, -y)
    sector = 2 * np.pi / corners
    return np.hypot(x, y) * np.cos(angle - sector * (np.floor(angle / sector) + 0.5)) - np.cos(sector / 2)


def _star(x, y):
    """Distance to a five-pointed star whose points lie on the unit circle."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    tip, dent = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge = dent - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    radius = np.hypot(x, y)
    return (radius * np.cos(angle) - tip[0]) * normal[0] + (radius * np.sin(angle) - tip[1]) * normal[1]


SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
    "triangle": lambda x, y: _polygon(x, y, 3),
    "star": _star,
}


@dataclass(frozen=True)
class Scene:
    """One clip: lengths in fractions of the picture's side, speed per frame."""

    shape: str
    color: str
    background: str
    x: float
    y: float
    size: float
    direction: str | None  # None: still
    speed: float = 0.02

    def caption(self) -> str:
        article = "an" if self.color[0] in "aeiou" else "a"
        doing = f" moving {self.direction}" if self.direction else ""
        return f"{article} {self.color} {self.shape}{doing} on a {self.background} background"


def render(scene: Scene, frames: int, side: int) -> np.ndarray:
    """uint8 (frames, side, side, 3); the shape passes its (x, y) in the middle of the clip."""
    grid = (np.arange(side) + 0.5) / side
    dx, dy = DIRECTIONS[scene.direction] if scene.direction else (0.0, 0.0)
    travel = (np.arange(frames) - (frames - 1) / 2) * scene.speed
    cx, cy = (scene.x + dx * travel)[:, None, None], (scene.y + dy * travel)[:, None, None]
    distance = SHAPES[scene.shape]((grid[None, None, :] - cx) / scene.size, (grid[None, :, None] - cy) / scene.size)  # f h w
    cover = np.clip(0.5 - distance * scene.size * side, 0, 1)[..., None]  # one pixel of soft edge
    color, ground = np.array(COLORS[scene.color], float), np.array(BACKGROUNDS[scene.background], float)
    return np.round(cover * color + (1 - cover) * ground).astype(np.uint8)


def random_scene(rng: np.random.Generator, direction: str | None = "any") -> Scene:
    """A scene drawn by `rng`; direction "any" draws that too."""
    if direction == "any":
        direction = str(rng.choice(list(DIRECTIONS)))
    return Scene(
        shape=str(rng.choice(list(SHAPES))),
        color=str(rng.choice(list(COLORS))),
        background=str(rng.choice(list(BACKGROUNDS))),
        x=rng.uniform(0.35, 0.65),
        y=rng.uniform(0.35, 0.65),
        size=rng.uniform(0.14, 0.22),
        direction=direction,
        speed=rng.uniform(0.012, 0.024),
    )
