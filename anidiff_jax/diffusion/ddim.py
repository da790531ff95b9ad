"""DDIM without noise (Song et al., 2020, arXiv:2010.02502, eq. 12): a table made once on the host, and a pure step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.errors import UserError


class Table(NamedTuple):
    """One row a step, from noise to image: where it stands, its ᾱ, and ᾱ of where it goes."""

    timestep: jax.Array  # (steps,) int32
    alpha: jax.Array  # (steps,) float32
    alpha_next: jax.Array


def table(schedule: NoiseSchedule, steps: int) -> Table:
    """Timesteps evenly spaced from the offset ("leading"); the last step ends at ᾱ = 1, the clean image."""
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise UserError(f"num_inference_steps={steps} must be between 1 and num_train_timesteps={schedule.num_train_timesteps}")
    ratio = schedule.num_train_timesteps // steps
    timesteps = np.arange(steps)[::-1] * ratio + schedule.steps_offset
    if timesteps[0] >= schedule.num_train_timesteps:
        raise UserError(
            f"num_inference_steps={steps} with steps_offset={schedule.steps_offset} starts at step {timesteps[0]}, "
            f"past the last of {schedule.num_train_timesteps}: take fewer steps"
        )
    alphas = schedule.alphas_cumprod()
    after = timesteps - ratio
    alpha_next = np.where(after >= 0, alphas[np.maximum(after, 0)], np.float32(1))
    return Table(jnp.asarray(timesteps, jnp.int32), jnp.asarray(alphas[timesteps]), jnp.asarray(alpha_next))


def step(schedule: NoiseSchedule, row: Table, latents, prediction):
    """x at the row's next place from x at its timestep and the network's prediction there."""
    a, s = jnp.sqrt(row.alpha), jnp.sqrt(1 - row.alpha)
    if schedule.prediction_type == "epsilon":
        x0, noise = (latents - s * prediction) / a, prediction
    else:
        x0, noise = a * latents - s * prediction, a * prediction + s * latents
    if schedule.clip_sample:
        x0 = jnp.clip(x0, -1, 1)
    return jnp.sqrt(row.alpha_next) * x0 + jnp.sqrt(1 - row.alpha_next) * noise
