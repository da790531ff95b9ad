"""Tensors under diffusers' names ↔ parameter trees: transposes and nothing else, one tensor at a time.

PyTorch keeps Linear weights as (out, in) and convolutions as (out, in, h, w); we keep (in, out) and (h, w, in, out).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from anidiff_jax.errors import UserError, read_text
from anidiff_jax.weights.hashes import hash_of, spread
from anidiff_jax.weights.tensors import Tensor, numpy_type, tensors_of, write_tensors
from anidiff_jax.weights.tree import Flat, Tree, flatten, unflatten

STEM = "diffusion_pytorch_model"  # of the files of a UNet, a VAE or motion modules
WEIGHTS = f"{STEM}.safetensors"
PICKLED_STEMS = {"model": "pytorch_model"}  # transformers' name of a pickle


def tensors_in(folder: Path, stem: str = STEM) -> dict[str, Tensor]:
    """Every tensor of a folder in diffusers layout: one file or shards, safetensors before pickles, plain before variant fp16."""
    for kind, stems in ((".safetensors", (stem,)), (".bin", (stem, PICKLED_STEMS.get(stem, stem)))):
        for variant in ("", ".fp16"):
            for name in stems:
                single = folder / f"{name}{variant}{kind}"
                if single.is_file():
                    return tensors_of(single)
                for index in (folder / f"{name}{kind}.index{variant}.json", folder / f"{name}{variant}{kind}.index.json"):
                    if index.is_file():
                        return _sharded(folder, index)
    raise UserError(f"{folder} holds no {stem}.safetensors: give a folder in diffusers layout")


def _sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{index} names no files: download the folder again")
    for shard in sorted(set(map(str, shards.values()))):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing: {index.name} names it; download the folder again")
        found.update(tensors_of(folder / shard))
    return found


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a folder in diffusers layout")
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no names and values: it is not the file that it should be")
    return value


def _axes(key: str, ndim: int) -> tuple[int, ...] | None:
    """The transpose from PyTorch's layout to ours; None where they agree."""
    if ndim == 4:
        return (2, 3, 1, 0)  # out in h w -> h w in out
    if ndim == 2 and not key.endswith("embedding.weight"):
        return (1, 0)  # out in -> in out
    return None


def to_ours(key: str, array: np.ndarray) -> np.ndarray:
    axes = _axes(key, array.ndim)
    return array if axes is None else array.transpose(axes)


def to_theirs(key: str, array: np.ndarray) -> np.ndarray:
    axes = _axes(key, array.ndim)
    return array if axes is None else np.ascontiguousarray(array.transpose(np.argsort(axes)))


def their_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch's layout of one of our parameters."""
    axes = _axes(key, len(shape))
    return tuple(shape) if axes is None else tuple(shape[i] for i in np.argsort(axes))


def renamed(tensors: Mapping[str, Tensor], name_of: Callable[[str], str], where: str | Path) -> dict[str, Tensor]:
    """Each tensor under its new name; UserError where two of a file would have the same, since only one of them could be used."""
    named: dict[str, Tensor] = {}
    came_from: dict[str, str] = {}
    for key, tensor in tensors.items():
        new = name_of(key)
        if new in named:
            raise UserError(f"{where} holds {came_from[new]} and {key}, which are the same layer: only one of them could be used")
        named[new], came_from[new] = tensor, key
    return named


def load(expected: Mapping[str, Any], tensors: dict[str, Tensor], dtype_of, where: str | Path) -> tuple[Tree, str]:
    """(exactly the `expected` parameters (a tree of shapes), a hash of them); `dtype_of(key)` gives each one's type, None as stored.

    The hash is of names, shapes, stored types and a spread of each tensor's values as they are read, so it costs nothing to speak
    of, and is the same for the same weights in another format or under another naming, and whatever type they are computed in.

    Empties `tensors` on the way, so that memory never holds two models. A tensor that is missing, left over or of another
    shape is a UserError that names it.
    """
    wanted = flatten(expected)
    for kind, keys in (("lacks", wanted.keys() - tensors.keys()), ("holds unexpected", tensors.keys() - wanted.keys())):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(f"{where} {kind} {some}: it does not fit its config.json, or is of another kind of model")
    params: Flat = {}
    seen: Flat = {}
    for key, like in wanted.items():
        shape = their_shape(key, like.shape)
        stored = tensors[key].shape
        as_conv = (*shape, 1, 1) if len(shape) == 2 else None  # as old files keep the VAE's Linear weights
        if stored not in (shape, as_conv):
            raise UserError(f"{where}: {key} has shape {list(stored)}, expected {list(shape)}: it does not fit its config.json")
        array = tensors.pop(key).read().reshape(shape)
        seen[f"{key} {array.dtype} {shape}"] = spread(array)
        dtype = jax.dtypes.canonicalize_dtype(numpy_type(dtype_of(key) or str(array.dtype)))
        ours = to_ours(key, array).astype(dtype, copy=False)
        params[key] = jax.device_put(ours, may_alias=False)  # jnp.asarray would compile a program for every shape
    return unflatten(params), hash_of(seen)[:16]


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Gives a new, empty folder beside `target` to fill; it takes target's name when all went well, and else is gone."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    aside.chmod(0o755)
    try:
        yield aside
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / "was"
            os.replace(target, old)
        os.replace(aside, target)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save(tree: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a parameter tree under its diffusers keys; dtypes stay. The header's metadata is text."""
    write_tensors({key: tensor_of(key, value) for key, value in flatten(tree).items()}, path, metadata)


def tensor_of(key: str, value) -> Tensor:
    """One of our parameters as PyTorch has it."""
    return Tensor(their_shape(key, value.shape), str(value.dtype), lambda: to_theirs(key, np.asarray(value)))


def save_json(value: Mapping[str, Any], path: Path) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may write the same
    aside.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
