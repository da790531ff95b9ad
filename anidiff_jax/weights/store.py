"""What lies in a folder: diffusers layout with safetensors, or the same layout with Orbax arrays as convert/import_*.py write it."""

import json
from collections.abc import Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from anidiff_jax.errors import UserError
from anidiff_jax.terminal import track
from anidiff_jax.weights import files
from anidiff_jax.weights.tensors import Tensor, numpy_type
from anidiff_jax.weights.tree import Flat

ORBAX = "params"  # name of the folder of arrays inside a component's folder: several checkpoints, none of which holds more than
GROUP = 2**28  # bytes, or one tensor: Orbax needs several times as much memory as it writes or reads
STEMS = {"unet": files.STEM, "vae": files.STEM, "text_encoder": "model"}  # of a component's files
PARTS = tuple(STEMS)


def tensors_in(folder: Path, stem: str = STEMS["unet"]) -> dict[str, Tensor]:
    """Every tensor of a component's folder, from Orbax or safetensors, unread."""
    if not (folder / ORBAX).is_dir():
        return files.tensors_in(folder, stem)
    tensors, restored = {}, lru_cache(1)(_restored)  # they are asked for in about the order in which they lie here
    for group in sorted((folder / ORBAX).iterdir()):
        for key, (shape, dtype) in _listed(group).items():
            read = lambda group=group, key=key: files.to_theirs(key, restored(group)[key])
            tensors[key] = Tensor(files.their_shape(key, shape), dtype, read)
    return tensors


def write_component(tensors: Mapping[str, Tensor], config: Mapping[str, Any], target: Path) -> int:
    """Copies one component into Orbax, arrays in our layout and in their own types; returns how many bytes."""
    import orbax.checkpoint as ocp

    (target / ORBAX).mkdir(parents=True)
    files.save_json(config, target / "config.json")
    size_of = lambda key: int(np.prod(tensors[key].shape)) * numpy_type(tensors[key].dtype).itemsize
    groups: list[list[str]] = [[]]
    size = 0
    for key in sorted(tensors):
        if size > 0 and size + size_of(key) > GROUP:
            groups, size = [*groups, []], 0
        groups[-1].append(key)
        size += size_of(key)
    with ocp.StandardCheckpointer() as checkpointer:
        for i, group in enumerate(track(groups, target.name, shown=len(groups) > 1)):
            arrays = {key: files.to_ours(key, tensors[key].read()) for key in group}
            checkpointer.save((target / ORBAX / f"{i:05d}").absolute(), arrays)
            checkpointer.wait_until_finished()
    return sum(map(size_of, tensors))


def _listed(group: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{key: (shape in our layout, type)}"""
    with _checkpointer(group) as checkpointer:
        tree = checkpointer.metadata(group.absolute()).item_metadata.tree
        return {key: (tuple(array.shape), str(array.dtype)) for key, array in tree.items()}


def _restored(group: Path) -> Flat:
    import orbax.checkpoint as ocp

    with _checkpointer(group) as checkpointer:
        restore_args = dict.fromkeys(_listed(group), ocp.RestoreArgs(restore_type=np.ndarray))
        return checkpointer.restore(group.absolute(), ocp.args.PyTreeRestore(restore_args=restore_args))


@contextmanager
def _checkpointer(group: Path):
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            yield checkpointer
    except (ValueError, FileNotFoundError, NotADirectoryError, json.JSONDecodeError) as error:
        raise UserError(f"{group} is not a whole Orbax checkpoint ({str(error).splitlines()[0]}): import the model again") from None


def must_not_exist(path: Path) -> None:
    """A UserError where a folder to be written is there already."""
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or move it away")
