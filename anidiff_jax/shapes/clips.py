"""Writes captioned clips as H.264 mp4 files and a csv in the reference's format (`name,contentUrl`).

python -m anidiff_jax.shapes.clips --output demo/clips --count 50 --motion right
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from anidiff_jax.shapes.render import DIRECTIONS, random_scene, render
from anidiff_jax.video import save_mp4

SIDE, FRAMES, FPS = 64, 24, 8


def write_clips(folder: Path, count: int, seed: int = 0, motion: str | None = "any") -> Path:
    """Renders `count` clips into `folder`, and a csv, whose path it returns. The same seed gives the same clips."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        scene = random_scene(np.random.default_rng((seed, i)), motion)
        name = f"{i:05d}-{scene.color}-{scene.shape}.mp4"
        save_mp4(render(scene, FRAMES, SIDE), folder / name, FPS)
        rows.append((scene.caption(), name))
    path = folder / "clips.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", "contentUrl"))
        writer.writerows(rows)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the mp4 files and clips.csv")
    parser.add_argument("--count", type=int, default=50, help="number of clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--motion", choices=[*DIRECTIONS, "any", "still"], default="any", help="the motion of all clips")
    args = parser.parse_args()
    motion = None if args.motion == "still" else args.motion
    print(write_clips(args.output, args.count, args.seed, motion))
