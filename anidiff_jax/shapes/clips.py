"""Writes captioned clips as H.264 mp4 files and a csv in the reference's format (`name,contentUrl`).

python -m anidiff_jax.shapes.clips --output demo/clips --count 50 --motion right
"""

import argparse
import csv
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count as counting
from pathlib import Path

import numpy as np

from anidiff_jax.shapes.render import HELD_OUT_MOTIONS, MOTIONS, PLACED, THINGS, Scene, held_out, random_scene, render
from anidiff_jax.video import save_mp4

SIDE, FRAMES, FPS = 64, 24, 8


def scenes(seed: int, motion: str = "own", unseen: bool = False, things: Collection[str] = tuple(THINGS)) -> Iterator[tuple[Scene, str]]:
    """Endless (scene, caption), the same for the same seed; `unseen`: only combinations that training never shows, else only others."""
    for i in counting():
        rng = np.random.default_rng((seed, i))
        scene = random_scene(rng, motion)
        if held_out(scene) == unseen and scene.thing in things:
            yield scene, scene.caption(int(rng.integers(1 << 30)))


def write_clips(
    folder: Path, count: int, seed: int = 0, motion: str = "own", things: Collection[str] = tuple(THINGS), frames: int = FRAMES
) -> Path:
    """Renders `count` clips into `folder`, and a csv, whose path it returns. The same seed gives the same clips."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [next_scene for _, next_scene in zip(range(count), scenes(seed, motion, things=things), strict=False)]
    names = [f"{i:05d}-{scene.color}-{scene.thing}.mp4" for i, (scene, _) in enumerate(chosen)]
    with ThreadPoolExecutor(2) as pool:  # ffmpeg works in a process of its own
        list(pool.map(lambda name, item: save_mp4(render(item[0], frames, SIDE), folder / name, FPS, replace=True), names, chosen))
    path = folder / "clips.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", "contentUrl"))
        writer.writerows((caption, name) for name, (_, caption) in zip(names, chosen, strict=True))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the mp4 files and clips.csv")
    parser.add_argument("--count", type=int, default=50, help="number of clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--motion",
        choices=["own", *MOTIONS, *HELD_OUT_MOTIONS, PLACED],
        default="own",
        help="of all clips; own = as the shipped adapter learnt it",
    )
    parser.add_argument("--things", nargs="+", choices=list(THINGS), default=list(THINGS), help="what they show")
    parser.add_argument("--frames", type=int, default=FRAMES, help="of each clip")
    args = parser.parse_args()
    print(write_clips(args.output, args.count, args.seed, args.motion, args.things, args.frames))
