"""PyTorch diffusers models with random weights in which nothing is zero or one, to compare with live."""

import inspect
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from anidiff_jax.shapes.tiny_model import WORDS
from anidiff_jax.shapes.tokenizer import write_tokenizer

torch.set_num_threads(2)

UNET = {
    "attention_head_dim": 2,
    "block_out_channels": (16, 32),
    "cross_attention_dim": 24,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
MOTION = {
    "block_out_channels": (16, 32),
    "motion_layers_per_block": 1,
    "motion_max_seq_length": 24,
    "motion_norm_num_groups": 8,
    "motion_num_attention_heads": 2,
}
VAE = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 77,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter away from its special start: weights of about unit gain, biases and norms around nothing round."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        with torch.no_grad():
            if p.ndim == 1:
                p.copy_((0.8 if name.endswith("weight") else 0.1) + 0.2 * noise)
            elif "embedding" in name and p.ndim == 2 and "linear" not in name:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise * 0.8 / np.sqrt(p[0].numel()))
    return model.eval()


def unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    return randomize(UNet2DConditionModel(**{**UNET, **changes}), seed)


def adapter(seed: int = 1, **changes) -> MotionAdapter:
    return randomize(MotionAdapter(**{**MOTION, **changes}), seed)


def vae(seed: int = 2, **changes) -> AutoencoderKL:
    return randomize(AutoencoderKL(**{**VAE, **changes}), seed)


def text_encoder(vocab_size: int, seed: int = 3, **changes) -> CLIPTextModel:
    last = vocab_size - 1
    config = CLIPTextConfig(vocab_size=vocab_size, bos_token_id=last - 1, eos_token_id=last, pad_token_id=last, **{**TEXT, **changes})
    return randomize(CLIPTextModel(config), seed)


def ddim(**changes) -> DDIMScheduler:
    """The reference document's recipe."""
    recipe = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
    }
    return DDIMScheduler(**{**recipe, **changes})


SCHEDULERS = {
    "ddim": ("DDIM", {}),
    "euler": ("EulerDiscrete", {}),
    "euler_a": ("EulerAncestralDiscrete", {}),
    "dpmpp_2m": ("DPMSolverMultistep", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    "dpmpp_sde": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    "pndm": ("PNDM", {"skip_prk_steps": True}),
    "lms": ("LMSDiscrete", {}),
    "heun": ("HeunDiscrete", {}),
    "unipc": ("UniPCMultistep", {}),
    "lcm": ("LCM", {}),
    "ddpm": ("DDPM", {}),
}


def scheduler(name: str, **noise):
    """diffusers' scheduler of this name of ours, with those of the noise arguments that it has."""
    kind, more = SCHEDULERS[name]
    made_by = getattr(diffusers, kind + "Scheduler")
    known = inspect.signature(made_by.__init__).parameters
    recipe = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "steps_offset": 1, "clip_sample": False}
    recipe |= {"set_alpha_to_one": True, "timestep_spacing": "leading", **noise}
    return made_by(**{key: value for key, value in recipe.items() if key in known}, **more)


def tokenizer(folder: Path) -> CLIPTokenizer:
    write_tokenizer(folder, WORDS)
    return CLIPTokenizer.from_pretrained(folder)


def vocabulary_size() -> int:
    with tempfile.TemporaryDirectory() as folder:
        return write_tokenizer(Path(folder), WORDS)


def write_base(folder: Path, unet_model=None, **saving) -> Path:
    """A whole Stable Diffusion folder, written by diffusers."""
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(vocabulary_size()),
        tokenizer=tokenizer(folder / "made"),
        unet=unet_model or unet(),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "base", **saving)
    return folder / "base"


def write_adapter(folder: Path, model=None) -> Path:
    (model or adapter()).save_pretrained(folder / "adapter")
    return folder / "adapter"


def close(ours, theirs, relative: float = 1e-4) -> None:
    """Largest error at most `relative` × the largest magnitude of the reference."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    error, size = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert error <= relative * size, f"error {error:.2e}, largest magnitude {size:.2e}: ratio {error / size:.1e}"
