"""A base model → a folder in diffusers layout, tensor by tensor."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anidiff_jax.errors import UserError
from anidiff_jax.models.config import is_motion_unet
from anidiff_jax.weights import files, store
from anidiff_jax.weights.loras import load_lora
from anidiff_jax.weights.merge import layers_of, with_lora
from anidiff_jax.weights.sources import Source, tokenizer_of
from anidiff_jax.weights.store import PARTS, STEMS
from anidiff_jax.weights.tensors import write_tensors

CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}


def with_loras(source: Source, loras: Sequence[tuple[Path, float]]) -> Source:
    """The model with LoRAs of its UNet and text encoder added, each with its scale, when its tensors are read."""
    tensors = {**source.tensors, **{part: source.named(part) for part in ("unet", "text_encoder") if loras}}
    for path, scale in loras:
        lora = load_lora(path, {part: layers_of(tensors[part]) for part in ("unet", "text_encoder")})
        for part in ("unet", "text_encoder"):
            tensors[part] = with_lora(tensors[part], getattr(lora, part), scale, path)
    return replace(source, tensors=tensors)


def write_base(source: Source, target: Path, dtype: str | None = None, header: Mapping[str, str] | None = None) -> None:
    """Fills `target` with all that diffusers' StableDiffusionPipeline reads. dtype: of all tensors; None keeps each one's own."""
    if source.unet is not None and is_motion_unet(source.configs["unet"]):
        raise UserError(f"{source.unet} holds motion modules too, which a base model has no place for: convert/export_motion_adapter.py")
    for part in PARTS:
        (target / part).mkdir()
        tensors = {key: tensor.cast(dtype) if dtype else tensor for key, tensor in source.tensors[part].items()}
        files.save_json(source.configs[part], target / part / "config.json")
        write_tensors(tensors, target / part / f"{STEMS[part]}.safetensors", header)
    write_rest(source, target)


def import_base(source: Source, target: Path) -> int:
    """Fills `target` with the same in Orbax arrays of our layout, in the types that they came in; returns how many bytes."""
    size = sum(store.write_component(source.tensors[part], source.configs[part], target / part) for part in PARTS)
    write_rest(source, target)
    return size


def write_rest(source: Source, target: Path) -> None:
    """What a base model's folder holds besides its networks: tokenizer, scheduler, index."""
    shutil.copytree(tokenizer_of(source), target / "tokenizer")
    (target / "scheduler").mkdir()
    files.save_json(source.scheduler or SCHEDULER, target / "scheduler" / "scheduler_config.json")
    files.save_json(source.index or INDEX, target / "model_index.json")


SCHEDULER: dict[str, Any] = {  # of Stable Diffusion 1.x
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    **CLASSES,
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
