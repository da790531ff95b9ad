"""Names of motion modules as the original AnimateDiff repository writes them ↔ diffusers' names.

    down_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q.weight
    down_blocks.0.motion_modules.1.transformer_blocks.0.attn2.to_q.weight

The original keeps a position table for each of a block's two attentions, diffusers one for both.
"""

import re
from collections.abc import Mapping

import numpy as np

from anidiff_jax.errors import UserError
from anidiff_jax.models.motion import sinusoid
from anidiff_jax.weights.tensors import Tensor

INSIDE = ".temporal_transformer."  # only the original's names hold it
_TO_OURS = [
    (r"\.temporal_transformer\.", "."),
    (r"\.attention_blocks\.\d+\.pos_encoder\.pe$", ".pos_embed.pe"),
    (r"\.attention_blocks\.0\.", ".attn1."),
    (r"\.attention_blocks\.1\.", ".attn2."),
    (r"\.norms\.0\.", ".norm1."),
    (r"\.norms\.1\.", ".norm2."),
    (r"\.ff_norm\.", ".norm3."),
]
_TO_ORIGINAL = [
    (r"(motion_modules\.\d+\.)", r"\1temporal_transformer."),
    (r"\.attn1\.", ".attention_blocks.0."),
    (r"\.attn2\.", ".attention_blocks.1."),
    (r"\.norm1\.", ".norms.0."),
    (r"\.norm2\.", ".norms.1."),
    (r"\.norm3\.", ".ff_norm."),
]
FRAMES = 32  # of the table that a file without one was trained with


def our_name(key: str) -> str:
    """diffusers' name of a tensor of an original motion module."""
    for pattern, new in _TO_OURS:
        key = re.sub(pattern, new, key)
    return key


def original_names(key: str) -> list[str]:
    """The original's names of a motion module's tensor: two for a position table."""
    if key.endswith(".pos_embed.pe"):
        block = original_names(key.removesuffix("pos_embed.pe") + "norm1.weight")[0].removesuffix("norms.0.weight")
        return [f"{block}attention_blocks.{i}.pos_encoder.pe" for i in (0, 1)]
    for pattern, new in _TO_ORIGINAL:
        key = re.sub(pattern, new, key)
    return [key]


def from_original(tensors: Mapping[str, Tensor], where) -> dict[str, Tensor]:
    """Motion modules under diffusers' names; a file without position tables (AnimateLCM) gets the sinusoids it was trained with."""
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = our_name(key)
        if name in named and not name.endswith(".pos_embed.pe"):
            raise UserError(f"{where} holds more than one tensor that is {name}: only one of them could be used")
        if name in named and not np.array_equal(named[name].read(), tensor.read()):
            raise UserError(f"{where}: the two position tables of {name.removesuffix('.pos_embed.pe')} differ, which is not supported")
        named.setdefault(name, tensor)
    for key in [key for key in named if key.endswith(".attn1.to_q.weight")]:
        table = key.replace(".attn1.to_q.weight", ".pos_embed.pe")
        if table not in named:
            named[table] = Tensor.of(np.asarray(sinusoid(FRAMES, named[key].shape[1])))
    return named
