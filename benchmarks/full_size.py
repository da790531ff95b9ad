"""A Stable Diffusion 1.5 with a v2 motion adapter of full size, random weights: what the benchmarks measure on.

Written once to benchmarks/.work/sd15 in diffusers layout (6.1 GB). No norm is one, no bias or projection zero, so that what two programs
compute can be compared.
"""

import itertools
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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


def make_model() -> Path:
    """Writes the model where it is not yet; returns its folder."""
    if not MODEL.exists():
        on_cpu("from benchmarks.full_size import write_model; write_model()")
    return MODEL


def on_cpu(code: str) -> None:
    """Runs it in a process of its own, which leaves a GPU alone."""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def write_model() -> None:
    from anidiff_jax.models.clip import CLIPTextModel, clip_config
    from anidiff_jax.models.config import fresh_motion_config, unet_config
    from anidiff_jax.models.init import draw, shapes
    from anidiff_jax.models.unet import UNet
    from anidiff_jax.models.vae import AutoencoderKL, vae_config
    from anidiff_jax.shapes.tiny_model import INDEX, SCHEDULER, WORDS
    from anidiff_jax.shapes.tokenizer import write_tokenizer
    from anidiff_jax.weights import files
    from anidiff_jax.weights.tree import flatten, is_buffer, is_motion, split, unflatten

    def leaf(name, shape):
        """What training starts from, and noise."""
        (x,) = map(np.array, draw({name: shape}, 0).values())
        if is_buffer(name):
            return x
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(x.shape, np.float32)
        return x + noise * np.float32(0.1 if x.ndim == 1 else 0.3 / np.sqrt(np.prod(x.shape[:-1])))

    def write(part):
        name, (tree, config, stem) = part
        (out / name).mkdir()
        files.save_json(config, out / name / "config.json")
        tree = flatten(tree)
        with ThreadPoolExecutor() as pool:  # numpy draws without Python's lock
            found = dict(zip(tree, pool.map(leaf, tree, tree.values()), strict=True))
        files.save(unflatten(found), out / name / f"{stem}.safetensors")
        print(f"wrote {name}", flush=True)

    motion = fresh_motion_config(UNET, heads=8, max_frames=32)
    motion_shapes, image_shapes = split(shapes(UNet(unet_config(UNET, motion))), is_motion)
    parts = {
        "unet": (image_shapes, UNET, "diffusion_pytorch_model"),
        "motion_adapter": (motion_shapes, motion.to_json(), "diffusion_pytorch_model"),
        "vae": (shapes(AutoencoderKL(vae_config(VAE))), VAE, "diffusion_pytorch_model"),
        "text_encoder": (shapes(CLIPTextModel(clip_config(TEXT))), TEXT, "model"),
    }
    with files.written_whole(MODEL) as out:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, parts.items()))
        write_tokenizer(out / "tokenizer", WORDS)
        (out / "scheduler").mkdir()
        files.save_json({**SCHEDULER, "prediction_type": "epsilon"}, out / "scheduler" / "scheduler_config.json")
        files.save_json(INDEX, out / "model_index.json")


@dataclass(frozen=True)
class Shape:
    """Of what is measured: pixels a side, frames, type."""

    size: int = 256
    frames: int = 16
    dtype: str = "float32"


def inputs(shape: Shape, batch: int = 1, texts: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(latents (batch, f, h, w, 4), text states (texts, 77, 768)), the same for both sides."""
    rng = np.random.default_rng(1)
    side = shape.size // 8
    return rng.standard_normal((batch, shape.frames, side, side, 4), np.float32), rng.standard_normal((texts, 77, 768), np.float32)


def clips(shape: Shape, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 frames (batch, f, H, W, 3), token ids (batch, 77)), what training gets that has no latent cache."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (batch, shape.frames, shape.size, shape.size, 3), np.uint8)
    return pixels, rng.integers(0, TEXT["vocab_size"], (batch, 77), np.int32)


def draws(shape: Shape) -> Path:
    """Where `ours.write_draws` puts what training draws for four clips: timesteps, noise, and the noise in the VAE's posterior."""
    return WORK / f"draws-{shape.size}-{shape.frames}.npz"


def training_cases(train: Callable) -> dict[str, Callable[[Shape], Any]]:
    """train(shape, kind, remat, batch, cached) as a case for each of lora and full, with and without gradient checkpointing, one clip and
    four, from latents and from pixels."""

    def name(kind, remat, batch, cached):
        words = ["train", kind, "checkpointing" if remat else "", str(batch) if batch > 1 else "", "" if cached else "uncached"]
        return "_".join(word for word in words if word)

    kinds = itertools.product(("lora", "full"), (True, False), (1, 4), (True, False))
    return {name(*how): partial(train, **dict(zip(("kind", "remat", "batch", "cached"), how, strict=True))) for how in kinds}
