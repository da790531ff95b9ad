"""Samples prompts of the embedded world, scores the videos from their frames alone, and writes a table and a contact sheet.

    python -m anidiff_jax.shapes.evaluate --output evaluation                          # the shipped model: 100 videos
    python -m anidiff_jax.shapes.evaluate --output stills --sample_n_frames 1          # its image model
    python -m anidiff_jax.shapes.evaluate --output lora --ckpt_dir demo/runs/ad-…/checkpoints/iter-150

Prompts are worded as training never words them, and half show combinations that training never shows. Writes scores.json, scores.md,
sheet.png and grid.gif.
"""

import argparse
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from anidiff_jax.scores import general_scores
from anidiff_jax.shapes.clips import scenes
from anidiff_jax.shapes.render import HELD_OUT_WORDINGS, THINGS, Scene
from anidiff_jax.shapes.scores import judge, read

log = logging.getLogger(__name__)
SETTINGS = ("num_inference_steps", "guidance_scale", "scheduler", "context_overlap", "context_schedule", "free_noise")
STILL = ("color", "background", "thing", "front")


def prompts(count: int, seed: int = 1, things: Sequence[str] | None = None) -> list[tuple[Scene, str]]:
    """(scene, prompt): half of them combinations of thing, colour and background that training leaves out."""
    pools = [scenes(seed + 10_000, unseen=unseen, things=things or tuple(THINGS)) for unseen in (True, False)]
    drawn = chain.from_iterable(zip(*pools, strict=False))
    return [(scene, scene.caption(i // 2, HELD_OUT_WORDINGS)) for i, (scene, _) in zip(range(count), drawn, strict=False)]


def evaluate(pipeline, asked: Sequence[tuple[Scene, str]], seed: int = 0, **settings) -> tuple[list[np.ndarray], dict]:
    """(videos, table): each prompt sampled with a seed of its own. Table: share right, number asked, and counts of motions seen."""
    videos = [pipeline(prompt, seed=seed + i, **settings)[0] for i, (_, prompt) in enumerate(asked)]
    return videos, table(videos, [scene for scene, _ in asked])


def table(videos: Sequence[np.ndarray], asked: Sequence[Scene]) -> dict:
    """The scores of videos, each against the scene that was asked for."""
    readings = [read(video) for video in videos]
    answers = [judge(seen, scene) for seen, scene in zip(readings, asked, strict=True)]
    result: dict = {"videos": len(videos), "right": {}, "asked": {}}
    for name in answers[0]:
        given = [bool(a[name]) for a in answers if a[name] is not None]
        if given and (len(videos[0]) > 1 or name in STILL):
            result["right"][name], result["asked"][name] = round(float(np.mean(given)), 4), len(given)
    if len(videos[0]) > 1:
        result["motions"] = dict(Counter(seen.motion for seen in readings).most_common())
    general = [general_scores(video) for video in videos]
    return {**result, **{name: round(float(np.mean([g[name] for g in general])), 4) for name in general[0]}}


def as_markdown(result: dict) -> str:
    lines = ["| | right | of |", "|---|---|---|"]
    lines += [f"| {name} | {100 * share:.0f} % | {result['asked'][name]} |" for name, share in result["right"].items()]
    for motion, count in result.get("motions", {}).items():
        lines.append(f"| seen: {motion} | {100 * count / result['videos']:.0f} % | {result['videos']} |")
    for name in ("temporal_flicker", "motion_degree"):
        lines.append(f"| {name.replace('_', ' ')} | {result[name]:.3f} | {result['videos']} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, result: dict, videos, labels: Sequence[str], most: int = 24) -> None:
    """scores.json, scores.md, and the first videos as sheet.png and grid.gif."""
    from anidiff_jax.sheets import contact_sheet, grid_gif

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "scores.md").write_text(as_markdown(result))
    contact_sheet(videos[:most], labels[:most], folder / "sheet.png")
    grid_gif(videos[:most], folder / "grid.gif", columns=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model_id_or_path", help="base model; none = the embedded one")
    parser.add_argument("--motion_adapter_id_or_path", help='motion adapter; not given = the embedded one; "none" = the image model alone')
    parser.add_argument("--ckpt_dir", help="LoRA checkpoint")
    parser.add_argument("--lora_scale", type=float, default=1.0)
    parser.add_argument("--things", nargs="*", choices=list(THINGS), metavar="THING", help="only these things")
    parser.add_argument("--videos", type=int, default=100)
    parser.add_argument("--sample_n_frames", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument(
        "--part", type=int, help="judge parts of so many frames, each by itself: a long video leaves the picture and comes back"
    )
    parser.add_argument("--context_overlap", type=int, help="of long videos")
    parser.add_argument("--context_schedule", default="uniform", help="of long videos")
    parser.add_argument("--free_noise", default="shuffle", help="of long videos")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from anidiff_jax.parallel import set_up_jax
    from anidiff_jax.terminal import start_log

    set_up_jax()
    start_log()
    start = time.perf_counter()
    pipeline = load(args)
    asked = prompts(args.videos, things=args.things)
    settings = {name: getattr(args, name) for name in SETTINGS}
    videos, result = evaluate(pipeline, asked, args.seed, num_frames=args.sample_n_frames, height=64, width=64, **settings)
    if args.part:
        parts = [video[i : i + args.part] for video in videos for i in range(0, args.sample_n_frames, args.part)]
        result = {**table(parts, [scene for scene, _ in asked for _ in range(0, args.sample_n_frames, args.part)])}
    said = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    result = {**result, "settings": said, "seconds": round(time.perf_counter() - start)}
    write(args.output, result, videos, [prompt for _, prompt in asked])
    print(as_markdown(result))
    print(args.output / "sheet.png")


def load(args):
    from anidiff_jax.pipeline import AnimateDiffPipeline

    adapter = args.motion_adapter_id_or_path
    if args.sample_n_frames == 1 or adapter == "none":
        from anidiff_jax.weights.base import EMBEDDED

        pipeline = AnimateDiffPipeline.from_pretrained(args.model_id_or_path or EMBEDDED)
    else:
        pipeline = AnimateDiffPipeline.from_pretrained(args.model_id_or_path, motion_adapter=adapter)
    if args.ckpt_dir is not None:
        pipeline.load_lora(args.ckpt_dir, args.lora_scale)
    return pipeline


if __name__ == "__main__":
    main()
