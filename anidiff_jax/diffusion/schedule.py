"""The noise that training adds and sampling removes: q(x_t | x_0) = N(sqrt(ᾱ_t) x_0, 1 - ᾱ_t) (Ho et al., 2020, arXiv:2006.11239)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from anidiff_jax.errors import UserError

CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}


@dataclass(frozen=True)
class NoiseSchedule:
    """The reference's noise arguments, under diffusers' names; the defaults are AnimateDiff's own recipe."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "linear"  # linear | scaled_linear | squaredcos_cap_v2
    steps_offset: int = 1
    clip_sample: bool = False
    prediction_type: str = "epsilon"  # epsilon | v_prediction
    timestep_spacing: str = "leading"  # leading | linspace | trailing: which timesteps sampling visits
    set_alpha_to_one: bool = True  # the last step of ddim and pndm ends at ᾱ = 1, the clean image; else at the first timestep's ᾱ
    rescale_betas_zero_snr: bool = False  # nothing of the image is left at the last timestep

    def __post_init__(self):
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(values)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must satisfy 0 < beta_start <= beta_end < 1")
        if self.num_train_timesteps < 1:
            raise UserError(f"num_train_timesteps={self.num_train_timesteps} must be at least 1")
        if self.rescale_betas_zero_snr and self.num_train_timesteps < 2:
            raise UserError("rescale_betas_zero_snr needs at least 2 num_train_timesteps")

    def betas(self) -> np.ndarray:
        """(num_train_timesteps,) float32, before they are rescaled."""
        n = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, n)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        else:  # Nichol & Dhariwal, 2021
            bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        return betas.astype(np.float32)

    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ, (num_train_timesteps,) float32; rescaled, sqrt(ᾱ) goes from its first value to 0 (Lin et al., 2023, arXiv:2305.08891)."""
        alphas = np.cumprod(1 - self.betas(), dtype=np.float64).astype(np.float32)
        if not self.rescale_betas_zero_snr:
            return alphas
        root = np.sqrt(alphas)
        return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(NoiseSchedule.__dataclass_fields__)

    def for_base(self, scheduler: Mapping[str, Any]) -> "NoiseSchedule":
        """The same, predicting what the base model was trained to predict (its scheduler_config.json)."""
        return replace(self, prediction_type=scheduler.get("prediction_type") or self.prediction_type)


def add_noise(schedule: NoiseSchedule, x0, noise, timestep):
    """x_t for one example of any shape."""
    alpha = jnp.asarray(schedule.alphas_cumprod())[timestep]
    return jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * noise


def target(schedule: NoiseSchedule, x0, noise, timestep):
    """What the network is to predict: the noise, or the velocity (Salimans & Ho, 2022)."""
    if schedule.prediction_type == "epsilon":
        return noise
    alpha = jnp.asarray(schedule.alphas_cumprod())[timestep]
    return jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * x0


def loss_weight(schedule: NoiseSchedule, timestep, weighting: str = "none", snr_gamma: float | None = None):
    """Factor of one clip's squared error. SNR is ᾱ / (1 - ᾱ); the error of the clean latents is that of the noise divided by it.

    none         1: as AnimateDiff was trained
    inverse_snr  1 / SNR held between 0.1 and 10, on the noise's error: the clean latents' error but for both ends. Whether a
                 thing moves, and where, is decided at high noise, where the noise's own error hardly shows it. On the velocity's error
                 1 / (SNR + 1), the clean latents' error too, which needs no bound there
    snr_gamma    instead: SNR held below it, on the clean latents' error (Hang et al., 2023, arXiv:2303.09556)
    """
    alpha = jnp.asarray(schedule.alphas_cumprod())[timestep]
    snr = alpha / (1 - alpha)
    velocity = schedule.prediction_type == "v_prediction"
    if snr_gamma is not None:
        noise_weight = jnp.minimum(1, snr_gamma / snr)  # 1 where nothing of the clip is left
    elif weighting == "inverse_snr":
        if velocity:
            return jnp.maximum(1, 0.1 * snr) / (snr + 1)
        noise_weight = jnp.clip(1 / snr, 0.1, 10)
    else:
        return jnp.ones_like(snr)
    return noise_weight * snr / (snr + 1) if velocity else noise_weight  # the velocity's error is the noise's × (SNR + 1) / SNR
