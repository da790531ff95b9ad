"""Does training work? The long evaluations of the embedded world, as tables: minutes to hours on 2 cores.

    make evaluate                                        # all of them
    python benchmarks/shapes.py --only stills adapter    # some

Each part writes benchmarks/results/shapes-<part>.json; all that exist go into benchmarks/results/shapes.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from anidiff_jax.shapes.demo import TRAINING, flags
from anidiff_jax.shapes.render import SHAPES

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "results", HERE / ".work" / "shapes"
EVALUATE = [sys.executable, "-m", "anidiff_jax.shapes.evaluate"]
FEWER_STEPS = ("--num_inference_steps", 15)  # of whole videos
FEWEST_STEPS = ("--num_inference_steps", 10)  # where many are compared with each other, as `make demo` does
ADAPTER = HERE.parent / "anidiff_jax" / "shapes" / "model" / "motion_adapter"


def evaluate(name: str, *options) -> dict:
    """The scores of one call of the evaluation."""
    folder = WORK / name
    subprocess.run([*EVALUATE, "--output", str(folder), *map(str, options)], check=True, cwd=HERE.parent)
    result = json.loads((folder / "scores.json").read_text())
    named = {
        k: Path(v).name if isinstance(v, str) else v for k, v in result["settings"].items() if k != "output"
    }  # no paths of this machine
    return {**result, "settings": named}


def lora(motion: str, clips: int) -> tuple[str, float]:
    """(checkpoint, seconds of training) of a LoRA on `clips` clips of one motion, as `make demo` trains it; kept for the next call."""
    kept = WORK / f"lora-{motion.replace(' ', '-')}-{clips}.json"
    if kept.exists():
        return tuple(json.loads(kept.read_text()))
    data = WORK / f"clips-{motion.replace(' ', '-')}-{clips}"
    words = ["-m", "anidiff_jax.shapes.clips", "--output", data, "--count", clips, "--motion", motion, "--seed", 1]
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=HERE.parent)
    start = time.perf_counter()
    given = ["--csv_path", data / "clips.csv", "--video_folder", data, "--latent_cache", f"{data}-latents", "--output_dir", WORK / "runs"]
    words = ["train.py", *given, *flags(TRAINING)]
    done = subprocess.run([sys.executable, *map(str, words)], check=True, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    result = done.stdout.splitlines()[-1], time.perf_counter() - start
    kept.write_text(json.dumps(result))
    return result


def stills() -> dict:
    return {"image model, stills": evaluate("stills", "--sample_n_frames", 1, "--videos", 200)}


def adapter() -> dict:
    return {
        "image model alone": evaluate("alone", "--motion_adapter_id_or_path", "none", *FEWER_STEPS),
        "with the shipped adapter": evaluate("adapter", *FEWER_STEPS),
    }


def taught() -> dict:
    """The taught motion before and after a LoRA; the same merged; and with the LoRA turned round."""
    checkpoint, seconds = lora("right", 50)
    things = ["--things", *SHAPES, *FEWEST_STEPS]
    result = {"shapes, before": evaluate("right-before", *things)}
    result[f"shapes, LoRA on 50 clips to the right, {seconds:.0f} s"] = evaluate("right-after", *things, "--ckpt_dir", checkpoint)
    result["the same, scale -1"] = evaluate("right-negative", *things, "--ckpt_dir", checkpoint, "--lora_scale", -1)
    merged = WORK / "right-merged"
    shutil.rmtree(merged, ignore_errors=True)
    merge = ["convert/export_motion_adapter.py", "--input", ADAPTER, "--lora", checkpoint, "--output", merged, "--dtype", "float32"]
    subprocess.run([sys.executable, *map(str, merge)], check=True, cwd=HERE.parent)
    result["the same, merged"] = evaluate("right-merged-scores", *things, "--motion_adapter_id_or_path", merged)
    return result


def few_clips() -> dict:
    """The paper's finding that 50 clips do and 5 collapse, tried here."""
    result = {}
    for clips in (5, 10, 20, 50):
        checkpoint, _ = lora("right", clips)
        result[f"shapes, LoRA on {clips} clips to the right"] = evaluate(
            f"clips-{clips}-scores", "--things", *SHAPES, *FEWEST_STEPS, "--ckpt_dir", checkpoint
        )
    return result


def curves() -> dict:
    """Scores and validation loss of the checkpoints that `anidiff_jax.shapes.build --work build` left of its motion rounds.

    Only of those rounds that trained on the last image model: the others' modules were made for another.
    """
    build, result = HERE.parent / "build", {}
    number = lambda path: int(path.name.split("-")[1])
    base, before = max(build.glob("base-*"), key=number), 0
    rounds = [stage for stage in build.glob("motion-*") if (stage / "stage.json").exists()]
    for stage in sorted(rounds, key=number):
        settings = json.loads(next(stage.glob("run/ad-*/config.json")).read_text())
        if Path(settings["model_id_or_path"]).name != base.name:
            continue
        runs = {int(path.name.split("-")[1]): path for path in stage.glob("run/ad-*/checkpoints/iter-*")}
        updates = int(json.loads((stage / "stage.json").read_text())["max_steps"])
        for step, path in sorted({**runs, updates: stage / "checkpoint"}.items()):
            name = f"adapter after {before + step} updates"
            options = ["--model_id_or_path", base, "--motion_adapter_id_or_path", path, "--videos", 60, "--num_inference_steps", 10]
            result[name] = {
                **evaluate(f"curve-{before + step}", *options),
                "updates": before + step,
                "validation_loss": validate(base, path),
            }
        before += updates
    plot(result)
    return result


def validate(base: Path, adapter: Path, clips: int = 24) -> list[float]:
    """Loss by range of timesteps, from the least noise to the most, on clips of combinations never trained on."""
    import jax
    import numpy as np

    from anidiff_jax import AnimateDiffPipeline
    from anidiff_jax.shapes.clips import scenes
    from anidiff_jax.shapes.render import render
    from anidiff_jax.text import encode_text
    from anidiff_jax.training.step import Task, encode_clips
    from anidiff_jax.training.validation import bucket_losses

    pipe = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter)
    networks, params = pipe.model.networks, pipe.model.params
    chosen = [pair for _, pair in zip(range(clips), scenes(99, unseen=True), strict=False)]
    task = Task(networks, pipe.schedule, seed=0)
    latents = encode_clips(
        task, params, np.stack([render(scene, 16, 64)[::2] for scene, _ in chosen]), jax.random.split(jax.random.key(0), clips)
    )
    text = encode_text(networks.text_encoder, params["text_encoder"], pipe.tokenize([caption for _, caption in chosen]))
    return [round(loss, 5) for loss in bucket_losses(task, params["unet"], {"unet": {}}, latents, text)]


def plot(result: dict) -> None:
    """docs/learning.png: scores, and validation loss by timestep, against updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (scores, losses) = plt.subplots(1, 2, figsize=(10, 4))
    updates = [r["updates"] for r in result.values()]
    for name in ("coherent", "identity", "along its front"):
        scores.plot(updates, [100 * r["right"][name] for r in result.values()], marker="o", label=name)
    scores.set(xlabel="updates", ylabel="share of videos, %", ylim=(0, 100), title="scores")
    buckets = len(next(iter(result.values()))["validation_loss"])
    for i in range(buckets):
        curve = [r["validation_loss"][i] for r in result.values()]
        label = f"timesteps {1000 * i // buckets}–{1000 * (i + 1) // buckets}"
        losses.plot(updates, [value / curve[0] for value in curve], marker="o", label=label)
    losses.set(xlabel="updates", ylabel="relative to the first", title="validation loss by timestep")
    for axes in (scores, losses):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "learning.png", dpi=110)


USUAL_STEPS = {"ddim": 25, "euler": 25, "euler_a": 25, "dpmpp_2m": 20, "dpmpp_2m_karras": 20, "dpmpp_sde": 25, "pndm": 50, "lms": 50,
               "heun": 13, "unipc": 15, "ddpm": 50}  # fmt: skip


def solvers() -> dict:
    """Every scheduler but lcm, which is for distilled models, at its usual number of steps, on the same prompts and noise."""
    each = {name: ("--scheduler", name, "--num_inference_steps", steps) for name, steps in USUAL_STEPS.items()}
    return {f"{name}, {how[-1]} steps": evaluate(f"solver-{name}", "--videos", 24, *how) for name, how in each.items()}


def long() -> dict:
    """64 frames in windows of 8, judged 8 at a time, against videos of 8 of the same prompts; and what memory 64 and 512 frames take."""
    few = ("--videos", 12, *FEWEST_STEPS)
    parts, apart = (*few, "--sample_n_frames", 64, "--part", 8), ("--context_schedule", "static", "--context_overlap", 0)
    result = {
        "8 frames": evaluate("long-8", *few),
        "64 frames in windows, 8 at a time": evaluate("long-64", *parts),
        "the same, free_noise mirror": evaluate("long-mirror", *parts, "--free_noise", "mirror"),
        "the same, windows static and apart": evaluate("long-apart", *parts, "--free_noise", "mirror", *apart),
    }
    for frames in (64, 512):
        words = ["sample.py", "--prompt", "a red circle moving right on a white background", "--verbose", "--output_path", WORK / "long"]
        words += ["--sample_n_frames", frames, "--num_inference_steps", 4]
        done = subprocess.run([sys.executable, *map(str, words)], check=True, cwd=HERE.parent, stderr=subprocess.PIPE, text=True)
        result["64 frames in windows, 8 at a time"][f"sample.py, {frames} frames, 4 steps"] = done.stderr.strip().splitlines()[-1]
    return result


PARTS = {"stills": stills, "solvers": solvers, "long": long, "adapter": adapter, "taught": taught, "few_clips": few_clips, "curves": curves}


def as_markdown(results: dict[str, dict]) -> str:
    columns = ["color", "background", "thing", "front", "coherent", "identity", "along its front"]
    lines = ["| | videos | " + " | ".join(columns) + " | going right | motion degree |", "|---" * (len(columns) + 4) + "|"]
    for name, r in results.items():
        cells = [f"{100 * r['right'][c]:.0f} %" if c in r["right"] else "–" for c in columns]
        right = f"{100 * r['motions'].get('right', 0) / r['videos']:.0f} %" if "motions" in r else "–"
        lines.append(f"| {name} | {r['videos']} | {' | '.join(cells)} | {right} | {r['motion_degree']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    for part in args.only:
        (RESULTS / f"shapes-{part}.json").write_text(json.dumps(PARTS[part](), indent=2) + "\n")
    found = [json.loads(path.read_text()) for part in PARTS if (path := RESULTS / f"shapes-{part}.json").exists()]
    text = f"{os.cpu_count()} cores; `python benchmarks/shapes.py`\n\n" + as_markdown({k: v for r in found for k, v in r.items()})
    (RESULTS / "shapes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
