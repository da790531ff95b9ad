"""AnimateDiff's motion module (Guo et al., 2023, arXiv:2307.04725, sec. 4.2): attention over time, at each position on its own.

An image UNet sees frames as a batch. After each of its layers a motion module lets every position look along the frames,
so that what is drawn moves. Its last projection starts at zero: at first the network is exactly the image model.
"""

import flax.linen as nn
import jax.numpy as jnp

from anidiff_jax.models.layers import Attention, Dense, FeedForward, GroupNorm, LayerNorm, Settings, parameter


def sinusoid(length: int, channels: int):
    """Position table (1, length, channels): sine on even, cosine on odd channels, wavelengths up to 10000 (Vaswani et al., 2017)."""
    angle = jnp.arange(length)[:, None] * jnp.exp(jnp.arange(0, channels, 2) * (-jnp.log(10000.0) / channels))
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(1, length, channels)  # (l, c/2, 2) -> 1 l c


class PositionTable(nn.Module):
    """The first `frames` rows of the file's own position table; a parameter only in name, it never trains."""

    max_frames: int

    @nn.compact
    def __call__(self, frames: int, channels: int):
        if frames > self.max_frames:
            raise ValueError(f"{frames} frames, but the motion modules know positions up to {self.max_frames} only")
        table = parameter(self, "pe", (1, self.max_frames, channels))
        return table[:, :frames]


class TemporalBlock(nn.Module):
    """Attends over frames at each position: two self-attentions, then GEGLU."""

    heads: int
    max_frames: int
    settings: Settings

    @nn.compact
    def __call__(self, x):  # (positions, frames, channels)
        s = self.settings
        position = PositionTable(self.max_frames, name="pos_embed")(*x.shape[1:]).astype(x.dtype)
        for i in (1, 2):
            h = LayerNorm(s, name=f"norm{i}")(x) + position  # enters the attention only, never the residual stream
            x = x + Attention(self.heads, s, name=f"attn{i}")(h)
        return x + FeedForward(s, name="ff")(LayerNorm(s, name="norm3")(x))


class MotionModule(nn.Module):
    """Temporal transformer over (b, f, h, w, c), added to its input."""

    depth: int
    heads: int
    groups: int
    max_frames: int
    settings: Settings

    @nn.compact
    def __call__(self, x):
        b, f, h, w, c = x.shape
        y = GroupNorm(self.groups, 1e-6, self.settings, over_frames=self.settings.motion_norm == "joint", name="norm")(x)
        y = y.transpose(0, 2, 3, 1, 4).reshape(b * h * w, f, c)  # b f h w c -> (b h w) f c
        y = Dense(c, self.settings, name="proj_in")(y)
        for i in range(self.depth):
            y = TemporalBlock(self.heads, self.max_frames, self.settings, name=f"transformer_blocks.{i}")(y)
        y = Dense(c, self.settings, name="proj_out")(y)
        y = y.reshape(b, h, w, f, c).transpose(0, 3, 1, 2, 4)  # (b h w) f c -> b f h w c
        return x + y if self.settings.motion_scale == 1 else x + self.settings.motion_scale * y
