"""One UNet forward of full-size SD 1.5 with a v2 motion adapter on this machine: ours and PyTorch diffusers, same weights and inputs.

    pip install -e '.[convert]'
    python benchmarks/unet_forward.py                      # 256² × 16 frames, fp32, two rounds, alternating
    python benchmarks/unet_forward.py --dtype bfloat16     # on a GPU, where there is one

Random weights are written once to benchmarks/.work/sd15 in diffusers layout (6.1 GB). Each side runs in a process of its own, so
that peak memory is its own. Writes benchmarks/results/unet_forward-<device>-<dtype>.json and .md.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WORK = HERE / ".work"
MODEL = WORK / "sd15"
UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "architectures": ["CLIPTextModel"], "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "intermediate_size": 3072, "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "vocab_size": 49408,
}  # fmt: skip


def make_model() -> None:
    """Writes the model, every parameter random: no norm of one, no bias or projection of zero."""
    import jax

    from anidiff_jax.models.clip import CLIPTextModel, clip_config
    from anidiff_jax.models.config import fresh_motion_config, unet_config
    from anidiff_jax.models.init import draw, shapes
    from anidiff_jax.models.unet import UNet
    from anidiff_jax.models.vae import AutoencoderKL, vae_config
    from anidiff_jax.shapes.tiny_model import INDEX, SCHEDULER, WORDS
    from anidiff_jax.shapes.tokenizer import write_tokenizer
    from anidiff_jax.weights import files
    from anidiff_jax.weights.tree import is_buffer, is_motion, split

    rng = np.random.default_rng(0)

    def random(tree):
        def leaf(path, x):
            name = ".".join(p.key for p in path)
            if is_buffer(name):
                return x
            return x + rng.standard_normal(x.shape, np.float32) * (0.1 if x.ndim == 1 else 0.3 / np.sqrt(np.prod(x.shape[:-1])))

        return jax.tree_util.tree_map_with_path(leaf, draw(tree, 0))

    motion = fresh_motion_config(UNET, heads=8, max_frames=32)
    motion_shapes, image_shapes = split(shapes(UNet(unet_config(UNET, motion))), is_motion)
    parts = {
        "unet": (image_shapes, UNET, "diffusion_pytorch_model"),
        "motion_adapter": (motion_shapes, motion.to_json(), "diffusion_pytorch_model"),
        "vae": (shapes(AutoencoderKL(vae_config(VAE))), VAE, "diffusion_pytorch_model"),
        "text_encoder": (shapes(CLIPTextModel(clip_config(TEXT))), TEXT, "model"),
    }
    with files.written_whole(MODEL) as out:
        for name, (tree, config, stem) in parts.items():
            print(f"writing {name}", flush=True)
            (out / name).mkdir()
            files.save_json(config, out / name / "config.json")
            files.save(random(tree), out / name / f"{stem}.safetensors")
        write_tokenizer(out / "tokenizer", WORDS)
        (out / "scheduler").mkdir()
        files.save_json({**SCHEDULER, "prediction_type": "epsilon"}, out / "scheduler" / "scheduler_config.json")
        files.save_json(INDEX, out / "model_index.json")


def inputs(frames: int, size: int):
    rng = np.random.default_rng(1)
    return rng.standard_normal((1, frames, size // 8, size // 8, 4), np.float32), rng.standard_normal((1, 77, 768), np.float32)


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def timed(run, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def run_ours(args) -> dict:
    import jax
    import jax.numpy as jnp

    from anidiff_jax.models.layers import Settings
    from anidiff_jax.parallel import set_up_jax
    from anidiff_jax.weights.base import load_model

    set_up_jax()
    jax.config.update("jax_enable_compilation_cache", False)
    idle, start = peak_gb(), time.perf_counter()
    model = load_model(MODEL, MODEL / "motion_adapter", settings=Settings(dtype=args.dtype), dtype=args.dtype)
    loaded = {"load_seconds": time.perf_counter() - start, "load_peak_gb": peak_gb() - idle}
    sample, text = inputs(args.frames, args.size)
    start = time.perf_counter()
    forward = jax.jit(model.networks.unet.apply).lower({"params": model.params["unet"]}, sample, jnp.array([500]), text).compile()
    compiled = time.perf_counter() - start
    output = []
    seconds = timed(
        lambda: output.append(np.asarray(forward({"params": model.params["unet"]}, sample, jnp.array([500]), text))), args.repeats
    )
    np.save(WORK / "ours.npy", output[0])
    device = jax.devices()[0]
    if device.platform != "cpu":
        loaded["device_peak_gb"] = device.memory_stats()["peak_bytes_in_use"] / 1e9
    versions = {"jax": jax.__version__, "device": "cpu" if device.platform == "cpu" else device.device_kind}
    return {**loaded, "compile_seconds": compiled, "seconds": seconds, "peak_gb": peak_gb(), "versions": versions}


def run_theirs(args) -> dict:
    import diffusers
    import torch
    from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel
    from transformers import CLIPTextModel

    idle, start = peak_gb(), time.perf_counter()
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=dtype)
    adapter = MotionAdapter.from_pretrained(MODEL / "motion_adapter", torch_dtype=dtype)
    unet = UNetMotionModel.from_unet2d(unet, adapter).eval().to(device)
    others = [
        AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=dtype).to(device),
        CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=dtype).to(device),
    ]
    loaded = {"load_seconds": time.perf_counter() - start, "load_peak_gb": peak_gb() - idle}
    sample, text = inputs(args.frames, args.size)
    x, t = torch.tensor(sample).permute(0, 4, 1, 2, 3).to(device, dtype), torch.tensor([500], device=device)  # b f h w c -> b c f h w
    e = torch.tensor(text).repeat_interleave(args.frames, 0).to(device, dtype)
    output = []
    with torch.inference_mode():
        seconds = timed(lambda: output.append(unet(x, t, e).sample.float().cpu()), args.repeats)
    np.save(WORK / "theirs.npy", output[0].permute(0, 2, 3, 4, 1).numpy())
    del others
    if device == "cuda":
        loaded["device_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {**loaded, "compile_seconds": 0.0, "seconds": seconds, "peak_gb": peak_gb(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=2, help="alternations of the two sides")
    parser.add_argument("--repeats", type=int, default=3, help="forwards a process; the first is a warm-up and not counted")
    parser.add_argument("--only", choices=["ours", "theirs"], help="run one side in this process and print its figures")
    args = parser.parse_args()
    if args.only:
        print(json.dumps({"ours": run_ours, "theirs": run_theirs}[args.only](args)))
        return
    if not MODEL.exists():
        subprocess.run([sys.executable, "-c", "import benchmarks.unet_forward as b; b.make_model()"], cwd=HERE.parent, check=True)

    rounds: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        for side in rounds:
            options = [f"--{name}={getattr(args, name)}" for name in ("frames", "size", "repeats", "dtype")]
            done = subprocess.run([sys.executable, __file__, "--only", side, *options], check=True, stdout=subprocess.PIPE, text=True)
            rounds[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, {k: v for k, v in rounds[side][-1].items() if k != "versions"}, flush=True)
    ours, theirs = np.load(WORK / "ours.npy"), np.load(WORK / "theirs.npy")
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())

    def summary(side):
        seconds = sorted(s for r in rounds[side] for s in r["seconds"][1:] or r["seconds"])
        best = {k: min(r[k] for r in rounds[side]) for k in ("load_seconds", "compile_seconds")}
        peaks = {k: max(r[k] for r in rounds[side]) for k in ("load_peak_gb", "peak_gb", "device_peak_gb") if k in rounds[side][0]}
        return {"seconds": float(np.median(seconds)), "spread": [seconds[0], seconds[-1]], **best, **peaks}

    result = {
        "what": f"UNet forward, SD 1.5 + v2 adapter, random weights, {args.dtype}, {args.size}² × {args.frames} frames",
        "command": "python benchmarks/unet_forward.py " + " ".join(sys.argv[1:]),
        "machine": {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version()},
        "versions": {**rounds["ours"][0]["versions"], **rounds["theirs"][0]["versions"]},
        "ours": summary("ours"),
        "theirs": summary("theirs"),
        "largest_difference_relative": difference,
    }
    result["ratio"] = result["theirs"]["seconds"] / result["ours"]["seconds"]
    (HERE / "results").mkdir(exist_ok=True)
    device = "cpu" if result["versions"]["device"] == "cpu" else "gpu"
    target, table = HERE / "results" / f"unet_forward-{device}-{args.dtype}", as_markdown(result)
    target.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    target.with_suffix(".md").write_text(table)
    print(table)


def processor() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def as_markdown(result: dict) -> str:
    lines = [
        f"{result['what']}; {result['machine']['cores']} cores, {result['machine']['processor']}; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        f"`{result['command'].strip()}`",
        "",
        "| | seconds (median) | least–most | peak memory | load | load peak | compile |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, name in (("ours", "anidiff-jax"), ("theirs", "PyTorch diffusers")):
        r = result[side]
        lines.append(
            f"| {name} | {r['seconds']:.3g} | {r['spread'][0]:.3g}–{r['spread'][1]:.3g} | {r.get('device_peak_gb', r['peak_gb']):.1f} GB "
            f"| {r['load_seconds']:.1f} s "
            f"| {r['load_peak_gb']:.1f} GB | {r['compile_seconds']:.1f} s |"
        )
    speed, difference = result["ratio"], result["largest_difference_relative"]
    return "\n".join([*lines, "", f"Speed {speed:.2f} × PyTorch's; largest difference {difference:.1e} of the largest output.", ""])


if __name__ == "__main__":
    main()
