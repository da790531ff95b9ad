"""Parameter trees: nested dicts whose paths, joined with ".", are the diffusers keys; and the shapes a model expects.

A numeral belongs to the name before it: "to_out.0.weight" is {"to_out.0": {"weight": …}}, as the modules are named.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from anidiff_jax.models.clip import CLIPTextModel
from anidiff_jax.models.unet import UNet
from anidiff_jax.models.vae import AutoencoderKL

Tree = dict[str, Any]  # nested
Flat = dict[str, Any]  # key → array


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested dict → {"a.b.c": leaf}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def names_of(key: str) -> list[str]:
    """"net.0.proj.weight" → ["net.0", "proj", "weight"]."""
    names: list[str] = []
    for part in key.split("."):
        if part.isdecimal() and names:
            names[-1] += f".{part}"
        else:
            names.append(part)
    return names


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """{"a.b.c": leaf} → nested dict."""
    tree: Tree = {}
    for key, value in flat.items():
        *path, leaf = names_of(key)
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def split(tree: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """(leaves whose key is chosen, the rest)."""
    flat = flatten(tree)
    return unflatten({k: v for k, v in flat.items() if chosen(k)}), unflatten({k: v for k, v in flat.items() if not chosen(k)})


def merge(*trees: Mapping[str, Any]) -> Tree:
    """One tree of all leaves; a later tree wins."""
    joined: Flat = {}
    for tree in trees:
        joined.update(flatten(tree))
    return unflatten(joined)


def is_motion(key: str) -> bool:
    """Whether a UNet's parameter belongs to its motion modules."""
    return "motion_modules." in key


def is_buffer(key: str) -> bool:
    """Whether a tensor is stored beside the parameters but never trains."""
    return key.endswith("pos_embed.pe")


def shapes(model: nn.Module) -> Tree:
    """Tree of jax.ShapeDtypeStruct (float32) of a network's parameters, without computing anything."""
    return jax.eval_shape(lambda: init(model, jax.random.key(0)))


def init(model: nn.Module, key) -> Tree:
    """Freshly drawn parameters of a network."""
    if isinstance(model, UNet):
        c = model.config
        side = 2 ** (len(c.down) - 1)
        inputs: tuple = (jnp.zeros((1, 1, side, side, c.in_channels)), jnp.zeros((1,)), jnp.zeros((1, 1, c.cross_attention_dim)))
    elif isinstance(model, AutoencoderKL):
        inputs = (jnp.zeros((1, model.config.factor, model.config.factor, model.config.in_channels)),)
    elif isinstance(model, CLIPTextModel):
        inputs = (jnp.zeros((1, 1), jnp.int32),)
    else:
        raise TypeError(type(model))
    return model.init(key, *inputs)["params"]
