"""What many devices cost: the all-reduce of a compiled update, weak scaling as far as this machine can say, and 8 and 64 GPUs on paper.

    python benchmarks/scale.py          # writes benchmarks/results/scale.json and .md

The compiled update is that of the embedded model on four forced CPU devices; its all-reduces are read from the program itself. Weak
scaling runs train.py on 1, 2, 4 and 8 forced devices with the same clips a device. On paper: time = operations / (peak × share) +
all-reduce, with the assumptions below, which no GPU here has confirmed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from anidiff_jax.shapes.demo import flags  # noqa: E402

RESULTS, WORK = HERE / "results", HERE / ".work" / "scale"
PEAK, SHARE = 989e12, 0.4  # an H100's dense bfloat16; the share of it that training of such networks reaches elsewhere
INSIDE, BETWEEN = 300e9, 45e9  # bytes a second and GPU that a ring reaches: NVLink 4; a network port of 400 Gb/s for each GPU
# TFLOP of an update's clip, from our count (benchmarks/ours.py): forward and backward of LoRA, of full; the forward alone
CLIP = {256: {"lora": 8.27, "full": 9.41, "forward": 4.11}, 512: {"lora": 35.7, "full": 40.6, "forward": 17.75}}
TRAINS = {"lora": 5.14e6, "full": 453.2e6}  # parameters
VIDEO_FRAMES = 300  # ten seconds; the cache keeps all of them, so that windows stay random

COUNT = """
import re, sys
from tests.test_cost import training
update, *given = training(sys.argv[1])
text = update.lower(*given).compile().as_text()
kinds = {"f32": 4, "bf16": 2, "s32": 4}
found = 0
for shapes in re.findall(r"= (.*?) all-reduce(?:-start)?\\(", text):
    for kind, dims in re.findall(r"(f32|bf16|s32)\\[([0-9,]*)\\]", shapes):
        size = 1
        for n in dims.split(","):
            size *= int(n or 1)
        found += size * kinds[kind]
import jax
print(found, sum(x.size for x in jax.tree.leaves(given[0].params)))
"""


def all_reduce(kind: str) -> tuple[int, int]:
    """(bytes that the compiled update reduces, parameters that train)"""
    flags = "--xla_force_host_platform_device_count=2"
    done = subprocess.run([sys.executable, "-c", COUNT, kind], stdout=subprocess.PIPE, text=True, check=True, cwd=HERE.parent,
                          env={**os.environ, "XLA_FLAGS": flags})  # fmt: skip
    reduced, count = done.stdout.split()[-2:]
    return int(reduced), int(count)


def weak_scaling(devices: int) -> float:
    """Seconds of an update with one clip a device and micro-batch, the median of a run."""
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "prompt.txt").write_text("a red circle\n")
    run = {"batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 20, "eval_steps": 1000, "output_dir": WORK / "runs",
           "validation_prompts_path": WORK / "prompt.txt", "num_inference_steps": 1, "latent_cache": WORK / "latents"}  # fmt: skip
    device_flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run([sys.executable, "train.py", *map(str, flags(run))], check=True, stdout=subprocess.PIPE, text=True,
                          cwd=HERE.parent, env={**os.environ, "XLA_FLAGS": device_flags})  # fmt: skip
    report = (Path(done.stdout.splitlines()[-1]).parent.parent / "report.md").read_text()
    return float(re.search(r"\| an update \| ([\d.]+) s", report)[1])


def on_paper() -> list[dict]:
    rows = []
    for size, kind in ((256, "lora"), (256, "full"), (512, "full")):
        for gpus in (1, 8, 64):
            for accumulated in (1, 16):
                clips = 1 if size == 512 else 4  # a GPU and micro-batch
                compute = accumulated * clips * (CLIP[size][kind] + CLIP[size]["forward"]) * 1e12 / (PEAK * SHARE)  # with checkpointing
                bandwidth = INSIDE if gpus <= 8 else BETWEEN
                reduce = 2 * (gpus - 1) / gpus * 4 * TRAINS[kind] / bandwidth if gpus > 1 else 0.0
                hours = 1e7 / (gpus * clips * accumulated) * (compute + reduce) / 3600
                rows.append({"size": size, "kind": kind, "gpus": gpus, "clips": clips, "accumulated": accumulated, "compute": compute,
                             "all_reduce": reduce, "share": reduce / (compute + reduce), "hours": hours})  # fmt: skip
    return rows


def as_markdown(result: dict) -> str:
    lines = ["| | parameters that train | bytes reduced an update |", "|---|---|---|"]
    lines += [f"| embedded model, {kind} | {count:,} | {reduced:,} |" for kind, (reduced, count) in result["all_reduce"].items()]
    lines += ["", "| devices | clips an update | seconds an update | clips a second |", "|---|---|---|---|"]
    lines += [f"| {n} | {n} | {s:.3f} | {int(n) / s:.2f} |" for n, s in result["weak_scaling"].items()]
    lines += ["", "| | GPUs | clips a GPU × micro-batches | computing | all-reduce | its share | 10 million clips |", "|---" * 7 + "|"]
    for r in result["on_paper"]:
        lines.append(
            f"| {r['kind']}, {r['size']}² | {r['gpus']} | {r['clips']} × {r['accumulated']} | {r['compute']:.2f} s "
            f"| {1000 * r['all_reduce']:.1f} ms | {100 * r['share']:.1f} % | {r['hours']:.0f} h |"
        )
    lines += ["", "| latent cache of 10 million videos | a video | all |", "|---|---|---|"]
    for size, each in result["cache"].items():
        lines.append(f"| {size}², {VIDEO_FRAMES} frames | {each / 1e6:.1f} MB | {each * 1e7 / 1e12:.0f} TB |")
    return "\n".join(lines) + "\n"


def main() -> None:
    frame = lambda size: 2 * 2 * 4 * (size // 8) ** 2  # mean and deviation, float16, 4 channels
    result = {
        "all_reduce": {kind: all_reduce(kind) for kind in ("lora", "full")},
        "weak_scaling": {str(n): weak_scaling(n) for n in (1, 2, 4, 8)},
        "on_paper": on_paper(),
        "cache": {str(size): VIDEO_FRAMES * frame(size) + 2 * 77 * 768 for size in (256, 512)},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scale.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "scale.md").write_text(as_markdown(result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
