"""Which timesteps and noise levels sampling visits."""

import numpy as np

from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.errors import UserError


def spaced(schedule: NoiseSchedule, steps: int, extra: int = 0, whole: bool = True) -> np.ndarray:
    """Timesteps from noise to image (Lin et al., 2023, arXiv:2305.08891, table 2); the last `extra` of them are left out."""
    n, points = schedule.num_train_timesteps, steps + extra
    if points > n:
        raise UserError(f"num_inference_steps={steps} must be at most {n - extra}: two steps would be at the same timestep")
    t: np.ndarray
    if schedule.timestep_spacing == "linspace":
        t = np.linspace(0, n - 1, points)[::-1]
        t = t.round() if whole else t.astype(np.float32)
    elif schedule.timestep_spacing == "leading":
        t = np.arange(points)[::-1] * (n // points) + schedule.steps_offset
    else:  # rounding errors of arange can add an entry
        t = np.arange(n, 0, -n / steps)[:steps].round() - 1
    if t[0] >= n:
        raise UserError(
            f"num_inference_steps={steps} with steps_offset={schedule.steps_offset} starts at step {t[0]}, "
            f"past the last of {n}: take fewer steps"
        )
    return t[:steps].astype(np.float64)


def alpha_bar(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    """ᾱ at each timestep; before the first one it is the last step's end."""
    alphas = schedule.alphas_cumprod().astype(np.float64)
    t = np.asarray(timesteps).astype(int)
    return np.where(t >= 0, alphas[np.maximum(t, 0)], 1.0 if schedule.set_alpha_to_one else alphas[0])


def levels(schedule: NoiseSchedule) -> np.ndarray:
    """s = noise / image at each timestep, rising. If nothing is left of the image at the last one, 2⁻²⁴ of its variance is taken for it."""
    alphas = schedule.alphas_cumprod().astype(np.float64)
    if (alphas[:-1] == 0).any():
        raise UserError(f"beta_end={schedule.beta_end} leaves nothing of the video long before the last timestep: take a smaller one")
    if alphas[-1] == 0:
        alphas[-1] = 2.0**-24 if alphas[-2] > 2.0**-24 else alphas[-2] / 2
    return np.sqrt((1 - alphas) / alphas)


def between_levels(schedule: NoiseSchedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, levels s with a 0 at the end); timesteps of linspace have fractions, between which levels are interpolated."""
    t = spaced(schedule, steps, whole=False)
    known = levels(schedule)
    return t, np.append(np.interp(t, np.arange(len(known)), known), 0)


def by_levels(schedule: NoiseSchedule, steps: int, karras: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, levels s with a 0 at the end), evenly spaced, or in the seventh root of s (Karras et al., 2022, eq. 5)."""
    known = levels(schedule)
    if not karras:
        t = spaced(schedule, steps, extra=0 if schedule.timestep_spacing == "trailing" else 1)
        return t, np.append(known[t.astype(int)], 0)
    s = np.linspace(known[-1] ** (1 / 7), known[0] ** (1 / 7), steps) ** 7
    t = np.interp(np.log(s), np.log(known), np.arange(len(known)))
    return np.floor(t) if schedule.beta_schedule == "squaredcos_cap_v2" else t.round(), np.append(s, 0)  # as diffusers has it
