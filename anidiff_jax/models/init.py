"""Which parameters a network has, and what they are before any training: one rule a kind of leaf, in one place.

Modules declare shapes only.
"""

import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.models.clip import CLIPTextModel
from anidiff_jax.models.motion import sinusoid
from anidiff_jax.models.unet import UNet
from anidiff_jax.models.vae import AutoencoderKL


def shapes(network: nn.Module) -> dict[str, Any]:
    """Nested dict of jax.ShapeDtypeStruct (float32), without computing anything."""
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    if isinstance(network, UNet):
        c = network.config
        side = 2 ** (len(c.down) - 1)
        given = [floats(1, 1, side, side, c.in_channels), floats(1), floats(1, 1, c.cross_attention_dim)]
    elif isinstance(network, AutoencoderKL):
        given = [floats(1, network.config.factor, network.config.factor, network.config.in_channels)]
    elif isinstance(network, CLIPTextModel):
        given = [jax.ShapeDtypeStruct((1, 1), jnp.int32)]
    else:
        raise TypeError(type(network))
    return jax.eval_shape(lambda *given: network.init(jax.random.key(0), *given)["params"], *given)


def draw(tree: dict[str, Any], seed: int) -> dict[str, Any]:
    """Fresh float32 parameters for a nested dict of shapes. A leaf depends on the seed and its own name, not on the rest of the tree.

    Drawn by NumPy: JAX would compile a program for every shape.
    """
    names = lambda path: ".".join(p.key for p in path)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(_initial(names(path), leaf.shape, seed)), tree)


def _initial(name: str, shape: tuple[int, ...], seed: int):
    *_, layer, leaf = name.split(".")
    if leaf == "pe":
        return sinusoid(*shape[1:])
    if leaf == "bias" or ("motion_modules." in name and layer == "proj_out"):  # a fresh motion module adds nothing
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    if layer.endswith("embedding"):
        return np.float32(0.02) * rng.standard_normal(shape, np.float32)
    bound = np.float32(1 / math.sqrt(math.prod(shape[:-1])))  # PyTorch's default for Linear and Conv
    return bound * (2 * rng.random(shape, np.float32) - 1)
