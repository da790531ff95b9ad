"""The UNet of Stable Diffusion 1.x and 2.x over frames, with a motion module after every layer where an adapter asks for it.

Arrays are (b, f, h, w, c) throughout. Spatial layers see each frame alone; only motion modules join frames.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from anidiff_jax.models.config import BlockConfig, UNetConfig
from anidiff_jax.models.freeu import STAGES, freeu
from anidiff_jax.models.layers import Attention, Conv, Dense, FeedForward, GroupNorm, LayerNorm, Settings
from anidiff_jax.models.motion import MotionModule


def timestep_embedding(timesteps, channels: int):
    """(b,) → (b, channels): cosines, then sines, of the step at wavelengths up to 10000 (Ho et al., 2020); float32."""
    half = channels // 2
    angle = timesteps.astype(jnp.float32)[:, None] * jnp.exp(jnp.arange(half) * (-math.log(10000) / half))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nn.Module):
    """Two-layer perceptron on the sinusoidal embedding: (b,) → (b, 4 · channels)."""

    channels: int
    settings: Settings

    @nn.compact
    def __call__(self, timesteps):
        x = timestep_embedding(timesteps, self.channels)
        x = jax.nn.silu(Dense(4 * self.channels, self.settings, name="linear_1")(x))
        return Dense(4 * self.channels, self.settings, name="linear_2")(x)


class ResnetBlock(nn.Module):
    """Two convolutions around the time embedding, and a shortcut; divided by `scale`. Without `time` it is the VAE's."""

    channels: int
    groups: int
    eps: float
    settings: Settings
    scale: float = 1.0

    @nn.compact
    def __call__(self, x, time=None):
        s, joint = self.settings, self.settings.spatial_norm == "joint"
        y = jax.nn.silu(GroupNorm(self.groups, self.eps, s, joint, name="norm1")(x))
        y = Conv(self.channels, s, name="conv1")(y)
        if time is not None:
            y = y + Dense(self.channels, s, name="time_emb_proj")(jax.nn.silu(time))[:, None, None, None]  # b c -> b 1 1 1 c
        y = jax.nn.silu(GroupNorm(self.groups, self.eps, s, joint, name="norm2")(y))
        y = Conv(self.channels, s, name="conv2")(y)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, s, kernel=1, name="conv_shortcut")(x)
        return (x + y) / self.scale if self.scale != 1.0 else x + y


class SpatialBlock(nn.Module):
    """Self-attention within each frame, cross-attention to the text, feed-forward."""

    heads: int
    settings: Settings

    @nn.compact
    def __call__(self, x, text):  # (b, f, h·w, c), (b, tokens, d) or (b, f, tokens, d)
        b, f, positions, c = x.shape
        s = self.settings
        y = LayerNorm(s, name="norm1")(x).reshape(b * f, positions, c)
        x = x + Attention(self.heads, s, name="attn1")(y).reshape(x.shape)
        y = LayerNorm(s, name="norm2")(x)
        if text.ndim == 4:  # each frame has its own
            y, text = y.reshape(b * f, positions, c), text.reshape(b * f, *text.shape[2:])
        else:  # the same for every frame: its keys and values are made once, all frames' positions are the queries
            y = y.reshape(b, f * positions, c)
        x = x + Attention(self.heads, s, name="attn2")(y, text).reshape(x.shape)
        return x + FeedForward(s, name="ff")(LayerNorm(s, name="norm3")(x))


class SpatialTransformer(nn.Module):
    """Spatial blocks between two projections, added to the input."""

    depth: int
    heads: int
    groups: int
    linear_projection: bool
    settings: Settings

    @nn.compact
    def __call__(self, x, text):
        b, f, h, w, c = x.shape
        project = lambda name: Dense(c, self.settings, name=name) if self.linear_projection else Conv(c, self.settings, kernel=1, name=name)
        y = project("proj_in")(GroupNorm(self.groups, 1e-6, self.settings, name="norm")(x))
        y = y.reshape(b, f, h * w, c)  # b f h w c -> b f (h w) c
        for i in range(self.depth):
            y = SpatialBlock(self.heads, self.settings, name=f"transformer_blocks.{i}")(y, text)
        return x + project("proj_out")(y.reshape(x.shape))


class Downsample(nn.Module):
    """Halves each side by a strided convolution."""

    channels: int
    settings: Settings
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x):
        return Conv(self.channels, self.settings, stride=2, padding=self.padding, name="conv")(x)


class Upsample(nn.Module):
    """Nearest neighbour × 2, cropped to `size` (the skip's, where a side was odd), then a convolution."""

    channels: int
    settings: Settings

    @nn.compact
    def __call__(self, x, size: tuple[int, int] | None = None):
        doubled_to = size or (2 * x.shape[-3], 2 * x.shape[-2])
        return Conv(self.channels, self.settings, doubled_to=doubled_to, name="conv")(x)


class Block(nn.Module):
    """What down, mid and up blocks share: how to make the i-th resnet, spatial transformer and motion module."""

    config: BlockConfig
    unet: UNetConfig
    settings: Settings

    def resnet(self, i: int, scale: float = 1.0):
        u, s = self.unet, self.settings
        return s.layer(ResnetBlock)(self.config.channels, u.norm_groups, u.norm_eps, s, scale, name=f"resnets.{i}")

    def attend(self, i: int, x, text):
        """Spatial transformer, then motion module, where the block has them."""
        c, u, s = self.config, self.unet, self.settings
        if c.transformer_depths[i]:
            spatial = s.layer(SpatialTransformer)
            x = spatial(c.transformer_depths[i], c.heads, u.norm_groups, u.linear_projection, s, name=f"attentions.{i}")(x, text)
        if c.motion_depths[i]:
            motion = s.layer(MotionModule)
            x = motion(c.motion_depths[i], c.motion_heads, u.norm_groups, u.max_frames, s, name=f"motion_modules.{i}")(x)
        return x


class DownBlock(Block):
    @nn.compact
    def __call__(self, x, time, text):
        skips = []
        for i in range(len(self.config.motion_depths)):
            x = self.attend(i, self.resnet(i)(x, time), text)
            skips.append(x)
        if self.config.resample:
            x = Downsample(self.config.channels, self.settings, name="downsamplers.0")(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    @nn.compact
    def __call__(self, x, time, text):
        x = self.resnet(0, self.unet.mid_scale)(x, time)
        for i in range(len(self.config.motion_depths)):
            x = self.resnet(i + 1, self.unet.mid_scale)(self.attend(i, x, text), time)
        return x


class UpBlock(Block):
    @nn.compact
    def __call__(self, x, skips, time, text, join=lambda x, skip: (x, skip)):
        for i in range(len(self.config.motion_depths)):
            x = jnp.concatenate(join(x, skips.pop()), axis=-1)
            x = self.attend(i, self.resnet(i)(x, time), text)
        if self.config.resample:
            x = Upsample(self.config.channels, self.settings, name="upsamplers.0")(x, skips[-1].shape[-3:-1])
        return x


class UNet(nn.Module):
    """Predicts the noise (or velocity) in latent frames.

    sample (b, f, h, w, in_channels), timesteps (b,), text (b, tokens, cross_attention_dim), or (b, f, tokens,
    cross_attention_dim) where it changes from frame to frame → (b, f, h, w, out_channels) in float32.
    free (4,): FreeU's factors, see `freeu`; None: without it.
    """

    config: UNetConfig
    settings: Settings = Settings()

    @nn.compact
    def __call__(self, sample, timesteps, text, free=None):
        c, s = self.config, self.settings
        time = TimeEmbedding(c.down[0].channels, s, name="time_embedding")(timesteps)
        x = Conv(c.down[0].channels, s, name="conv_in")(sample)
        skips = [x]
        for i, block in enumerate(c.down):
            x, kept = DownBlock(block, c, s, name=f"down_blocks.{i}")(x, time, text)
            skips += kept
        x = MidBlock(c.mid, c, s, name="mid_block")(x, time, text)
        for i, block in enumerate(c.up):
            join = () if free is None or i >= STAGES else (partial(freeu, stage=i, factors=free),)
            x = UpBlock(block, c, s, name=f"up_blocks.{i}")(x, skips, time, text, *join)
        x = jax.nn.silu(GroupNorm(c.norm_groups, c.norm_eps, s, s.spatial_norm == "joint", name="conv_norm_out")(x))
        return Conv(c.out_channels, s, name="conv_out")(x).astype(jnp.float32)
