"""Writes a tiny Stable Diffusion model and motion adapter in diffusers layout, with freshly drawn weights.

python -m anidiff_jax.shapes.tiny_model --output anidiff_jax/shapes/model
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from anidiff_jax.models.clip import CLIPTextModel
from anidiff_jax.models.config import clip_config, fresh_motion_config, unet_config, vae_config
from anidiff_jax.models.init import draw, shapes
from anidiff_jax.models.unet import UNet
from anidiff_jax.models.vae import AutoencoderKL
from anidiff_jax.shapes.render import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES
from anidiff_jax.shapes.tokenizer import write_tokenizer
from anidiff_jax.weights import files
from anidiff_jax.weights.tree import flatten, is_motion, split

WORDS = [*COLORS, *SHAPES, *BACKGROUNDS, *DIRECTIONS, "a", "on", "an", "the", "background", "moving"]
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [32, 48],
    "cross_attention_dim": 32,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 24, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def write_tiny_model(folder: Path, seed: int = 0) -> None:
    """Writes the base model into `folder` and its motion adapter into `folder`/motion_adapter; weights in float16."""
    with files.written_whole(folder) as out:
        size = write_tokenizer(out / "tokenizer", WORDS)
        text = {**TEXT, "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
        motion = fresh_motion_config(UNET, heads=4, max_frames=32)
        parts = {
            "text_encoder": (CLIPTextModel(clip_config(text)), text, "model"),
            "vae": (AutoencoderKL(vae_config(VAE)), VAE, "diffusion_pytorch_model"),
            "unet": (UNet(unet_config(UNET, motion)), UNET, "diffusion_pytorch_model"),
        }
        for name, (network, config, stem) in parts.items():
            motion_params, params = split(draw(shapes(network), seed), is_motion)
            write_part(params, config, out / name, stem)
        rng = np.random.default_rng(seed)
        lively = lambda x: 0.1 * rng.standard_normal(x.shape, np.float32)  # a trained adapter's last projections are not zero
        motion_params = {k: lively(v) if k.endswith("proj_out.weight") else v for k, v in flatten(motion_params).items()}
        write_part(motion_params, motion.to_json(), out / "motion_adapter", "diffusion_pytorch_model")
        (out / "scheduler").mkdir()
        files.save_json(SCHEDULER, out / "scheduler" / "scheduler_config.json")
        files.save_json(INDEX, out / "model_index.json")


def write_part(params, config: dict[str, Any], folder: Path, stem: str) -> None:
    folder.mkdir(exist_ok=True)
    files.save_json(config, folder / "config.json")
    files.save(jax.tree.map(lambda x: x.astype("float16"), params), folder / f"{stem}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_tiny_model(args.output, args.seed)
    print(args.output)
