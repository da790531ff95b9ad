"""The layers that all networks share. Leaves carry PyTorch's names (`weight`, `bias`), so parameter paths equal the diffusers keys."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from anidiff_jax.models.attention import attend
from anidiff_jax.models.convolution import convolve, convolve_doubled


@dataclass(frozen=True)
class Settings:
    """How to compute, as opposed to what: one object handed to every layer.

    dtype: type of activations and of weights when used; statistics, softmax and timesteps stay in float32.
    attention: auto | xla | chunked | cudnn, see `attention.attend`.
    remat: recompute each layer's activations in the backward pass instead of keeping them.
    lora_dropout: dropout on the input of adapters, active only where a "dropout" key is passed to apply.
    motion_norm: joint | per_frame, the statistics of the motion modules' GroupNorm: over all frames (diffusers) or in each alone
        (the original AnimateDiff). spatial_norm: per_frame | joint, the same of the resnets' norms and the UNet's last (v1: joint).
    motion_scale: factor of what motion modules add; 0 is the image model.
    fast: False takes every convolution and attention in its plain form, so that operations can be counted.
    perturbed: regular expression; self-attentions of such names let each place see only itself (Ahn et al., 2024, arXiv:2403.17377).
    """

    dtype: str = "float32"
    attention: str = "auto"
    remat: bool = False
    lora_dropout: float = 0.0
    motion_norm: str = "joint"
    spatial_norm: str = "per_frame"
    motion_scale: float = 1.0
    perturbed: str = ""
    fast: bool = True

    @property
    def precision(self) -> str | None:
        """float32 means float32: without this, GPUs multiply in TF32 and TPUs in bfloat16."""
        return "highest" if self.dtype == "float32" else None

    def layer(self, module: type[nn.Module]) -> type[nn.Module]:
        """`module`, recomputed in the backward pass where remat is on; but for its convolutions, which cost most and keep little.

        On a CPU the linear layers are kept too, but for the feed-forward's wide one, which is recomputed in chunks (`FeedForward`).
        """
        kept = [CONVOLVED, PROJECTED] if jax.default_backend() == "cpu" else [CONVOLVED]
        return nn.remat(module, policy=jax.checkpoint_policies.save_only_these_names(*kept)) if self.remat else module


CONVOLVED, PROJECTED = "convolved", "projected"


def parameter(module: nn.Module, name: str, shape: tuple[int, ...]) -> Any:
    """A parameter of this shape. Modules declare shapes only; `init.draw` says what fresh parameters are.

    Flax's own `param` draws keys and traces an initializer for each, which takes half a second of every start.
    """
    value: Any = module.variable("params", name, jax.lax.empty, shape, jnp.float32).value
    if value.shape != shape:
        raise ValueError(f"{'.'.join(module.path)}.{name} should have the shape {shape}, and has {value.shape}")
    return value


ROWS_AT_ONCE = 1024  # of the feed-forward on a CPU, so that its eightfold width stays in the cache


class Dense(nn.Module):
    """Linear layer (..., in) → (..., features), plus a low-rank adapter where the `lora` collection holds one for it.

    kept: what it gives may be kept for the backward pass, see `Settings.layer`.
    weight: (in, features). Adapter: lora_A.weight (in, rank), lora_B.weight (rank, features), already scaled.
    """

    features: int
    settings: Settings
    use_bias: bool = True
    kept: bool = True

    @nn.compact
    def __call__(self, x):
        s, dtype = self.settings, jnp.dtype(self.settings.dtype)
        weight = parameter(self, "weight", (x.shape[-1], self.features))
        x = x.astype(dtype)
        y = jnp.matmul(x, weight.astype(dtype), precision=s.precision)
        if self.use_bias:
            y = y + parameter(self, "bias", (self.features,)).astype(dtype)
        if self.has_variable("lora", "lora_A"):
            down: Any = self.get_variable("lora", "lora_A")
            up: Any = self.get_variable("lora", "lora_B")
            if s.lora_dropout and self.has_rng("dropout"):
                kept = chosen(self.make_rng("dropout"), 1 - s.lora_dropout, x.shape)
                x = jnp.where(kept, x / (1 - s.lora_dropout), 0).astype(dtype)
            low = jnp.matmul(x, down["weight"].astype(dtype), precision=s.precision)
            y = y + jnp.matmul(low, up["weight"].astype(dtype), precision=s.precision)
        return checkpoint_name(y, PROJECTED) if self.kept else y


def chosen(key, share: float, shape: tuple[int, ...]):
    """bool of this shape, each True with the probability `share`: as jax.random.bernoulli, without a detour over floats."""
    return jax.random.bits(key, shape, "uint32") < np.uint32(min(share * 2**32, 2**32 - 1))


class Conv(nn.Module):
    """2-D convolution over the last three axes (..., h, w, c); weight (kernel, kernel, in, features).

    doubled_to: (height, width), where the input is first doubled by its nearest neighbours and cropped to this; 3×3 at stride 1.
    Adapter: lora_A.weight (kernel, kernel, in, rank), lora_B.weight (rank, features), already scaled.
    """

    features: int
    settings: Settings
    kernel: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None  # (top, bottom), (left, right); None keeps the size
    doubled_to: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x):
        dtype, precision, fast = jnp.dtype(self.settings.dtype), self.settings.precision, self.settings.fast
        side = (self.kernel - 1) // 2
        weight = parameter(self, "weight", (self.kernel, self.kernel, x.shape[-1], self.features))
        bias = parameter(self, "bias", (self.features,))
        padding = self.padding or ((side, side), (side, side))
        frames = x.reshape(-1, *x.shape[-3:]).astype(dtype)  # ... h w c -> (...) h w c

        def convolved(weight):
            if self.doubled_to is not None:
                return convolve_doubled(frames, weight.astype(dtype), self.doubled_to, precision, fast)
            return convolve(frames, weight.astype(dtype), self.stride, padding, precision, fast)

        y = checkpoint_name(convolved(weight), CONVOLVED)
        if self.has_variable("lora", "lora_A"):
            down: Any = self.get_variable("lora", "lora_A")
            up: Any = self.get_variable("lora", "lora_B")
            y = y + jnp.matmul(convolved(down["weight"]), up["weight"].astype(dtype), precision=precision)
        return (y + bias.astype(dtype)).reshape(*x.shape[:-3], *y.shape[-3:])


class GroupNorm(nn.Module):
    """Normalises (..., h, w, c) over space and the channels of a group; with `over_frames` over axis -4 too.

    Sums are taken per channel first and joined per group after: on a CPU twice as fast as reducing the grouped array.
    """

    groups: int
    eps: float
    settings: Settings
    over_frames: bool = False

    @nn.compact
    def __call__(self, x):
        weight, bias = (parameter(self, name, x.shape[-1:]) for name in ("weight", "bias"))
        axes = (-4, -3, -2) if self.over_frames else (-3, -2)
        return group_norm(x, weight, bias, self.groups, self.eps, axes).astype(jnp.dtype(self.settings.dtype))


@partial(jax.jit, static_argnums=(3, 4, 5))  # traced once for each shape, however many layers have that
def group_norm(x, weight, bias, groups: int, eps: float, axes: tuple[int, ...]):
    """x (…, c) normalised over `axes` and the channels of a group, float32.

    Seen once for both sums: each channel's are of what it differs by from its value in the middle, so that hardly anything cancels.
    (Not from its first, which lies in a corner: there convolutions see zeros.)
    """
    grouped = lambda per_channel: per_channel.reshape(*per_channel.shape[:-1], groups, -1)

    def over_group(per_channel):  # (..., c): mean over the channels of each group, for each channel
        mean = grouped(per_channel).mean(-1, keepdims=True)
        return jnp.broadcast_to(mean, grouped(per_channel).shape).reshape(per_channel.shape)

    x = x.astype(jnp.float32)
    middle = tuple(slice(n // 2, n // 2 + 1) if i - x.ndim in axes else slice(None) for i, n in enumerate(x.shape))
    start = jax.lax.stop_gradient(x[middle])
    offset, square = (x - start).mean(axes, keepdims=True), jnp.square(x - start).mean(axes, keepdims=True)
    mean = over_group(start + offset)
    variance = over_group(square - jnp.square(offset) + jnp.square(start + offset - mean))
    return (x - mean) * (weight.astype(jnp.float32) * jax.lax.rsqrt(variance + eps)) + bias.astype(jnp.float32)


class LayerNorm(nn.Module):
    """Normalises the last axis."""

    settings: Settings
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        weight, bias = (parameter(self, name, x.shape[-1:]) for name in ("weight", "bias"))
        return layer_norm(x, weight, bias, self.eps).astype(jnp.dtype(self.settings.dtype))


@partial(jax.jit, static_argnums=3)
def layer_norm(x, weight, bias, eps: float):
    """x (…, c) normalised over the last axis, float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps) * weight.astype(jnp.float32) + bias.astype(jnp.float32)


def multi_head(x, context, heads: int, settings: Settings, qkv_bias: bool = False):
    """Attention of x (b, s, c) to context (b, t, d), with projections that belong to the module that calls this."""
    channels = x.shape[-1]

    def project(name, y):  # b s c -> b s heads c/heads
        y = Dense(channels, settings, use_bias=qkv_bias, name=name)(y)
        return y.reshape(*y.shape[:-1], heads, channels // heads)

    kind = settings.attention if settings.fast else "xla"
    y = attend(project("to_q", x), project("to_k", context), project("to_v", context), kind)
    return Dense(channels, settings, name="to_out.0")(y.reshape(x.shape))  # b s heads d -> b s (heads d)


class Attention(nn.Module):
    """Multi-head attention of x (b, s, c) to `context` (b, t, d), or to itself."""

    heads: int
    settings: Settings

    @nn.compact
    def __call__(self, x, context=None):
        s = self.settings
        if context is None and s.perturbed and re.search(s.perturbed, ".".join(self.path)):
            return Dense(x.shape[-1], s, name="to_out.0")(Dense(x.shape[-1], s, use_bias=False, name="to_v")(x))
        return multi_head(x, x if context is None else context, self.heads, self.settings)


class GEGLU(nn.Module):
    """Gated linear unit with exact GELU (Shazeer, 2020): first half hidden, second half gate."""

    features: int
    settings: Settings

    @nn.compact
    def __call__(self, x):
        hidden, gate = jnp.split(Dense(2 * self.features, self.settings, kept=False, name="proj")(x), 2, axis=-1)
        return hidden * gelu(gate)


def gelu(x):
    """x Φ(x), exactly, by erf as in PyTorch: JAX's own is by erfc, whose gradient takes a CPU twice as long."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


class FeedForward(nn.Module):
    """GEGLU of four times the width, and back: (..., c) → (..., c). On a CPU in chunks of rows: 1.5 times as fast at 320 channels."""

    settings: Settings

    @nn.compact
    def __call__(self, x):
        channels, rows = x.shape[-1], x.size // x.shape[-1]

        def two_layers(module, carry, y):
            y = GEGLU(4 * channels, module.settings, name="net.0")(y)
            return carry, Dense(channels, module.settings, name="net.2")(y)

        if jax.default_backend() != "cpu" or rows <= ROWS_AT_ONCE or rows % ROWS_AT_ONCE:
            return two_layers(self, None, x)[1]
        two_layers = nn.remat(two_layers, prevent_cse=False) if self.settings.remat else two_layers  # so no chunk is kept
        chunked = nn.scan(two_layers, variable_broadcast=("params", "lora"), split_rngs={"params": False, "dropout": True})
        chunks = x.reshape(-1, ROWS_AT_ONCE, channels)  # ... c -> n 1024 c
        return chunked(self, None, chunks)[1].reshape(x.shape)
