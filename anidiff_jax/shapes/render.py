"""Draws one thing moving over a background, anti-aliased. A scene says all of it: what is drawn, how it moves, how it is captioned.

Motion modules see no text, so a caption can only steer a motion that shows in a still: some things have a front (an arrow, a fish,
a car) and move where it points. An image model that knows words for places has, besides, what motion modules need to move a thing:
features that put it further left or up. How the others move no caption says; it is drawn at random, and is what a LoRA can change.
"""

from dataclasses import dataclass, replace

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "purple": (150, 50, 190),
    "orange": (245, 130, 25),
}
BACKGROUNDS = {  # colours of the top and of the bottom row
    "white": ((245, 245, 245), (245, 245, 245)),
    "black": ((20, 20, 20), (20, 20, 20)),
    "gray": ((128, 128, 128), (128, 128, 128)),
    "beige gradient": ((245, 235, 215), (190, 170, 145)),
    "teal gradient": ((190, 232, 232), (60, 125, 130)),
}
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
MOTIONS = ("still", "straight", "growing", "shrinking")  # of things without a front, in the shipped adapter
PLACED = "placed"  # a still picture, the thing anywhere, and half of the captions say where
HELD_OUT_MOTIONS = (*DIRECTIONS, "zoom in", "bouncing", "circling")  # for fine-tuning: everything moves so
OVERSAMPLING = 4  # samples a pixel and axis


def _star(x, y):
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    tip, dent = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge, radius = dent - tip, np.hypot(x, y)
    return edge[1] * (radius * np.cos(angle) - tip[0]) - edge[0] * radius * np.sin(angle) < 0


# Each says which points lie inside, in units of the thing's size, x to the right and y down; those with a front look to the right.
THINGS = {
    "circle": lambda x, y: np.hypot(x, y) < 0.9,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.8,
    "triangle": lambda x, y: (y < 0.7) & (np.abs(x) < 0.58 * (y + 0.95)),
    "star": _star,
    "arrow": lambda x, y: ((x > -1.1) & (x <= 0.05) & (np.abs(y) < 0.3)) | ((x > 0.05) & (np.abs(y) < 0.85 * (1.1 - x) / 1.05)),
    "fish": lambda x, y: (np.hypot((x - 0.25) / 0.85, y / 0.55) < 1) | ((x > -1.1) & (x < -0.3) & (np.abs(y) < 0.7 * (-0.25 - x) / 0.85)),
    "car": lambda x, y: (
        ((np.abs(x) < 1.1) & (y > -0.1) & (y < 0.45))
        | ((x > -1.0) & (x < 0.3 - 0.4 * (-0.1 - y)) & (y > -0.7) & (y <= 0))
        | (np.hypot(np.abs(x) - 0.6, y - 0.45) < 0.3)
    ),
}
FRONTS = {"arrow": ("right", "left", "down", "up"), "fish": ("right", "left"), "car": ("right", "left")}
SHAPES = tuple(name for name in THINGS if name not in FRONTS)
VERBS = {"arrow": "pointing", "fish": "swimming", "car": "driving"}


@dataclass(frozen=True)
class Scene:
    """One clip. Lengths are fractions of the picture's side, rates are per frame; x, y and size hold in the middle of the clip."""

    thing: str
    color: str
    background: str
    front: str | None = None  # the direction in which a thing of FRONTS looks
    x: float = 0.5
    y: float = 0.5
    size: float = 0.24
    velocity: tuple[float, float] = (0.0, 0.0)
    growth: float = 0.0  # logarithmic
    zoom: float = 0.0  # logarithmic, of the whole picture about its centre
    bounce: float = 0.0  # height of a ball's jumps, one in BEAT frames
    circle: float = 0.0  # radius of a circle run through once in BEAT frames
    phase: float = 0.0  # of the jumps or the circle, in turns
    told: bool = False  # the caption says where it is

    @property
    def place(self) -> tuple[int, int]:
        """(-1 left, 0, 1 right; -1 up, 0, 1 down): in which third of the picture it is."""
        return int(self.x > 0.6) - int(self.x < 0.4), int(self.y > 0.6) - int(self.y < 0.4)

    def caption(self, wording: int = 0, words: tuple[str, ...] = ()) -> str:
        """What a still of it shows, in one of WORDINGS (or of `words`), never more; "up left: " in front where that is told."""
        pointing = f" {VERBS[self.thing]} {self.front}" if self.front else ""
        wordings = words or WORDINGS
        across, along = self.place
        where = " ".join(word for word in (("", "down", "up")[along], ("", "right", "left")[across]) if word and self.told)
        return (f"{where}: " if where else "") + wordings[wording % len(wordings)].format(
            a="an" if self.color[0] in "aeiou" else "a",
            color=self.color,
            thing=self.thing,
            pointing=pointing,
            background=self.background,
        )


BEAT = 12
WORDINGS = (
    "{a} {color} {thing}{pointing} on a {background} background",
    "{a} {color} {thing}{pointing}, {background} background",
    "{color} {thing}{pointing} over {background}",
    "there is {a} {color} {thing}{pointing} on {background}",
    "a {thing} in {color}{pointing} in front of a {background} background",
    "A {background} background with {a} {color} {thing}{pointing}",
)
HELD_OUT_WORDINGS = (
    "a video of {a} {color} {thing}{pointing}, the background is {background}",
    "on a {background} background there is a {color} {thing}{pointing}",
    "one {color} {thing}{pointing} in front of {background}",
)


def held_out(scene: Scene) -> bool:
    """Whether training never shows this combination of thing, colour and background: one in ten, kept for evaluation."""
    places = list(THINGS).index(scene.thing), list(COLORS).index(scene.color), list(BACKGROUNDS).index(scene.background)
    return (places[0] + 3 * places[1] + 7 * places[2]) % 10 == 4


def render(scene: Scene, frames: int, side: int) -> np.ndarray:
    """uint8 (frames, side, side, 3)."""
    return np.stack([_frame(scene, i - (frames - 1) / 2, side) for i in range(frames)])


def _frame(scene: Scene, time: float, side: int) -> np.ndarray:
    grid = (np.arange(side * OVERSAMPLING) + 0.5) / (side * OVERSAMPLING)
    grid = 0.5 + (grid - 0.5) * np.exp(-scene.zoom * time)  # zooming in shows an ever smaller crop
    turn = 2 * np.pi * (time / BEAT + scene.phase)
    x = scene.x + scene.velocity[0] * time + scene.circle * np.cos(turn)
    y = scene.y + scene.velocity[1] * time + scene.circle * np.sin(turn) - scene.bounce * (abs(np.sin(turn / 2)) - 0.5)
    size = scene.size * np.exp(scene.growth * time)
    cover = outline(scene.thing, scene.front, (grid[None, :] - x) / size, (grid[:, None] - y) / size)
    cover = cover.reshape(side, OVERSAMPLING, side, OVERSAMPLING).mean((1, 3))[..., None]
    row = np.clip(grid.reshape(side, OVERSAMPLING).mean(1), 0, 1)[:, None, None]
    return np.round(cover * COLORS[scene.color] + (1 - cover) * ground(scene.background, row)).astype(np.uint8)


def outline(thing: str, front: str | None, x, y):
    """Which points lie inside the thing, (x, y) measured from its middle in units of its size, y down."""
    dx, dy = DIRECTIONS[front or "right"]
    if front in ("up", "down"):
        return THINGS[thing](dx * x + dy * y, dx * y - dy * x)
    return THINGS[thing](dx * x, y)


def ground(background: str, row):
    """The background's colour at heights `row` (…, 1) from 0, the top, to 1: (…, 3)."""
    top, bottom = np.array(BACKGROUNDS[background], float)
    return top + (bottom - top) * row


def random_scene(rng: np.random.Generator, motion: str = "own") -> Scene:
    """A scene drawn by `rng`. Motion "own": along the front, or one of MOTIONS; else one of MOTIONS or of HELD_OUT_MOTIONS, or PLACED."""
    pick = lambda options: str(rng.choice(list(options)))
    thing = pick(THINGS)
    scene = Scene(
        thing=thing,
        color=pick(COLORS),
        background=pick(BACKGROUNDS),
        front=pick(FRONTS[thing]) if thing in FRONTS else None,
        x=rng.uniform(0.42, 0.58),
        y=rng.uniform(0.42, 0.58),
        size=rng.uniform(0.2, 0.28),
    )
    if motion == PLACED:
        x, y = rng.uniform(0.14, 0.86, 2)
        return replace(scene, x=x, y=y, size=float(np.exp(rng.uniform(*np.log((0.13, 0.34))))), told=bool(rng.random() < 0.7))
    speed, growth = rng.uniform(0.018, 0.03), rng.uniform(0.03, 0.055)
    if motion == "own":
        motion = scene.front or str(rng.choice(MOTIONS, p=(0.04, 0.6, 0.18, 0.18)))
    if motion == "straight":
        angle = rng.uniform(0, 2 * np.pi)
        return replace(scene, velocity=(speed * np.cos(angle), speed * np.sin(angle)))
    if motion in DIRECTIONS:
        dx, dy = DIRECTIONS[motion]
        across = rng.uniform(-0.2, 0.2)  # it runs along any line, not through the middle only
        return replace(scene, velocity=(speed * dx, speed * dy), x=scene.x + across * abs(dy), y=scene.y + across * abs(dx))
    if motion in ("growing", "shrinking", "still"):
        x, y = rng.uniform(0.35, 0.65, 2)
        rate = {"growing": growth, "shrinking": -growth, "still": 0.0}[motion]
        return replace(scene, growth=rate, size=rng.uniform(0.16, 0.22) if rate else scene.size, x=x, y=y)
    if motion == "zoom in":
        return replace(scene, zoom=growth, x=rng.uniform(0.35, 0.65), y=rng.uniform(0.35, 0.65), size=rng.uniform(0.14, 0.2))
    if motion == "bouncing":
        return replace(scene, bounce=rng.uniform(0.2, 0.3), phase=rng.uniform(0, 1), x=rng.uniform(0.35, 0.65))
    return replace(scene, circle=rng.uniform(0.12, 0.18), phase=rng.uniform(0, 1))
