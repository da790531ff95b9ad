"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685): y = x W + scale · dropout(x) A B, with scale = alpha / rank.

An adapter is a tree of its own beside the frozen weights: {"…to_q": {"lora_A": {"weight": A}, "lora_B": {"weight": B}}},
A (in, rank), B (rank, out). `layers.Dense` reads the `lora` collection where it holds an entry for it.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from anidiff_jax.errors import UserError
from anidiff_jax.weights.tree import Tree, flatten, unflatten


def linear_layers(params: Mapping) -> dict[str, tuple[int, int]]:
    """Name → (in, out) of every Linear in a tree of parameters or of shapes."""
    found = {}
    for key, value in flatten(params).items():
        if key.endswith(".weight") and len(value.shape) == 2 and not key.endswith("embedding.weight"):
            found[key.removesuffix(".weight")] = (value.shape[0], value.shape[1])
    return found


def init_lora(key, params: Mapping, pattern: str, rank: int, dtype="float32") -> Tree:
    """A fresh adapter on every Linear whose name fully matches the regular expression; B is zero, so nothing changes yet.

    A is drawn as PEFT draws it (Kaiming uniform, a = sqrt 5). Raises UserError when the pattern matches none.
    """
    chosen = {name: shape for name, shape in linear_layers(params).items() if matches(pattern)(name)}
    if not chosen:
        some = ", ".join(list(linear_layers(params))[:3])
        raise UserError(f"trainable_modules={pattern!r} matches no Linear layer of the UNet; names look like {some}")
    flat = {}
    for i, (name, (fan_in, fan_out)) in enumerate(sorted(chosen.items())):
        bound = fan_in**-0.5
        flat[f"{name}.lora_A.weight"] = jax.random.uniform(jax.random.fold_in(key, i), (fan_in, rank), dtype, -bound, bound)
        flat[f"{name}.lora_B.weight"] = jnp.zeros((rank, fan_out), dtype)
    return unflatten(flat)


def matches(pattern: str) -> Callable[[str], bool]:
    """Full match of a regular expression on names."""
    compiled = re.compile(pattern)
    return lambda name: compiled.fullmatch(name) is not None


def scaled(lora: Mapping, scale) -> Tree:
    """The adapter with B multiplied by `scale`, the form that the networks read."""
    return unflatten({k: v * jnp.asarray(scale, v.dtype) if ".lora_B." in k else v for k, v in flatten(lora).items()})


def joined(loras: Sequence[tuple[Mapping, float]]) -> Tree:
    """Adapters, each with its scale, as one: A B + A' B' = [A A'] [B; B'], so that their ranks add up."""
    found: dict[str, list] = {}
    for lora, scale in loras:
        for key, value in flatten(scaled(lora, scale)).items():
            found.setdefault(key, []).append(value)
    axis = lambda key: -1 if ".lora_A." in key else 0
    return unflatten({key: values[0] if len(values) == 1 else jnp.concatenate(values, axis(key)) for key, values in found.items()})


def merge_lora(params: Mapping, lora: Mapping, scale: float) -> Tree:
    """params with W + scale · A B in place of W, added in float32 and kept in W's type. Raises UserError for a layer that is not there."""
    merged, flat = flatten(params), flatten(lora)
    for name in {k.split(".lora_")[0] for k in flat}:
        key = f"{name}.weight"
        if key not in merged:
            raise UserError(f"the LoRA holds {name}, which this model does not have: it was made for another one")
        weight = merged[key]
        down, up = (flat[f"{name}.lora_{m}.weight"].astype(jnp.float32) for m in "AB")
        if (*down.shape[:-1], up.shape[1]) != weight.shape:
            raise UserError(f"the LoRA's {name} is for a {(*down.shape[:-1], up.shape[1])} layer, the model's is {tuple(weight.shape)}")
        delta = scale * jnp.matmul(down, up, precision="highest")
        merged[key] = (weight.astype(jnp.float32) + delta).astype(weight.dtype)
    return unflatten(merged)
