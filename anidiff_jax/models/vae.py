"""The image autoencoder of Stable Diffusion (Rombach et al., 2022): pixels in [-1, 1] ↔ latents, each image alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from anidiff_jax.errors import UserError
from anidiff_jax.models.config import check_keys, getter, understood
from anidiff_jax.models.layers import Conv, GroupNorm, Settings, multi_head
from anidiff_jax.models.unet import Downsample, ResnetBlock, Upsample

EPS = 1e-6
_FIXED = {"act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,)}
_READ = {
    "block_out_channels", "down_block_types", "force_upcast", "in_channels", "latent_channels", "layers_per_block",
    "mid_block_add_attention", "norm_num_groups", "out_channels", "sample_size", "scaling_factor", "shift_factor",
    "up_block_types", "use_post_quant_conv", "use_quant_conv",
}  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    scaling_factor: float
    shift_factor: float
    quant_conv: bool
    post_quant_conv: bool
    mid_attention: bool

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.channels) - 1)


@understood
def vae_config(raw: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
    """Resolves an AutoencoderKL config."""
    check_keys(raw, _FIXED, _READ, where)
    get = getter(raw)
    for kind in (*get("down_block_types", ()), *get("up_block_types", ())):
        if kind not in ("DownEncoderBlock2D", "UpDecoderBlock2D"):
            raise UserError(f"{where}: block type {kind!r} is not supported (known: DownEncoderBlock2D, UpDecoderBlock2D)")
    return VAEConfig(
        in_channels=get("in_channels", 3),
        out_channels=get("out_channels", 3),
        latent_channels=get("latent_channels", 4),
        channels=tuple(get("block_out_channels", (64,))),
        layers_per_block=get("layers_per_block", 1),
        norm_groups=get("norm_num_groups", 32),
        scaling_factor=get("scaling_factor", 0.18215),
        shift_factor=get("shift_factor", 0.0),
        quant_conv=get("use_quant_conv", True),
        post_quant_conv=get("use_post_quant_conv", True),
        mid_attention=get("mid_block_add_attention", True),
    )


FRAMES_AT_ONCE = 4  # of the VAE's encoder, which needs far more memory a frame than the UNet; fewer where they are large
ENCODED_AT_ONCE = FRAMES_AT_ONCE * 512 * 512  # pixels


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents (n, h, w, c), before the scaling factor."""

    mean: jax.Array
    std: jax.Array

    def sample(self, key):
        return self.mean + self.std * jax.random.normal(key, self.mean.shape)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of an image, added to it."""

    groups: int
    settings: Settings

    @nn.compact
    def __call__(self, x):
        n, h, w, c = x.shape
        y = GroupNorm(self.groups, EPS, self.settings, name="group_norm")(x).reshape(n, h * w, c)  # n h w c -> n (h w) c
        return x + multi_head(y, y, 1, self.settings, qkv_bias=True).reshape(x.shape)


class MidBlock(nn.Module):
    config: VAEConfig
    settings: Settings

    @nn.compact
    def __call__(self, x):
        c, s = self.config, self.settings
        x = ResnetBlock(x.shape[-1], c.norm_groups, EPS, s, name="resnets.0")(x)
        if c.mid_attention:
            x = AttentionBlock(c.norm_groups, s, name="attentions.0")(x)
        return ResnetBlock(x.shape[-1], c.norm_groups, EPS, s, name="resnets.1")(x)


class Stage(nn.Module):
    """Resnets at one resolution, then a change of resolution."""

    channels: int
    layers: int
    groups: int
    resample: str | None  # down | up | None
    settings: Settings

    @nn.compact
    def __call__(self, x):
        s = self.settings
        for i in range(self.layers):
            x = ResnetBlock(self.channels, self.groups, EPS, s, name=f"resnets.{i}")(x)
        if self.resample == "down":  # pads below and to the right only
            x = Downsample(self.channels, s, padding=((0, 1), (0, 1)), name="downsamplers.0")(x)
        if self.resample == "up":
            x = Upsample(self.channels, s, name="upsamplers.0")(x)
        return x


class Encoder(nn.Module):
    """(n, H, W, 3) → (n, h, w, 2 · latent channels): mean and log variance."""

    config: VAEConfig
    settings: Settings

    @nn.compact
    def __call__(self, x):
        c, s = self.config, self.settings
        x = Conv(c.channels[0], s, name="conv_in")(x)
        for i, channels in enumerate(c.channels):
            resample = "down" if i < len(c.channels) - 1 else None
            x = Stage(channels, c.layers_per_block, c.norm_groups, resample, s, name=f"down_blocks.{i}")(x)
        x = MidBlock(c, s, name="mid_block")(x)
        x = jax.nn.silu(GroupNorm(c.norm_groups, EPS, s, name="conv_norm_out")(x))
        return Conv(2 * c.latent_channels, s, name="conv_out")(x)


class Decoder(nn.Module):
    """(n, h, w, latent channels) → (n, H, W, 3)."""

    config: VAEConfig
    settings: Settings

    @nn.compact
    def __call__(self, z):
        c, s = self.config, self.settings
        x = Conv(c.channels[-1], s, name="conv_in")(z)
        x = MidBlock(c, s, name="mid_block")(x)
        for i, channels in enumerate(reversed(c.channels)):
            resample = "up" if i < len(c.channels) - 1 else None
            x = Stage(channels, c.layers_per_block + 1, c.norm_groups, resample, s, name=f"up_blocks.{i}")(x)
        x = jax.nn.silu(GroupNorm(c.norm_groups, EPS, s, name="conv_norm_out")(x))
        return Conv(c.out_channels, s, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Call with method="encode" or "decode"; images in [-1, 1]. The latents of the UNet are `scale`d by the caller."""

    config: VAEConfig
    settings: Settings = Settings()

    def setup(self):
        c, s = self.config, self.settings
        self.encoder = Encoder(c, s)
        self.decoder = Decoder(c, s)
        if c.quant_conv:
            self.quant_conv = Conv(2 * c.latent_channels, s, kernel=1)
        if c.post_quant_conv:
            self.post_quant_conv = Conv(c.latent_channels, s, kernel=1)

    def encode(self, images) -> Posterior:
        """(n, H, W, 3) → Posterior of (n, h, w, c), float32."""
        moments = self.encoder(images)
        if self.config.quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0)))

    def decode(self, latents):
        """(n, h, w, c) → (n, H, W, 3), float32, about [-1, 1]."""
        if self.config.post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images):
        """Encodes and decodes, so that `init` meets every parameter."""
        return self.decode(self.encode(images).mean)


def encode_frames(vae: AutoencoderKL, params: Mapping[str, Any], frames) -> Posterior:
    """uint8 (n, H, W, 3) → Posterior of (n, h, w, c), a few frames at a time."""

    def encode(frame):
        return jax.tree.map(lambda x: x[0], vae.apply({"params": params}, frame[None] / 127.5 - 1, method="encode"))

    at_once = max(1, min(FRAMES_AT_ONCE, ENCODED_AT_ONCE // (frames.shape[1] * frames.shape[2])))
    return jax.lax.map(encode, frames, batch_size=min(at_once, len(frames)))
