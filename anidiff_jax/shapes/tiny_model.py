"""The embedded model in diffusers layout: its configuration, its parts freshly drawn, and how they are put together. `build` trains it."""

import atexit
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from anidiff_jax.models.config import fresh_motion_config, unet_config
from anidiff_jax.models.init import draw, shapes
from anidiff_jax.models.unet import UNet
from anidiff_jax.shapes.render import BACKGROUNDS, COLORS, DIRECTIONS, HELD_OUT_WORDINGS, THINGS, VERBS, WORDINGS
from anidiff_jax.shapes.tokenizer import write_tokenizer
from anidiff_jax.weights import files
from anidiff_jax.weights.store import STEMS
from anidiff_jax.weights.tree import is_motion, split

_NAMES = " ".join([*COLORS, *THINGS, *BACKGROUNDS, *DIRECTIONS, *VERBS.values(), *WORDINGS, *HELD_OUT_WORDINGS])
WORDS = [*dict.fromkeys(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", _NAMES))), "an", "moving", "growing", "shrinking", "still"]
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,  # diffusers' misnomer: the number of heads
    "block_out_channels": [32, 96, 96],
    "cross_attention_dim": 64,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 1.0,  # the latents' mean and deviation are folded into the weights
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "intermediate_size": 256,
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
    "prediction_type": "v_prediction",
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


HEADS, MAX_FRAMES = 4, 32  # of the motion modules


@cache
def tokenizer_folder() -> Path:
    """The tokenizer's files, written once a process into a temporary folder."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_tokenizer(folder, WORDS)
    return folder


def text_config() -> dict[str, Any]:
    size = len(files.read_json(tokenizer_folder() / "vocab.json"))
    return {**TEXT, "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}


def fresh_unet(seed: int):
    """Freshly drawn parameters of the image model."""
    motion = fresh_motion_config(UNET, heads=HEADS, max_frames=MAX_FRAMES)
    return split(draw(shapes(UNet(unet_config(UNET, motion))), seed), is_motion)[1]


def write_base(folder: Path, text_encoder: Path, vae: Path, unet: Path, scheduler: dict[str, Any]) -> None:
    """Fills `folder` with a whole Stable Diffusion model, made of these three parts, each a folder as `write_part` leaves it."""
    for name, source in (("text_encoder", text_encoder), ("vae", vae), ("unet", unet)):
        (folder / name).mkdir()
        for file in ("config.json", f"{STEMS[name]}.safetensors"):
            shutil.copyfile(source / file, folder / name / file)
    shutil.copytree(tokenizer_folder(), folder / "tokenizer")
    (folder / "scheduler").mkdir()
    files.save_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    files.save_json(INDEX, folder / "model_index.json")


def write_part(params, config: dict[str, Any], folder: Path, stem: str) -> None:
    """One network in float32 and its config."""
    folder.mkdir(exist_ok=True)
    files.save_json(config, folder / "config.json")
    files.save(params, folder / f"{stem}.safetensors")


def pack(output: Path, base: Path, adapter: Path) -> None:
    """The base and its adapter as they ship, in float16, at `output`, which is replaced; its card stays."""
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(base, part, ignore=shutil.ignore_patterns("*.safetensors", "stage.json"))
    for name, stem in STEMS.items():
        _save_half(base / name / f"{stem}.safetensors", part / name / f"{stem}.safetensors")
    (part / "motion_adapter").mkdir()
    shutil.copyfile(adapter / "config.json", part / "motion_adapter" / "config.json")
    _save_half(adapter / f"{STEMS['unet']}.safetensors", part / "motion_adapter" / f"{STEMS['unet']}.safetensors")
    if (output / "README.md").exists():
        shutil.copyfile(output / "README.md", part / "README.md")
    shutil.rmtree(output, ignore_errors=True)
    part.rename(output)


def _save_half(source: Path, target: Path) -> None:
    """A copy of a safetensors file in float16."""
    save_file({name: x.astype(np.float16) for name, x in load_file(source).items()}, target, metadata={"format": "pt"})
