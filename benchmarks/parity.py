"""How far our networks are from PyTorch's on this device, at full size: SD 1.5 with a v2 adapter, random weights in which nothing is zero.

    python benchmarks/parity.py             # 256² × 16 frames, float32 and bfloat16; some minutes on a GPU
    python benchmarks/parity.py --size 64 --frames 4 --dtypes float32  # on a CPU

Both sides run in float32 without TensorFloat-32 and in bfloat16, each in a process of its own, one after another: while XLA tries kernels
for float32 it takes tens of gigabytes for some of them, and leaves others none. PyTorch's float32 is what the others are compared with: in
bfloat16 no two programs agree to the last digit, so ours should be as far from it as PyTorch's own.
Text encoder, VAE, UNet, and the gradient of every motion parameter (its first 65,536 numbers), with gradient checkpointing, as an update
computes it.
Differences are norms: ‖ours − theirs‖ / ‖theirs‖, of gradients the median and the largest over all parameters.
Results in benchmarks/results/parity-<device>.json and .md. Needs pip install -e '.[test]'.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.full_size import MODEL, WORK, Shape, clips, inputs, make_model  # noqa: E402
from benchmarks.run import RESULTS, has_gpu, machine  # noqa: E402

FIRST = 65_536  # numbers of a parameter's gradient that are compared


def ours(shape: Shape) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    from anidiff_jax.models.unet import UNet
    from anidiff_jax.sampling import decode, encode
    from anidiff_jax.weights.tree import flatten, is_buffer, is_motion, merge, split
    from benchmarks import ours as side

    side.start()
    model, (x, text) = side.load(shape).model, inputs(shape)
    networks, params = model.networks, model.params
    pixels, ids = (given[0] for given in clips(shape, 1))
    found = {"text encoder": jax.jit(networks.text_encoder.apply)({"params": params["text_encoder"]}, ids[None])[0]}
    found["VAE encoder"] = encode(networks.vae, params["vae"], pixels[:4])
    found["VAE decoder"] = decode(networks.vae, params["vae"], x[0, :4])
    found["UNet"] = jax.jit(networks.unet.apply)({"params": params["unet"]}, x, jnp.array([500]), text)
    network = UNet(networks.unet.config, side.Settings(dtype=shape.dtype, remat=True))
    motion, image = split(params["unet"], lambda key: is_motion(key) and not is_buffer(key))
    motion = jax.tree.map(lambda x: x.astype(jnp.float32), motion)
    loss = lambda motion, image: jnp.vdot(
        network.apply({"params": merge(image, motion)}, x, jnp.array([500]), text).astype(jnp.float32), towards(shape)
    )
    gradients = flatten(jax.jit(jax.grad(loss))(motion, image))
    return {name: np.asarray(value, np.float32) for name, value in {**found, **{k: first(v) for k, v in gradients.items()}}.items()}


def theirs(shape: Shape) -> dict[str, np.ndarray]:
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    from anidiff_jax.weights.files import to_ours
    from benchmarks import theirs as side

    side.start()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    kind = {"torch_dtype": getattr(torch, shape.dtype)}
    numbers = lambda x, *order: x.detach().float().cpu().permute(*order).numpy()
    pixels, ids = (given[0] for given in clips(shape, 1))
    frames = (torch.tensor(pixels[:4]).permute(0, 3, 1, 2) / 127.5 - 1).to(side.DEVICE, kind["torch_dtype"])
    x, text = side.given(shape)
    found = {}
    with torch.inference_mode():
        encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder", **kind).to(side.DEVICE).eval()
        found["text encoder"] = numbers(encoder(torch.tensor(ids[None], dtype=torch.long, device=side.DEVICE)).last_hidden_state[0], 0, 1)
        vae = AutoencoderKL.from_pretrained(MODEL / "vae", **kind).to(side.DEVICE).eval()
        found["VAE encoder"] = numbers(vae.encode(frames).latent_dist.mean.float() * vae.config.scaling_factor, 0, 2, 3, 1)
        z = x[0, :, :4].transpose(0, 1) / vae.config.scaling_factor  # c f h w -> f c h w
        found["VAE decoder"] = numbers((vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1), 0, 2, 3, 1)
    unet = side.unet_of(shape)
    unet.requires_grad_(False)
    with torch.no_grad():
        found["UNet"] = numbers(unet(x, torch.tensor([500], device=side.DEVICE), text).sample, 0, 2, 3, 4, 1)
    motion = {name: p for name, p in unet.named_parameters() if "motion_modules" in name}
    for p in motion.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    unet.enable_gradient_checkpointing()
    unet.train()
    with torch.autocast(side.DEVICE, torch.bfloat16, enabled=shape.dtype == "bfloat16"):
        predicted = unet(x, torch.tensor([500], device=side.DEVICE), text).sample
    (predicted.float() * torch.tensor(towards(shape), device=side.DEVICE).permute(0, 4, 1, 2, 3)).sum().backward()
    found |= {name: first(to_ours(name, p.grad.float().cpu().numpy())) for name, p in motion.items()}
    return found


def towards(shape: Shape) -> np.ndarray:
    """What the prediction is multiplied with for the gradient."""
    side = shape.size // 8
    return np.random.default_rng(9).standard_normal((1, shape.frames, side, side, 4), np.float32)


def first(x):
    return x.ravel()[:FIRST]


def compared(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """{what: difference}; the parameters' gradients as two rows."""
    assert found.keys() == reference.keys(), found.keys() ^ reference.keys()
    far = {k: float(np.linalg.norm(found[k] - reference[k]) / np.linalg.norm(reference[k])) for k in reference}
    gradients = [value for name, value in far.items() if "motion_modules" in name]
    largest = max((name for name in far if "motion_modules" in name), key=far.__getitem__)
    print(f"the largest difference of {len(gradients)} gradients: {largest}, {far[largest]:.1e}", flush=True)
    rows = {name: value for name, value in far.items() if "motion_modules" not in name}
    return {**rows, "gradients, median": float(np.median(gradients)), "gradients, largest": max(gradients)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = lambda side, dtype: WORK / f"parity-{side}-{dtype}.npz"
    if args.side:
        (dtype,) = args.dtypes
        found = {"ours": ours, "theirs": theirs}[args.side](Shape(args.size, args.frames, dtype))
        np.savez(path(args.side, dtype), **found)
        return
    make_model()
    gpu = has_gpu()
    runs = [("theirs", dtype) for dtype in dict.fromkeys(["float32", *args.dtypes])] + [("ours", dtype) for dtype in args.dtypes]
    for side, dtype in runs:
        words = ["--side", side, "--dtypes", dtype, "--size", args.size, "--frames", args.frames]
        if subprocess.run([sys.executable, __file__, *map(str, words)], cwd=HERE.parent).returncode:
            sys.exit(f"failed: {side}, {dtype}")
    reference = dict(np.load(path("theirs", "float32")))
    rows = {}
    for side, dtype in runs:
        if (side, dtype) != ("theirs", "float32"):
            rows[f"{'ours' if side == 'ours' else 'PyTorch'}, {dtype}"] = compared(dict(np.load(path(side, dtype))), reference)
    result = {"machine": device(), "size": args.size, "frames": args.frames, "differences": rows}
    out = RESULTS / f"parity-{'gpu' if gpu else 'cpu'}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    out.with_suffix(".md").write_text(table(result))
    print(table(result))


def device() -> str:
    ask = "import jax, torch, diffusers; d = jax.devices()[0]; " + (
        "print(d.platform, d.device_kind, f'jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}', sep='|')"
    )
    said = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]
    platform, kind, versions = said.split("|")
    return f"{machine() if platform == 'cpu' else kind}; {versions}"


def table(result: dict) -> str:
    columns = result["differences"]
    command = f"python benchmarks/parity.py --size {result['size']} --frames {result['frames']}"
    lines = [f"{result['machine']}; {result['size']}² × {result['frames']} frames, full size; `{command}`", ""]
    lines += [f"| ‖x − y‖ / ‖y‖, y: PyTorch, float32 | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    lines += [f"| {what} | {' | '.join(f'{of[what]:.1e}' for of in columns.values())} |" for what in next(iter(columns.values()))]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
