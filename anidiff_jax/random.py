"""Random keys: one seed, folded with what it is for, so that no two uses share a stream."""

import zlib

import jax


def purpose(seed: int, name: str):
    """The key for one use of a run's seed; fold in the step or the clip's index for each draw."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) >> 1)
