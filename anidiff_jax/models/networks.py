"""The three networks of a text-to-video model, without weights."""

from dataclasses import dataclass

from anidiff_jax.models.clip import CLIPTextModel
from anidiff_jax.models.unet import UNet
from anidiff_jax.models.vae import AutoencoderKL


@dataclass(frozen=True)
class Networks:
    """Hashable, so that compiled functions take it as a static argument and are shared by equal networks."""

    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet
