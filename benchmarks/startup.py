"""How long it takes until there is a first video: of the tiny model, with nothing compiled before and with all of it, and in PyTorch.

    python benchmarks/startup.py           # a few minutes; needs pip install -e '.[test]'

Every figure is of a process of its own, from its start to its end; the sides alternate. Results in benchmarks/results/startup-<device>.json
and .md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.run import RESULTS, has_gpu, machine  # noqa: E402

PROMPT = "a red circle on a white background"
THEIRS = """
import sys, torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from diffusers.utils import export_to_gif
folder, out = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
adapter = MotionAdapter.from_pretrained(folder + "/motion_adapter", torch_dtype=torch.float32)
pipe = AnimateDiffPipeline.from_pretrained(folder, motion_adapter=adapter, torch_dtype=torch.float32).to(device)
video = pipe("a red circle on a white background", num_frames=8, height=64, width=64, guidance_scale=5.0, num_inference_steps=25)
export_to_gif(video.frames[0], out)
"""


def seconds(*words, cache: Path | None = None) -> float:
    """Of a process, from its start to its end."""
    environment = {**os.environ, **({"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {})}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} if cache else {}
    begun = time.perf_counter()
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=HERE.parent, env=environment, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from anidiff_jax.weights.base import EMBEDDED

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sample = ("sample.py", "--prompt", PROMPT, "--output_path", f"{folder}/out")
        for i in range(args.rounds):
            cache = Path(folder) / f"cache-{i}"
            cases = {
                "sample.py --help": lambda: seconds("sample.py", "--help"),
                "train.py --help": lambda: seconds("train.py", "--help"),
                "first GIF, nothing compiled before": lambda cache=cache: seconds(*sample, cache=cache),
                "first GIF, all compiled before": lambda cache=cache: seconds(*sample, cache=cache),
                "PyTorch diffusers, the same GIF": lambda i=i: seconds("-c", THEIRS, EMBEDDED, f"{folder}/{i}.gif"),
            }
            for name, case in cases.items():
                found.setdefault(name, []).append(case())
                print(f"{name}: {found[name][-1]:.2f} s", flush=True)
    result = {"machine": machine(), "load": round(os.getloadavg()[0], 1), "seconds": found}
    suite = "gpu" if has_gpu() else "cpu"
    lines = [
        f"{machine()}; `python benchmarks/startup.py`; 8 frames of 64², 25 steps",
        "",
        "| | seconds (median) | least–most |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {statistics.median(s):.2f} | {min(s):.2f}–{max(s):.2f} |" for name, s in found.items()]
    (RESULTS / f"startup-{suite}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"startup-{suite}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
