"""The text encoder of CLIP (Radford et al., 2021): token ids → text states. Pre-norm, causal, without padding mask."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from anidiff_jax.models.attention import attend
from anidiff_jax.models.config import CLIPTextConfig
from anidiff_jax.models.layers import DECLARED, Dense, LayerNorm, Settings

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class Table(nn.Module):
    """Embedding table (rows, width); row i stands for id i."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, ids):
        return self.param("weight", DECLARED, (self.rows, self.width))[ids]


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
