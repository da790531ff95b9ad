"""LoRA files as diffusers writes and reads them: `pytorch_lora_weights.safetensors`, and PEFT's `adapter_config.json` beside it."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from anidiff_jax.errors import UserError
from anidiff_jax.lora import linear_layers
from anidiff_jax.weights import files
from anidiff_jax.weights.tree import Tree, flatten, unflatten

WEIGHTS = "pytorch_lora_weights.safetensors"
CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha in the header


def save_lora(lora: Mapping, folder: Path, alpha: float, dropout: float, base: str, metadata: Mapping[str, str] | None = None) -> None:
    """Writes an adapter of the UNet so that `pipe.load_lora_weights(folder)` applies it with the right scale."""
    flat = flatten(lora)
    layers = sorted({key.split(".lora_")[0] for key in flat})
    rank = flat[f"{layers[0]}.lora_A.weight"].shape[1]
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": layers}
    header = {METADATA: json.dumps({f"unet.{k}": v for k, v in settings.items()}), **(metadata or {})}
    files.save({f"unet.{key}": value for key, value in flat.items()}, folder / WEIGHTS, header)
    config = {
        **settings,
        "peft_type": "LORA",
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": base,
    }
    files.save_json(config, folder / CONFIG)


def load_lora(path: Path) -> tuple[Tree, float]:
    """(adapter of the UNet, alpha / rank) from a folder or a .safetensors file in diffusers or PEFT naming."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} holds no {WEIGHTS}: it is not a LoRA checkpoint")
    flat = {}
    for key, tensor in files.tensors_of(file).items():
        name = key.removeprefix("unet.").removeprefix("base_model.model.")
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or len(tensor.shape) != 2:
            raise UserError(f"{file} holds {key}, which is not an adapter of a Linear layer of the UNet in diffusers naming")
        flat[name] = jnp.asarray(files.to_ours(name, tensor.read()))
    layers = {key.split(".lora_")[0] for key in flat}
    if not layers or any(f"{layer}.lora_{m}.weight" not in flat for layer in layers for m in "AB"):
        raise UserError(f"{file} is not a whole LoRA: each layer needs lora_A and lora_B")
    rank = {flat[f"{layer}.lora_A.weight"].shape[1] for layer in layers}
    if len(rank) > 1:
        raise UserError(f"{file}: its layers have different ranks {sorted(rank)}, which is not supported")
    return unflatten(flat), _alpha(file, rank.copy().pop()) / rank.pop()


def _alpha(file: Path, rank: int) -> float:
    """From PEFT's config beside the file, else from the header, else the rank (a scale of one), as diffusers assumes."""
    config = file.with_name(CONFIG)
    if config.is_file():
        said, where = files.read_json(config), config
    else:
        header = json.loads(files.metadata_of(file).get(METADATA, "{}"))
        said, where = {key.removeprefix("unet."): value for key, value in header.items()}, file
        said.setdefault("lora_alpha", rank)
    for key in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern"):
        if said.get(key):
            raise UserError(f"{where}: {key}={said[key]!r} changes what the LoRA computes, and is not supported")
    if not isinstance(said.get("lora_alpha"), (int, float)):
        raise UserError(f"{where} does not say lora_alpha, so the LoRA's scale is unknown")
    return float(said["lora_alpha"])


def check_fits(lora: Mapping, params: Mapping, where: str | Path) -> None:
    """A UserError where the adapter is for a layer that the UNet lacks, or of another size."""
    layers, flat = linear_layers(params), flatten(lora)
    for name in sorted({key.split(".lora_")[0] for key in flat}):
        shape = (flat[f"{name}.lora_A.weight"].shape[0], flat[f"{name}.lora_B.weight"].shape[1])
        if layers.get(name) != shape:
            has = f"a {layers[name]} one" if name in layers else "none"
            raise UserError(f"{where}: the LoRA holds a {shape} layer {name}, this model has {has}: it was trained on another model")
