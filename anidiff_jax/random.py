"""Random keys: one seed, folded with what it is for, so that no two uses share a stream; and a quick kind of key for dropout."""

import math
import zlib

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl


def purpose(seed: int, name: str):
    """The key for one use of a run's seed; fold in the step or the clip's index for each draw."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) >> 1)


def quick(key):
    """The same key as one that draws by hashing, which takes a tenth of the operations of JAX's own cipher, and less time to compile.

    For dropout: every adapted layer of every step draws a number for each of its inputs, and needs no more than that they look random.
    """
    return jax.random.wrap_key_data(jax.random.key_data(key)[..., -2:], impl=_HASHED)


def _mixed(x):
    """uint32 → uint32, one to one; each bit of x turns about half of the result's over (the last step of MurmurHash3, Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit  # here and below: traced once for each shape, however many layers draw
def _hashed(key, number):
    """key (2,), numbers (…) → uint32 (…)."""
    return _mixed(_mixed(number.astype(jnp.uint32) + key[0]) ^ key[1])


@jax.jit
def _fold_in(key, number):
    """What depends on the number alone, a layer's name say, XLA computes while it compiles: an addition and an exclusive or are left.

    The words change places, so that it matters which of two numbers comes first."""
    number = number.astype(jnp.uint32)
    return jnp.stack([key[1] ^ _mixed(~number), key[0] + _mixed(number)])


def _places(shape):
    return jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)


def _random_bits(key, bits, shape):
    if bits != 32:
        raise ValueError(f"quick keys draw 32 bits at a time, not {bits}")
    return _hashed(key, _places(shape))


_HASHED = define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: _fold_in(jnp.zeros(2, jnp.uint32), seed),
    split=lambda key, shape: jnp.moveaxis(_fold_in(key, _places(shape)), 0, -1),
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="hashed",
    tag="hash",
)
