"""Seconds and peak memory of converting motion modules of full size: a v2 adapter, 453.8M numbers of which 453.2M are weights, random.

    python benchmarks/conversion.py

Each conversion is one script of convert/ in a process of its own; its peak is what the system says of that process, and the same
script on the embedded model's small adapter says what Python and its libraries take. Needs PyTorch, for the .ckpt alone, and 11 GB
of disk while it runs. The table goes into benchmarks/results/conversion-cpu.json and .md.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from anidiff_jax.models.motion import sinusoid
from anidiff_jax.weights.base import EMBEDDED
from anidiff_jax.weights.original import original_names
from anidiff_jax.weights.tensors import Tensor, tensors_of, write_tensors

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "results", HERE / ".work" / "conversion"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Linux' own highest mark of the process's memory; that of getrusage would begin with the memory of the process that started it.
PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
WIDTHS, FRAMES = (320, 640, 1280, 1280), 32


def adapter_of_full_size(folder: Path) -> None:
    """A MotionAdapter folder of Stable Diffusion 1.5's widths."""
    shapes: dict[str, tuple[int, ...]] = {}

    def module(name: str, width: int) -> None:
        block = f"{name}.transformer_blocks.0"
        for norm in ("norm", "transformer_blocks.0.norm1", "transformer_blocks.0.norm2", "transformer_blocks.0.norm3"):
            shapes[f"{name}.{norm}.weight"] = shapes[f"{name}.{norm}.bias"] = (width,)
        for attention in ("attn1", "attn2"):
            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes[f"{block}.{attention}.{layer}.weight"] = (width, width)
            shapes[f"{block}.{attention}.to_out.0.bias"] = (width,)
        for layer in (f"{name}.proj_in", f"{name}.proj_out"):
            shapes[f"{layer}.weight"], shapes[f"{layer}.bias"] = (width, width), (width,)
        shapes[f"{block}.ff.net.0.proj.weight"], shapes[f"{block}.ff.net.0.proj.bias"] = (8 * width, width), (8 * width,)
        shapes[f"{block}.ff.net.2.weight"], shapes[f"{block}.ff.net.2.bias"] = (width, 4 * width), (width,)
        shapes[f"{block}.pos_embed.pe"] = (1, FRAMES, width)

    for i, width in enumerate(WIDTHS):
        for j in range(2):
            module(f"down_blocks.{i}.motion_modules.{j}", width)
        for j in range(3):
            module(f"up_blocks.{len(WIDTHS) - 1 - i}.motion_modules.{j}", width)
    module("mid_block.motion_modules.0", WIDTHS[-1])
    rng = np.random.default_rng(0)

    def tensor(key: str, shape: tuple[int, ...]) -> Tensor:
        if key.endswith(".pe"):
            return Tensor(shape, "float32", lambda: np.asarray(sinusoid(*shape[1:])))
        return Tensor(shape, "float32", lambda: rng.standard_normal(shape, np.float32))

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "MotionAdapter", "block_out_channels": WIDTHS}))
    write_tensors({key: tensor(key, shape) for key, shape in shapes.items()}, folder / WEIGHTS)


def as_checkpoint(folder: Path, path: Path) -> None:
    """The same in the original naming, as a pickle."""
    import torch

    read = tensors_of(folder / WEIGHTS)
    torch.save({name: torch.from_numpy(t.read().copy()) for key, t in read.items() for name in original_names(key)}, path)


def run(script: str, *words) -> tuple[float, float]:
    """(seconds, peak memory in GB) of a script in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, HERE.parent / "convert" / script, *words], check=True, stdout=subprocess.PIPE, text=True
    )
    return time.perf_counter() - start, int(done.stdout.split()[-1]) * 1024 / 1e9


def cases(adapter: Path, checkpoint: Path, out: Path) -> dict[str, tuple]:
    takes, gives = "--motion_adapter_id_or_path", "--output"
    return {
        "diffusers folder → Orbax": ("import_motion_adapter.py", takes, adapter, gives, out / "orbax"),
        "original .ckpt → Orbax": ("import_motion_adapter.py", takes, checkpoint, gives, out / "orbax2"),
        "Orbax → diffusers folder": ("export_motion_adapter.py", "--input", out / "orbax", gives, out / "back"),
        "Orbax → diffusers folder, float16": (
            "export_motion_adapter.py", "--input", out / "orbax", gives, out / "half", "--dtype", "float16",
        ),
        "diffusers folder → original file": (
            "export_motion_adapter.py", "--input", adapter, gives, out / "mm.safetensors", "--format", "original",
        ),
        "original .ckpt → diffusers folder": ("export_motion_adapter.py", "--input", checkpoint, gives, out / "back2"),
    }  # fmt: skip


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    adapter, small = WORK / "adapter", EMBEDDED / "motion_adapter"
    adapter_of_full_size(adapter)
    for made, folder in ((WORK / "mm.ckpt", adapter), (WORK / "small.ckpt", small)):
        as_checkpoint(folder, made)
    size = (adapter / WEIGHTS).stat().st_size / 1e9
    idle = {name: run(*words)[1] for name, words in cases(small, WORK / "small.ckpt", WORK / "small").items()}
    rows = []
    for name, words in cases(adapter, WORK / "mm.ckpt", WORK / "out").items():
        seconds, peak = run(*words)
        rows.append({"conversion": name, "seconds": round(seconds, 1), "peak GB": round(peak, 2), "idle GB": round(idle[name], 2),
                     "above idle / file": round((peak - idle[name]) / size, 2)})  # fmt: skip
        if name == "Orbax → diffusers folder":
            same = (WORK / "out" / "back" / WEIGHTS, adapter / WEIGHTS)
            before, after = map(tensors_of, same)
            assert all(np.array_equal(before[key].read(), after[key].read()) for key in after), "not the same bits"
    shutil.rmtree(WORK)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}"
    RESULTS.mkdir(exist_ok=True)
    said = {"machine": machine, "load": round(os.getloadavg()[0], 1), "file GB": round(size, 2), "cases": rows}
    (RESULTS / "conversion-cpu.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    lines = [f"# Converting motion modules of full size ({size:.2f} GB), on {machine} (load {said['load']} meanwhile)", ""]
    lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    (RESULTS / "conversion-cpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
