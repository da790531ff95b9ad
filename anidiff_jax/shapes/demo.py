"""The whole line on the embedded model: teach it by LoRA that everything drifts to the right. Each step is a command to copy.

    python -m anidiff_jax.shapes.demo --output demo

Before, shapes move any way they like; the share that goes right is counted in samples before and after.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from anidiff_jax.shapes.render import SHAPES

MOTION = "right"
PROMPT = "a red circle on a white background"
ROOT = Path(__file__).parent.parent.parent
TRAINING = {"max_steps": 150, "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 3e-3, "lora_rank": 16,
            "min_timestep": 650, "eval_steps": 1000}  # fmt: skip


def run(*words) -> str:
    """Runs one command, shows it, and returns the last line that it printed."""
    print(f"\n$ {shlex.join(['python', *map(str, words)])}", flush=True)
    done = subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    print(done.stdout.strip(), flush=True)
    return done.stdout.strip().splitlines()[-1]


def flags(options: dict) -> list:
    """{"name": value} as a command line has it."""
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def share(folder: Path) -> float:
    """Of the videos that `evaluate` left its scores of, the share that moves as was taught."""
    result = json.loads((folder / "scores.json").read_text())
    return result["motions"].get(MOTION, 0) / result["videos"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for all that is made")
    parser.add_argument("--videos", type=int, default=16, help="samples to count before and after")
    parser.add_argument("--max_steps", type=int, default=TRAINING["max_steps"], help="updates of the LoRA")
    args = parser.parse_args()
    out, start = args.output.expanduser().resolve(), time.perf_counter()  # the steps run elsewhere
    measure = ["-m", "anidiff_jax.shapes.evaluate", "--videos", args.videos, "--num_inference_steps", 10, "--things", *SHAPES]

    csv = run("-m", "anidiff_jax.shapes.clips", "--output", out / "clips", "--count", 50, "--motion", MOTION)
    run(*measure, "--output", out / "before")
    data = ["--csv_path", csv, "--video_folder", out / "clips", "--latent_cache", out / "latents", "--output_dir", out / "runs"]
    training = time.perf_counter()
    checkpoint = run("train.py", *data, *flags({**TRAINING, "max_steps": args.max_steps}))
    training = time.perf_counter() - training
    run(*measure, "--output", out / "after", "--ckpt_dir", checkpoint)
    gif = run("sample.py", "--ckpt_dir", checkpoint, "--prompt", PROMPT, "--output_path", out / "generated", "--merge_lora", "true")
    run("convert/export_motion_adapter.py", "--input", f"{checkpoint}-merged", "--output", f"{checkpoint}-exported", "--dtype", "float16")

    before, after = share(out / "before"), share(out / "after")
    print(f"\nGoing {MOTION}: {before:.0%} of {args.videos} videos before, {after:.0%} after {training:.0f} s of training.")
    print(f"In {time.perf_counter() - start:.0f} s:")
    for name, path in (
        ("clips", out / "clips"),
        ("before", out / "before" / "grid.gif"),
        ("after", out / "after" / "grid.gif"),
        ("as pictures", f"{out / 'before' / 'sheet.png'}, {out / 'after' / 'sheet.png'}"),
        ("LoRA", checkpoint),
        ("video", gif),
        ("merged adapter", f"{checkpoint}-merged"),
        ("for diffusers", f"{checkpoint}-exported"),
    ):
        print(f"  {name:15s} {path}")


if __name__ == "__main__":
    main()
