"""FreeInit (Wu et al., 2023, arXiv:2312.07537): sample again from noise whose low frequencies are those of the last video."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.diffusion.schedule import NoiseSchedule, add_noise
from anidiff_jax.errors import UserError

FILTERS = ("butterworth", "gaussian", "ideal", "box")


@dataclass(frozen=True)
class FreeInit:
    """iterations: videos sampled, each from the last; 0 and 1 are sampling as ever. filter: what passes of the last video's frequencies.

    order: of the Butterworth filter. spatial_stop, temporal_stop: where the filter ends, as shares of the highest frequency.
    fast: the first iterations take fewer steps. Raises UserError for values that mean nothing.
    """

    iterations: int = 0
    filter: str = "butterworth"
    order: int = 4
    spatial_stop: float = 0.25
    temporal_stop: float = 0.25
    fast: bool = False

    def __post_init__(self):
        if self.iterations < 0 or self.order < 1:
            raise UserError(f"free_init_iterations {self.iterations} must be at least 0, free_init_order {self.order} at least 1")
        if self.filter not in FILTERS:
            raise UserError(f"free_init_filter={self.filter!r} is not one of {', '.join(FILTERS)}")
        for name in ("spatial_stop", "temporal_stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"free_init_{name} {getattr(self, name)} must be between 0 and 1")

    def steps(self, iteration: int, steps: int) -> int:
        """Of an iteration, from 0."""
        return max(1, steps * (iteration + 1) // self.iterations) if self.fast and self.iterations else steps

    def low_pass(self, frames: int, height: int, width: int) -> np.ndarray:
        """(f, h, w) float32, how much of each frequency passes; in the order of the FFT."""
        if 0 in (self.spatial_stop, self.temporal_stop):
            return np.zeros((frames, height, width), np.float32)
        t, y, x = np.meshgrid(*(2 * np.abs(np.fft.fftfreq(n)) for n in (frames, height, width)), indexing="ij")
        if self.filter == "box":
            inside = (t <= self.temporal_stop) & (y <= self.spatial_stop) & (x <= self.spatial_stop)
            return inside.astype(np.float32)
        squared = (self.spatial_stop / self.temporal_stop * t) ** 2 + y**2 + x**2
        if self.filter == "butterworth":
            passed = 1 / (1 + (squared / self.spatial_stop**2) ** self.order)
        elif self.filter == "gaussian":
            passed = np.exp(-squared / (2 * self.spatial_stop**2))
        else:
            passed = squared <= 2 * self.spatial_stop  # diffusers' and the paper's code: a sphere of this radius, squared
        return passed.astype(np.float32)


@jax.jit
def mixed(low_pass, low, high):
    """Low frequencies of the one, high ones of the other: low_pass (f, h, w), low and high (f, h, w, c) → (f, h, w, c)."""
    frequencies = lambda x: jnp.fft.fftn(x.astype(jnp.float32), axes=(0, 1, 2))
    passed = low_pass[..., None]
    return jnp.fft.ifftn(passed * frequencies(low) + (1 - passed) * frequencies(high), axes=(0, 1, 2)).real


def renoised(schedule: NoiseSchedule, free_init: FreeInit, latents, noise, fresh):
    """Noise to sample from again: of clean latents (f, h, w, c), the noise that they came from, and fresh noise."""
    low = add_noise(schedule, latents, noise, schedule.num_train_timesteps - 1)
    return mixed(free_init.low_pass(*latents.shape[:3]), low, fresh)
