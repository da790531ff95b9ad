"""The whole line on the embedded model: render clips, train a LoRA, sample a GIF, merge, export. Each step is a command to copy.

python -m anidiff_jax.shapes.demo --output demo
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "a red circle moving right on a white background"
ROOT = Path(__file__).parent.parent.parent


def run(*words) -> str:
    """Runs one command, shows it, and returns the last line that it printed."""
    print(f"\n$ {shlex.join(['python', *map(str, words)])}", flush=True)
    done = subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    print(done.stdout.strip(), flush=True)
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for all that is made")
    args = parser.parse_args()
    out, start = args.output, time.perf_counter()

    csv = run("-m", "anidiff_jax.shapes.clips", "--output", out / "clips", "--count", 50, "--motion", "right")
    training = ["--csv_path", csv, "--video_folder", out / "clips", "--output_dir", out / "runs", "--max_steps", 40, "--eval_steps", 20]
    checkpoint = run("train.py", *training, "--gradient_accumulation_steps", 4, "--learning_rate", 1e-3, "--num_inference_steps", 10)
    sampling = ["--ckpt_dir", checkpoint, "--prompt", PROMPT, "--output_path", out / "generated"]
    gif = run("sample.py", *sampling, "--merge_lora", "true")
    adapter = f"{checkpoint}-exported"
    run("convert/export_motion_adapter.py", "--input", f"{checkpoint}-merged", "--output", adapter, "--dtype", "float16")

    print(f"\nIn {time.perf_counter() - start:.0f} s:")
    for name, path in (
        ("clips", out / "clips"),
        ("LoRA", checkpoint),
        ("video", gif),
        ("merged adapter", f"{checkpoint}-merged"),
        ("for diffusers", adapter),
    ):
        print(f"  {name:15s} {path}")
    print("The embedded model's weights are random so far, so its video is noise; every step before and after it is the real one.")


if __name__ == "__main__":
    main()
