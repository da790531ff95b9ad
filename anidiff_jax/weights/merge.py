"""Weights with a LoRA folded in, and the LoRA that lies between two sets of weights; tensor by tensor, as they lie in files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anidiff_jax.errors import UserError
from anidiff_jax.models.config import motion_config
from anidiff_jax.weights import files
from anidiff_jax.weights.base import EMBEDDED
from anidiff_jax.weights.hub import resolve
from anidiff_jax.weights.loras import load_lora
from anidiff_jax.weights.original import original_names
from anidiff_jax.weights.sources import motion_source
from anidiff_jax.weights.tensors import Tensor, write_tensors
from anidiff_jax.weights.tree import Tree, flatten, is_motion, unflatten


def merged_folder(checkpoint: Path) -> Path:
    """<checkpoint>-merged, beside it."""
    checkpoint = checkpoint.absolute()
    return checkpoint.with_name(f"{checkpoint.name}-merged")


def must_be_free(target: Path, replace: bool) -> None:
    """A UserError where the folder exists and may not be replaced."""
    if target.exists() and not replace:
        raise UserError(f"{target} exists: give --replace_if_exists true to write it anew, or move it away")


def write_merged_adapter(
    adapter: str | Path | None, revision: str | None, checkpoint: Path, replace: bool = False, hub: str | None = None
) -> Path:
    """Adds the checkpoint's LoRA to the motion adapter in float32, and writes it in the adapter's own type; returns the folder.

    adapter: folder, file or hub id; None = the embedded one. UserError where the folder exists and `replace` is false, where
    the LoRA holds layers outside of motion modules, or where the two do not fit.
    """
    target = merged_folder(checkpoint)
    must_be_free(target, replace)
    source = EMBEDDED / "motion_adapter" if adapter is None else resolve(str(adapter), revision, hub)
    raw, tensors, header = merged_adapter(source, [(checkpoint, 1.0)])
    with files.written_whole(target) as out:
        write_adapter(tensors, raw, out, header)
    return target


def merged_adapter(adapter: Path, loras: list[tuple[Path, float]]) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """(config.json, tensors, note for the file's header) of an adapter, with LoRAs added, each with its scale."""
    raw, tensors, found = motion_source(adapter)
    header = {"kind": "motion modules", "made_from": adapter.name, "version": found.version, **found.norms}
    for path, scale in loras:
        lora = load_lora(path, {"unet": layers_of(tensors)})
        spatial = [key for key in (*flatten(lora.unet), *flatten(lora.text_encoder)) if not is_motion(key)]
        if spatial:
            raise UserError(f"{path} also adapts {spatial[0]}, which is no part of a motion adapter: it cannot be merged into one")
        tensors = with_lora(tensors, lora.unet, scale, path)
    if loras:
        header["merged_loras"] = ", ".join(f"{path.name}:{scale:g}" for path, scale in loras)
    return raw, tensors, header


def layers_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that a LoRA may adapt."""
    return [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]


def with_lora(tensors: Mapping[str, Tensor], lora: Mapping, scale: float, where: Path) -> dict[str, Tensor]:
    """The tensors with W + scale · A B in place of W, added in float32 and kept in W's type, when they are read."""
    changed, flat = dict(tensors), flatten(lora)
    for layer in {key.split(".lora_")[0] for key in flat}:
        down, up = (np.asarray(flat[f"{layer}.lora_{m}.weight"], np.float32) for m in "AB")
        delta = lambda down=down, up=up: files.to_theirs("weight", scale * (down @ up))
        key, shape = f"{layer}.weight", files.their_shape("weight", (*down.shape[:-1], up.shape[1]))
        own = changed.get(key)
        if own is None or own.shape != shape:
            has = "none" if own is None else f"a {own.shape} one"
            raise UserError(f"{where}: the LoRA holds a {shape} layer {layer}, this model has {has}: it was trained on another model")
        changed[key] = Tensor(own.shape, own.dtype, _sum(own, delta))
    return changed


def _sum(tensor: Tensor, delta: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    def read():
        before = tensor.read()
        return (before.astype(np.float32) + delta()).astype(before.dtype)

    return read


def write_adapter(tensors: Mapping[str, Tensor], raw: Mapping, target: Path, header: Mapping[str, str] | None = None) -> None:
    """Fills a motion adapter's folder in diffusers layout; its config.json says what the tensors are, whatever `raw` said of them."""
    groups = raw.get("motion_norm_num_groups") or raw.get("norm_num_groups") or 32
    config = motion_config(raw, {key: tensor.shape for key, tensor in tensors.items()}, groups, str(target)).to_json()
    files.save_json(config, target / "config.json")
    write_tensors(tensors, target / files.WEIGHTS, header)


def write_original(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """A motion module in the original's naming, one file, as A1111 and ComfyUI read it."""
    write_tensors({name: tensor for key, tensor in tensors.items() for name in original_names(key)}, path, header)


def extract_lora(before: Mapping[str, Tensor], after: Mapping[str, Tensor], rank: int) -> tuple[Tree, float]:
    """(the LoRA of this rank that is nearest to the difference of the Linear layers, the share of the difference that it keeps).

    The best approximation of a matrix by one of lower rank is that of its largest singular values (Eckart & Young, 1936). The share
    is of the sum of squares, over all that differs: what a LoRA cannot say, biases and norms, counts as lost.
    """
    adapters, kept, whole = {}, 0.0, 0.0
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise UserError(f"the two differ in structure ({odd[0]} is in one of them only): no LoRA lies between them")
    for key, old in before.items():
        new = after[key]
        if old.shape != new.shape:
            raise UserError(f"the two differ in structure ({key} is {old.shape} and {new.shape}): no LoRA lies between them")
        difference = new.read().astype(np.float32) - old.read().astype(np.float32)
        whole += float(np.square(difference, dtype=np.float64).sum())
        if difference.ndim == 2 and key.endswith(".weight") and difference.any():
            u, s, v = np.linalg.svd(difference.T, full_matrices=False)  # ours: (in, out)
            u, s, v = (_filled(x, rank, axis) for x, axis in ((u, 1), (s, 0), (v, 0)))  # a narrow layer's rank may be smaller
            root = np.sqrt(s[:rank])
            kept += float(np.square(s[:rank], dtype=np.float64).sum())
            layer = key.removesuffix(".weight")
            adapters[f"{layer}.lora_A.weight"], adapters[f"{layer}.lora_B.weight"] = u[:, :rank] * root, root[:, None] * v[:rank]
    if not adapters:
        raise UserError("the two do not differ in any Linear layer: there is no LoRA to extract")
    return unflatten(adapters), kept / whole


def _filled(x: np.ndarray, length: int, axis: int) -> np.ndarray:
    """x with zeros behind it, so that it is at least so long."""
    missing = max(0, length - x.shape[axis])
    return np.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
