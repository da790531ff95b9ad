"""Memory and seconds of a training update, of the embedded model and of one of full size (SD 1.5 with a v2 adapter, random weights).

    python benchmarks/training.py                  # all cases; on 2 CPU cores the full-size ones take a quarter of an hour
    python benchmarks/training.py --only tiny      # those whose name begins so

Each case is a run of train.py in a process of its own; what its report says of its cost goes into
benchmarks/results/training-<device>.json and .md. The full-size model is that of benchmarks/full_size.py.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.shapes.demo import flags

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "results", HERE / ".work"
MODEL = WORK / "sd15"
TINY = {"batch_size": 4, "max_steps": 30}
SIZE = {
    "model_id_or_path": MODEL, "motion_adapter_id_or_path": MODEL / "motion_adapter", "sample_size": 256, "sample_n_frames": 16,
    "batch_size": 1, "max_steps": 3, "sample_stride": 1, "num_inference_steps": 1,
}  # fmt: skip
CASES: dict[str, dict] = {
    "tiny, LoRA": TINY,
    "tiny, full": {**TINY, "sft_type": "full"},
    "full size, LoRA, gradient checkpointing": {**SIZE, "gradient_checkpointing": True},
    "full size, full, gradient checkpointing": {**SIZE, "gradient_checkpointing": True, "sft_type": "full"},
}
GPU_CASES = {
    "full size, LoRA": SIZE,
    "full size, full": {**SIZE, "sft_type": "full"},
    "full size, LoRA, 4 clips": {**SIZE, "batch_size": 4, "max_steps": 20},
}


def measure(name: str, settings: dict) -> dict[str, str]:
    """The table of costs in the report of one run: {what: how much}; with the load, as a machine that works for others is slower."""
    clips = WORK / "training-clips"
    if not clips.exists():
        write_clips(clips, 16)
    run = {"csv_path": clips / "clips.csv", "video_folder": clips, "output_dir": WORK / "training", "eval_steps": 1000,
           "gradient_accumulation_steps": 1, "validation_prompts_path": WORK / "prompt.txt"}  # fmt: skip
    (WORK / "prompt.txt").write_text("a red circle on a white background\n")
    words = [sys.executable, "train.py", *map(str, flags({**run, **settings}))]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    report = (Path(done.stdout.splitlines()[-1]).parent.parent / "report.md").read_text()
    cost = report.split("## Cost")[1].split("\n## ")[0]
    figures = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", cost, re.MULTILINE))
    return {"case": name, **figures, "load of the machine": f"{os.getloadavg()[0]:.1f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name begins so")
    args = parser.parse_args()
    ask = "import jax; device = jax.devices()[0]; print(device.platform, device.device_kind, sep='\\n')"  # and lets go of a GPU's memory
    where, kind = subprocess.run([sys.executable, "-c", ask], check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")[:2]
    cases = {**CASES, **(GPU_CASES if where == "gpu" else {})}
    cases = {name: settings for name, settings in cases.items() if name.startswith(args.only)}
    if not MODEL.exists() and any("model_id_or_path" in settings for settings in cases.values()):
        subprocess.run([sys.executable, "-c", "import benchmarks.full_size as b; b.make_model()"], cwd=HERE.parent, check=True)
    rows = [measure(name, settings) for name, settings in cases.items()]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{kind}, {os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}, jax {version('jax')}"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"training-{where}.json"
    kept = json.loads(path.read_text())["cases"] if path.exists() else []
    rows = [row for row in kept if row["case"] not in {row["case"] for row in rows}] + rows
    path.write_text(json.dumps({"machine": machine, "cases": rows}, indent=2) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# An update of training, on {machine}", "", "`python benchmarks/training.py`", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.get(key, "") for key in columns) + " |" for row in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
