"""Tensors in files, unread until they are asked for: safetensors, and PyTorch's pickles where torch is installed; and written so.

Nothing in a file is executed, and no file makes memory grow beyond its own size.
"""

import ctypes
import json
import logging
import math
import mmap
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from anidiff_jax.errors import UserError
from anidiff_jax.terminal import track

log = logging.getLogger(__name__)

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_NUMPY = {  # of safetensors' names
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)}, **{f"U{n}": f"uint{n}" for n in (16, 32, 64)},
}  # fmt: skip
_THEIRS = {ours: theirs for theirs, ours in _NUMPY.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor as PyTorch shapes it; `read()` fetches it."""

    shape: tuple[int, ...]
    dtype: str  # numpy's name
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        return cls(tuple(array.shape), str(array.dtype), lambda: array)

    def cast(self, dtype: str) -> "Tensor":
        """The same in another type."""
        return self if dtype == self.dtype else Tensor(self.shape, dtype, lambda: self.read().astype(numpy_type(dtype)))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file; UserError where it is damaged, of another kind, or would have to be executed."""
    if path.suffix.lower() in PICKLES and not _is_safetensors(path):
        return _pickled(path)
    try:
        with safe_open(path, "numpy"):  # which looks whether it is whole
            return _listed(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download or copy it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def metadata_of(path: Path) -> dict[str, str]:
    """The text entries in the header of a .safetensors file; of other files, none."""
    if path.suffix.lower() in PICKLES and not _is_safetensors(path):
        return {}
    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


def _listed(path: Path) -> dict[str, Tensor]:
    """The tensors that the header of a whole .safetensors file names."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for key, entry in header.items():
        if key != "__metadata__":
            shape, dtype = tuple(entry["shape"]), _NUMPY.get(entry["dtype"], entry["dtype"].lower())
            found[key] = Tensor(shape, dtype, partial(_read, path, key, 8 + length + entry["data_offsets"][0], shape, dtype))
    return found


def _read(path: Path, key: str, start: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """One tensor, from where it lies. safetensors' own reader would parse the header anew for each, or keep all pages in memory."""
    if dtype not in _THEIRS:  # "f4" is four bits there, and four bytes to NumPy
        raise UserError(f"{path}: {key} is of the type {dtype}, which is not supported: convert it to float16")
    kind = numpy_type(dtype)
    values = np.fromfile(path, np.uint8, math.prod(shape) * kind.itemsize, offset=start)
    if values.nbytes != math.prod(shape) * kind.itemsize:
        raise UserError(f"{path} became shorter while it was read: download or copy it again")
    return values.view(kind).reshape(shape)


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever it is called: eight bytes of length, then a brace."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} is a PyTorch pickle, which needs torch to be read: pip install 'anidiff-jax[convert]'") from None
    zipped = _is_plain_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except Exception as error:  # of many kinds, for what is damaged and for what would execute code
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} is damaged, or holds more than weights, which is never executed ({reason})") from None
    found = {key: value for key, value in _unwrapped(content, path).items() if isinstance(value, torch.Tensor)}
    if not found:
        raise UserError(f"{path} holds no tensors")
    for key, value in found.items():
        if value.is_sparse or value.is_quantized or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {key} has shape {list(value.shape)}, more than the file holds: it is damaged, or not meant well")
    dtype = lambda value: str(value.dtype).removeprefix("torch.")
    return {key: Tensor(tuple(value.shape), dtype(value), partial(_numpy, value, zipped)) for key, value in found.items()}


def _is_plain_zip(path: Path) -> bool:
    """Whether it is an archive. UserError where that is damaged or compressed.

    PyTorch stores its arrays as they are, so that a compressed one is not PyTorch's, and may be larger than any memory. It takes for an
    archive what begins like one, even where Python's zipfile, by version, calls that none.
    """
    try:
        with path.open("rb") as file:
            begins = file.read(4) == b"PK\x03\x04"
        if not begins and not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): download or copy it again") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
            raise UserError(f"{path}: {entry.filename!r} is compressed, as PyTorch never writes it: refused")
    return True


def _unwrapped(content: Any, path: Path) -> Mapping[str, Any]:
    """The state dict, which trainers wrap in others."""
    for name in ("state_dict", "module", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            beside = [key for key, value in content.items() if key != name and _holds_tensors(value)]
            if beside:
                log.info("%s: beside its weights it holds %s, which is not used", path, ", ".join(map(str, beside[:5])))
            return _unwrapped(content[name], path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors")
    return {key: value for key, value in content.items() if isinstance(key, str)}


def _holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in what a pickle keeps beside the weights."""
    if isinstance(value, (Mapping, list, tuple)):
        return any(map(_holds_tensors, value.values() if isinstance(value, Mapping) else value))
    return hasattr(value, "untyped_storage")


def _numpy(tensor, mapped: bool) -> np.ndarray:
    """mapped: it lies in a file that is mapped into memory, where every page that is read would stay."""
    import torch

    tensor, half = tensor.detach(), tensor.dtype == torch.bfloat16  # a Parameter is saved with its gradient's wish
    array = (tensor.contiguous().view(torch.uint16) if half else tensor.contiguous()).numpy()
    if mapped:
        array = array.copy()
        _let_go(tensor.untyped_storage())
    return array.view(ml_dtypes.bfloat16) if half else array


def _let_go(storage) -> None:
    """Gives the pages of a mapped file back to the system, which reads them again if they are asked for again."""
    if hasattr(mmap, "MADV_DONTNEED") and sys.platform == "linux":
        first = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = storage.data_ptr() + storage.nbytes() - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors file, one tensor in memory at a time; it has its name when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    order = sorted(tensors, key=lambda key: (-numpy_type(tensors[key].dtype).itemsize, key))  # as safetensors aligns them
    for key in order:
        tensor = tensors[key]
        start, end = end, end + int(np.prod(tensor.shape, dtype=np.int64)) * numpy_type(tensor.dtype).itemsize
        header[key] = {"dtype": _THEIRS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in track(order, path.name, shown=end > 2**28):
                file.write(np.ascontiguousarray(tensors[key].read().astype(numpy_type(tensors[key].dtype), copy=False)).view(np.uint8).data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def numpy_type(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
