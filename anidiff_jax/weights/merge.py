"""A motion adapter with a LoRA folded in, as a folder that diffusers' MotionAdapter loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from anidiff_jax.errors import UserError
from anidiff_jax.lora import merge_lora
from anidiff_jax.models.config import motion_config
from anidiff_jax.weights import files
from anidiff_jax.weights.base import EMBEDDED
from anidiff_jax.weights.hub import resolve
from anidiff_jax.weights.loras import check_fits, load_lora
from anidiff_jax.weights.sources import motion_source
from anidiff_jax.weights.tree import Tree, flatten, is_motion, unflatten

WEIGHTS = "diffusion_pytorch_model.safetensors"


def merged_folder(checkpoint: Path) -> Path:
    """<checkpoint>-merged, beside it."""
    checkpoint = checkpoint.absolute()
    return checkpoint.with_name(f"{checkpoint.name}-merged")


def write_merged_adapter(
    adapter: str | Path | None, revision: str | None, checkpoint: Path, replace: bool = False, hub: str = "huggingface"
) -> Path:
    """Adds the checkpoint's LoRA to the motion adapter in float32, and writes it in the adapter's own type; returns the folder.

    adapter: folder, file or hub id; None = the embedded one. UserError where the folder exists and `replace` is false, where
    the LoRA holds layers outside of motion modules, or where the two do not fit.
    """
    target = merged_folder(checkpoint)
    if target.exists() and not replace:
        raise UserError(f"{target} exists: give --replace_if_exists true to write it anew, or move it away")
    source = EMBEDDED / "motion_adapter" if adapter is None else resolve(str(adapter), revision, hub)
    raw, params, header = merged_adapter(source, checkpoint)
    with files.written_whole(target) as out:
        write_adapter(params, raw, out, header)
    return target


def merged_adapter(adapter: Path, checkpoint: Path | None) -> tuple[dict[str, Any], Tree, dict[str, str]]:
    """(config.json, parameters, note for the file's header) of an adapter, with the checkpoint's LoRA added where there is one."""
    raw, tensors, _ = motion_source(adapter)
    params = unflatten({key: jnp.asarray(files.to_ours(key, tensor.read())) for key, tensor in tensors.items()})
    if checkpoint is None:
        return raw, params, {}
    lora = load_lora(checkpoint, {"unet": [key.removesuffix(".weight") for key in flatten(params)]})
    spatial = [key for key in (*flatten(lora.unet), *flatten(lora.text_encoder)) if not is_motion(key)]
    if spatial:
        raise UserError(f"{checkpoint} also adapts {spatial[0]}, which is no part of a motion adapter: it cannot be merged into one")
    check_fits(lora.unet, params, checkpoint)
    return raw, merge_lora(params, lora.unet, 1.0), {"merged_lora": checkpoint.name}


def write_adapter(params: Mapping, raw: Mapping, target: Path, header: Mapping[str, str] | None = None) -> None:
    """Fills a motion adapter's folder in diffusers layout; its config.json says what the tensors are, whatever `raw` said of them."""
    shapes = {key: files.their_shape(key, value.shape) for key, value in flatten(params).items()}
    groups = raw.get("motion_norm_num_groups") or raw.get("norm_num_groups") or 32
    config = motion_config(raw, shapes, groups, str(target)).to_json()
    files.save_json(config, target / "config.json")
    files.save(params, target / WEIGHTS, header)
