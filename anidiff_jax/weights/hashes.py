"""What tells one model's weights from another's."""

import hashlib
from typing import Any

import jax
import numpy as np

SPREAD = 1024  # values of a tensor that are looked at where all would take long


def hash_of(*trees: Any) -> str:
    """SHA-256 of the names and values of every leaf, in hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def spread(array: np.ndarray) -> np.ndarray:
    """At most SPREAD evenly spaced values of a contiguous array, copied. Training and merging change nearly all of a tensor's values."""
    return array.reshape(-1)[:: -(-array.size // SPREAD) or 1].copy()
