"""What lies in a folder: diffusers layout with safetensors, or the same layout with Orbax arrays as convert/import_*.py write it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anidiff_jax.errors import UserError
from anidiff_jax.weights import files
from anidiff_jax.weights.tensors import Tensor
from anidiff_jax.weights.tree import Flat

ORBAX = "params"  # name of the folder of arrays inside a component's folder
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}  # of a component's files
PARTS = tuple(STEMS)


def tensors_in(folder: Path, stem: str = STEMS["unet"]) -> dict[str, Any]:
    """Every tensor of a component's folder, from Orbax or safetensors."""
    if (folder / ORBAX).is_dir():
        return {key: files.tensor_of(key, array) for key, array in restore_flat(folder / ORBAX).items()}
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


def write_component(tensors: Mapping[str, Tensor], config: Mapping[str, Any], target: Path) -> int:
    """Copies one component into Orbax, arrays in our layout and in their own types; returns how many bytes."""
    target.mkdir(parents=True, exist_ok=True)
    files.save_json(config, target / "config.json")
    arrays = {key: files.to_ours(key, tensor.read()) for key, tensor in tensors.items()}
    save_flat(arrays, target / ORBAX)
    return sum(a.nbytes for a in arrays.values())


def must_not_exist(path: Path) -> None:
    """A UserError where a folder to be written is there already."""
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or move it away")
