"""The text encoder of CLIP (Radford et al., 2021): token ids → text states. Pre-norm, causal, without padding mask."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from anidiff_jax.errors import UserError
from anidiff_jax.models.attention import attend
from anidiff_jax.models.config import understood
from anidiff_jax.models.layers import Dense, LayerNorm, Settings, gelu, parameter

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": gelu,
}


@dataclass(frozen=True)
class CLIPTextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    max_length: int
    hidden_act: str
    eps: float


@understood
def clip_config(raw: Mapping[str, Any], where: str = "text_encoder/config.json") -> CLIPTextConfig:
    """Resolves a CLIPTextModel config (other keys of transformers do not touch the text states)."""
    raw = raw.get("text_config", raw)
    if raw.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        raise UserError(f"{where}: model_type {raw['model_type']!r} is not supported: a CLIP text encoder is expected")
    act = raw.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise UserError(f"{where}: hidden_act={act!r} is not supported (known: quick_gelu, gelu)")
    if raw.get("hidden_size", 512) % raw.get("num_attention_heads", 8):
        raise UserError(f"{where}: num_attention_heads {raw['num_attention_heads']} does not divide hidden_size {raw['hidden_size']}")
    return CLIPTextConfig(
        vocab_size=raw.get("vocab_size", 49408),
        hidden_size=raw.get("hidden_size", 512),
        intermediate_size=raw.get("intermediate_size", 2048),
        layers=raw.get("num_hidden_layers", 12),
        heads=raw.get("num_attention_heads", 8),
        max_length=raw.get("max_position_embeddings", 77),
        hidden_act=act,
        eps=raw.get("layer_norm_eps", 1e-5),
    )


class Table(nn.Module):
    """Embedding table (rows, width); row i stands for id i."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, ids):
        return parameter(self, "weight", (self.rows, self.width))[ids]


class Embeddings(nn.Module):
    config: CLIPTextConfig
    settings: Settings

    @nn.compact
    def __call__(self, ids):
        c = self.config
        tokens = Table(c.vocab_size, c.hidden_size, name="token_embedding")(ids)
        places = Table(c.max_length, c.hidden_size, name="position_embedding")(jnp.arange(ids.shape[-1]))
        return (tokens + places).astype(self.settings.dtype)


class SelfAttention(nn.Module):
    heads: int
    settings: Settings

    @nn.compact
    def __call__(self, x):
        b, s, c = x.shape
        project = lambda name: Dense(c, self.settings, name=name)(x).reshape(b, s, self.heads, c // self.heads)
        y = attend(project("q_proj"), project("k_proj"), project("v_proj"), "xla", causal=True)
        return Dense(c, self.settings, name="out_proj")(y.reshape(b, s, c))


class MLP(nn.Module):
    config: CLIPTextConfig
    settings: Settings

    @nn.compact
    def __call__(self, x):
        c, s = self.config, self.settings
        x = ACTIVATIONS[c.hidden_act](Dense(c.intermediate_size, s, name="fc1")(x))
        return Dense(c.hidden_size, s, name="fc2")(x)


class Layer(nn.Module):
    config: CLIPTextConfig
    settings: Settings

    @nn.compact
    def __call__(self, x):
        c, s = self.config, self.settings
        x = x + SelfAttention(c.heads, s, name="self_attn")(LayerNorm(s, c.eps, name="layer_norm1")(x))
        return x + MLP(c, s, name="mlp")(LayerNorm(s, c.eps, name="layer_norm2")(x))


class Encoder(nn.Module):
    config: CLIPTextConfig
    settings: Settings
    skip: int = 0

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.layers - self.skip):
            x = Layer(self.config, self.settings, name=f"layers.{i}")(x)
        return x


class TextTransformer(nn.Module):
    config: CLIPTextConfig
    settings: Settings

    @nn.compact
    def __call__(self, ids, skip: int = 0):
        c, s = self.config, self.settings
        x = Embeddings(c, s, name="embeddings")(ids)
        x = Encoder(c, s, skip, name="encoder")(x)
        return LayerNorm(s, c.eps, name="final_layer_norm")(x)


class CLIPTextModel(nn.Module):
    """ids (b, tokens) int → text states (b, tokens, hidden_size); `skip` leaves out that many last layers (clip_skip)."""

    config: CLIPTextConfig
    settings: Settings = Settings()

    @nn.compact
    def __call__(self, ids, skip: int = 0):
        return TextTransformer(self.config, self.settings, name="text_model")(ids, skip)
