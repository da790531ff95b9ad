"""The last page of a run, `report.md`: what it cost, its curves, its samples in time order, its settings."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from anidiff_jax.config import TrainConfig
from anidiff_jax.models.flops import count_flops
from anidiff_jax.models.unet import UNet
from anidiff_jax.progress import peak_memory
from anidiff_jax.training.runs import best_of, data_of, read_log
from anidiff_jax.training.step import Task, denoising_loss
from anidiff_jax.weights.tree import Tree

SMOOTH = 20  # updates


def flops_of_update(task: Task, trained: Tree, frozen: dict[str, Tree], config: TrainConfig, clips: int) -> int:
    """Of the UNet, forward and backward, as the model needs them: what gradient checkpointing repeats does not count."""
    settings = replace(task.networks.unet.settings, fast=False, remat=False)
    task = replace(task, networks=replace(task.networks, unet=UNet(task.networks.unet.config, settings)))
    vae, unet, text = task.networks.vae.config, task.networks.unet.config, task.networks.text_encoder.config
    h, w = config.height // vae.factor, config.width // vae.factor
    shape = jax.ShapeDtypeStruct
    latents = shape((1, config.sample_n_frames, h, w, vae.latent_channels), jnp.float32)
    inputs = (latents, shape((1, text.max_length, unet.cross_attention_dim), jnp.float32), shape((1,), jax.random.key(0).dtype))
    loss = lambda trained, unet, *inputs: denoising_loss(trained, {"unet": unet}, task, *inputs)
    return clips * count_flops(jax.grad(loss), trained, frozen["unet"], *inputs)


def cost_of(entries: list[dict[str, Any]], flops: int, waited: float) -> dict[str, Any]:
    """Figures of a run from its log's updates: the first one compiled, the median stands for the others."""
    memory, whose = peak_memory()
    if not entries:
        return {f"peak memory of {whose}": f"{memory:.2f} GB"}
    seconds = [entry["seconds"] for entry in entries]
    usual = statistics.median(seconds[1:] or seconds)
    clips = entries[-1]["clips_per_second"] * seconds[-1]
    lost = sum(not math.isfinite(entry.get("grad_norm", 0.0)) for entry in entries)
    return {
        "updates": f"{len(entries)}, {lost} of them left out: their gradient was not finite" if lost else len(entries),
        "compiling": f"{max(0.0, seconds[0] - usual):.1f} s",
        "an update": f"{usual:.3f} s (median)",
        "clips": f"{clips / usual:.2f} a second",
        "UNet": f"{flops / 1e12:.3f} TFLOP an update, {flops / usual / 1e12:.3f} TFLOP/s",
        "waiting for data": f"{waited:.1f} s in all, partly while the devices worked",
        "all updates": f"{sum(seconds):.0f} s",
        f"peak memory of {whose}": f"{memory:.2f} GB",
    }


def write_report(run: Path, config: TrainConfig, cost: dict[str, Any]) -> Path:
    """Writes report.md and the picture of its curves into the run's folder."""
    entries = read_log(run)
    draw_curves(entries, run / "curves.png")
    lines = [f"# {run.name}", "", "![loss and scores against updates](curves.png)", "", "## Cost", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in cost.items()]
    if data := data_of(run):
        lines += ["", "## Data", "", *data]
    if best := best_of(run):
        lines += ["", f"Lowest validation loss: {best['validation_loss']:.5f} at update {best['step']}."]
    lines += ["", "## Samples", ""]
    folders = sorted(run.glob("samples/iter-*"), key=lambda folder: int(folder.name[5:]))
    lines += [f"### Update {folder.name[5:]}\n\n![samples](samples/{folder.name}/sheet.png)\n" for folder in folders]
    settings = {name: value for name, value in config.to_json().items() if name != "given"}
    lines += ["## Settings", "", "| argument | value | |", "|---|---|---|"]
    lines += [f"| {name} | {value} | {'given' if name in config.given else ''} |" for name, value in settings.items()]
    part = run / ".report.md.part"
    part.write_text("\n".join([*lines, ""]), encoding="utf-8")
    part.replace(run / "report.md")
    return run / "report.md"


def draw_curves(entries: list[dict[str, Any]], path: Path) -> None:
    """Training loss (smoothed), validation loss by bucket, and scores, each against updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    updates = [entry for entry in entries if "loss" in entry]
    seen = [entry for entry in entries if "loss" not in entry]
    names = sorted({name for entry in seen for name in entry} - {"step"})
    losses, scores = [n for n in names if n.startswith("validation_loss")], [n for n in names if not n.startswith("validation_loss")]
    panels = ["training loss", *(["validation loss"] if losses else []), *(["scores of samples"] if scores else [])]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, title in zip(axes[0], panels, strict=True):
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    steps, values = [e["step"] for e in updates], [e["loss"] for e in updates]
    finite = [[v for v in values[max(0, i - SMOOTH + 1) : i + 1] if math.isfinite(v)] for i in range(len(values))]
    means = [statistics.fmean(some) if some else math.nan for some in finite]
    axes[0][0].plot(steps, values, color="tab:blue", alpha=0.25)
    axes[0][0].plot(steps, means, color="tab:blue", label=f"mean of {SMOOTH}")
    axes[0][0].legend()
    for axis, chosen in zip(axes[0][1:], [group for group in (losses, scores) if group], strict=True):
        for name in chosen:
            points = [(e["step"], e[name]) for e in seen if name in e]
            label = {"validation_loss": "mean"}.get(name, name.removeprefix("validation_loss_").replace("_", " "))
            axis.plot(*zip(*points, strict=True), marker=".", label=f"bucket {label}" if label.isdecimal() else label)
        axis.legend(fontsize="small")
    part = path.with_name(f".{path.name}")
    figure.savefig(part, dpi=100)
    plt.close(figure)
    part.replace(path)
