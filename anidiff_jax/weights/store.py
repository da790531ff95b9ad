"""What lies in a folder: diffusers layout with safetensors, or the same layout with Orbax arrays as convert/import_*.py write it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anidiff_jax.errors import UserError
from anidiff_jax.weights import files
from anidiff_jax.weights.files import Tensor, read_json
from anidiff_jax.weights.tree import Flat, is_motion

ORBAX = "params"  # name of the folder of arrays inside a component's folder
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}  # of a component's files
PARTS = tuple(STEMS)


class Restored(NamedTuple):
    """A tensor out of an Orbax checkpoint, which holds arrays in our layout; looks like a `files.Tensor`."""

    key: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return files.their_shape(self.key, self.array.shape)

    def read(self) -> np.ndarray:
        axes = np.argsort(files._axes(self.key, self.array.ndim) or range(self.array.ndim))
        return self.array.transpose(axes)


def tensors_in(folder: Path, stem: str = STEMS["unet"]) -> dict[str, Any]:
    """Every tensor of a component's folder, from Orbax or safetensors."""
    if (folder / ORBAX).is_dir():
        return {key: Restored(key, array) for key, array in restore_flat(folder / ORBAX).items()}
    return files.tensors_in(folder, stem)


def save_flat(arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    """Writes {key: array} as an Orbax checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), dict(arrays))


def restore_flat(folder: Path) -> Flat:
    """Reads what save_flat wrote, as numpy arrays."""
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            keys = checkpointer.metadata(folder.absolute()).item_metadata.tree
            restore_args = dict.fromkeys(keys, ocp.RestoreArgs(restore_type=np.ndarray))
            return checkpointer.restore(folder.absolute(), ocp.args.PyTreeRestore(restore_args=restore_args))
    except (ValueError, FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is not a whole Orbax checkpoint ({str(error).splitlines()[0]}): import the model again") from None


def base_folder(path: Path) -> Path:
    """Checks that a path is a Stable Diffusion folder."""
    if path.is_file():
        raise UserError(f"{path} is a single file: give a folder in diffusers layout (with unet/, vae/, text_encoder/, tokenizer/)")
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a folder in diffusers layout")
    missing = [name for name in (*PARTS, "tokenizer") if not (path / name).is_dir()]
    if missing:
        raise UserError(f"{path} is not a Stable Diffusion model in diffusers layout: it has no {', '.join(m + '/' for m in missing)}")
    index = path / "model_index.json"
    if index.is_file():
        kind = read_json(index).get("_class_name") or ""
        if kind.startswith("StableDiffusion3") or "XL" in kind or "Flux" in kind:
            raise UserError(f"{path} is a {kind} model: Stable Diffusion 1.x and 2.x are supported")
    return path


def motion_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, tensors) of a motion adapter: its folder, a checkpoint of ours, or a bare .safetensors file."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: motion adapters are read from .safetensors files or folders in diffusers layout")
        raw, tensors = {}, files.tensors_of(path)
    elif (path / "config.json").is_file():
        raw, tensors = read_json(path / "config.json"), tensors_in(path)
    elif (path / "motion_adapter").is_dir():
        return motion_adapter(path / "motion_adapter")
    elif (path / "adapter_config.json").is_file():
        raise UserError(f"{path} holds a LoRA, which needs the motion adapter that it was trained on: give it as --ckpt_dir instead")
    else:
        raise UserError(f"{path} is not a motion adapter: it holds no config.json")
    if (raw.get("_class_name") or "").startswith("UNet"):
        raise UserError(f"{path} holds a whole UNet, not a motion adapter: sample it with --sft_type full --ckpt_dir {path}")
    motion = {key: tensor for key, tensor in tensors.items() if is_motion(key)}
    if not motion:
        if any(".temporal_transformer." in key for key in tensors):
            raise UserError(f"{path} is in the original AnimateDiff naming, which is not read yet: convert it with diffusers first")
        raise UserError(f"{path} holds no motion modules: it is not a motion adapter")
    if raw.get("_class_name") == "MotionAdapter" and len(motion) < len(tensors):
        strange = sorted(tensors.keys() - motion.keys())
        raise UserError(f"{path} holds unexpected {', '.join(strange[:3])}: it is not a plain motion adapter")
    if any(".temporal_transformer." in key for key in motion):
        raise UserError(f"{path} is in the original AnimateDiff naming, which is not read yet: convert it with diffusers first")
    return raw, motion


def write_component(tensors: Mapping[str, Tensor], config: Mapping[str, Any], target: Path) -> int:
    """Copies one component into Orbax, arrays in our layout and in their own types; returns how many bytes."""
    target.mkdir(parents=True, exist_ok=True)
    files.save_json(config, target / "config.json")
    arrays = {key: files.to_ours(key, tensor.read()) for key, tensor in tensors.items()}
    save_flat(arrays, target / ORBAX)
    return sum(a.nbytes for a in arrays.values())


def copy_rest(source: Path, target: Path) -> None:
    """Copies what a base model's folder holds besides its networks: tokenizer, scheduler, index."""
    for name in ("tokenizer", "scheduler"):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
    if (source / "model_index.json").is_file():
        shutil.copyfile(source / "model_index.json", target / "model_index.json")


def must_not_exist(path: Path) -> None:
    """A UserError where a folder to be written is there already."""
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or move it away")
