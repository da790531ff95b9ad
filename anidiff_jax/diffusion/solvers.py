"""The solvers, as their papers have them; `rows.py` says what the vectors are that they compute with."""

from collections.abc import Callable
from functools import partial

import numpy as np

from anidiff_jax.diffusion import rows
from anidiff_jax.diffusion.rows import Asked, Solver, Table, estimates
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.diffusion.spacing import alpha_bar, between_levels, by_levels, spaced
from anidiff_jax.errors import UserError


def table(schedule: NoiseSchedule, scheduler: str = "ddim", steps: int = 25, eta: float = 0.0, begin: int = 0) -> Table:
    """The rows of a solver, without its first `begin` steps; eta is the share of DDPM's noise that ddim adds.

    Raises UserError for what the solver cannot do.
    """
    check_name(scheduler)
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise UserError(f"num_inference_steps={steps} must be between 1 and num_train_timesteps={schedule.num_train_timesteps}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta} must be between 0, no noise, and 1, as much as DDPM's")
    if eta and scheduler != "ddim":
        raise UserError(f"eta={eta} is for scheduler='ddim' alone: leave it out with {scheduler!r}")
    solver = ddim(schedule, steps, begin, eta) if scheduler == "ddim" else SOLVERS[scheduler](schedule, steps, begin)
    if schedule.prediction_type == "epsilon" and (solver.asked.alpha == 0).any():
        raise UserError(
            f"nothing of the video is left at timestep {solver.asked.timestep[0]:.0f}, where scheduler={scheduler!r} cannot begin with "
            "predicted noise: take prediction_type v_prediction, or rescale_betas_zero_snr false and a smaller beta_end"
        )
    return rows.table(solver, schedule.prediction_type, schedule.clip_sample)


def check_name(scheduler: str) -> None:
    if scheduler not in SOLVERS:
        raise UserError(f"scheduler={scheduler!r} is not one of {', '.join(SOLVERS)}")


# On latents that are √ᾱ clean + √(1-ᾱ) noise, as the network sees them


def on_alphas(schedule: NoiseSchedule, t: np.ndarray) -> Asked:
    a = alpha_bar(schedule, t)
    return Asked(t, np.sqrt(a), np.sqrt(1 - a), np.ones_like(t))


def ddim(schedule: NoiseSchedule, steps: int, begin: int = 0, eta: float = 0.0) -> Solver:
    """Song et al., 2020, arXiv:2010.02502, eq. 12 and 16. A step is as long in timesteps however they are spaced, as in diffusers."""
    t = spaced(schedule, steps)[begin:]
    a, b = alpha_bar(schedule, t), alpha_bar(schedule, t - schedule.num_train_timesteps // steps)
    fresh = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
    asked = on_alphas(schedule, t)

    def update(i, here):
        _, noise = estimates(schedule.prediction_type, asked.alpha[i], asked.sigma[i], here.latents, here.prediction)
        return [np.sqrt(b[i]) * here.clean + np.sqrt(np.maximum(1 - b[i] - fresh[i] ** 2, 0)) * noise + fresh[i] * here.noise]

    return Solver(asked, 0, update)


def ddpm(schedule: NoiseSchedule, steps: int, begin: int = 0) -> Solver:
    """Ho et al., 2020, arXiv:2006.11239, eq. 7, from each timestep to the next one visited; the smaller of its two variances."""
    t = spaced(schedule, steps)[begin:]
    a = alpha_bar(schedule, t)
    b = np.append(a[1:], 1)
    beta = 1 - a / b

    def update(i, here):
        mean = np.sqrt(b[i]) * beta[i] / (1 - a[i]) * here.clean + np.sqrt(a[i] / b[i]) * (1 - b[i]) / (1 - a[i]) * here.latents
        return [mean + np.sqrt((1 - b[i]) / (1 - a[i]) * beta[i]) * here.noise]

    return Solver(on_alphas(schedule, t), 0, update)


def lcm(schedule: NoiseSchedule, steps: int, begin: int = 0) -> Solver:
    """Latent consistency (Luo et al., 2023, arXiv:2310.04378, algorithm 2): to the clean latents and back to less noise.

    The steps are among the 50 that such models are distilled on, whatever the spacing and its offset.
    """
    n, distilled = schedule.num_train_timesteps, min(50, schedule.num_train_timesteps)
    if steps > distilled:
        raise UserError(f"num_inference_steps={steps} is too many for scheduler='lcm': take 4 to 8, at most {distilled}")
    known = np.arange(distilled, 0, -1) * (n // distilled) - 1
    t = known[np.linspace(0, distilled, steps, endpoint=False).astype(int)].astype(np.float64)[begin:]
    ahead = alpha_bar(schedule, np.append(t[1:], 0))
    skip, out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / np.sqrt((10 * t) ** 2 + 0.25)

    def update(i, here):
        clean = out[i] * here.clean + skip[i] * here.latents
        return [np.sqrt(ahead[i]) * clean + np.sqrt(1 - ahead[i]) * here.noise if i < len(t) - 1 else clean]

    return Solver(on_alphas(schedule, t), 0, update)


ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(schedule: NoiseSchedule, steps: int, begin: int = 0) -> Solver:
    """Pseudo linear multistep (Liu et al., 2022, arXiv:2202.09778, eq. 9 and 12), as Stable Diffusion runs it.

    Not by Runge-Kutta, but by asking twice on its first step does it get going: there is one row more than steps.
    """
    if schedule.clip_sample:
        raise UserError("clip_sample is not for scheduler='pndm', which never has the clean latents: take clip_sample false")
    t = spaced(schedule, steps)[begin:]
    t, stride = np.concatenate([t[:2], t[1:]]), schedule.num_train_timesteps // steps
    base = t + np.where(np.arange(len(t)) == 1, stride, 0)  # the second row does the first step again
    a, b = alpha_bar(schedule, base), alpha_bar(schedule, base - stride)

    def update(i, here):
        first, *past = here.memory
        if i == 1:
            latents, prediction = first, (here.prediction + past[0]) / 2
        else:
            past = [here.prediction, *past]
            weights = ADAMS_BASHFORTH[min(max(i - 1, 0), 3)]
            latents, prediction = here.latents, sum(w * p for w, p in zip(weights, past, strict=False))
        clean, noise = estimates(schedule.prediction_type, np.sqrt(a[i]), np.sqrt(1 - a[i]), latents, prediction)
        return [np.sqrt(b[i]) * clean + np.sqrt(1 - b[i]) * noise, latents, *past[:3]]

    return Solver(on_alphas(schedule, t), 4, update)


# On the same latents, by the level s = √(1-ᾱ) / √ᾱ of their noise


def dpmpp_2m(schedule: NoiseSchedule, steps: int, begin: int = 0, karras: bool = False, sde: bool = False) -> Solver:
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv:2211.01095, algorithm 2), sde: its stochastic form. First and last step are of order 1."""
    t, s = (x[begin:] for x in by_levels(schedule, steps, karras))
    steps = len(t)
    alpha = 1 / np.sqrt(1 + s**2)
    sigma = s * alpha
    ratio = s[1:] / s[:-1]  # e⁻ʰ

    def update(i, here):
        clean = here.clean
        if 0 < i < steps - 1:
            clean = clean + np.log(ratio[i]) / np.log(ratio[i - 1]) / 2 * (clean - here.memory[0])
        shrink, r = sigma[i + 1] / sigma[i], ratio[i]
        if sde:
            moved = shrink * r * here.latents + alpha[i + 1] * (1 - r**2) * clean + sigma[i + 1] * np.sqrt(1 - r**2) * here.noise
        else:
            moved = shrink * here.latents + alpha[i + 1] * (1 - r) * clean
        return [moved, here.clean]

    return Solver(Asked(t, alpha[:-1], sigma[:-1], np.ones(steps)), 1, update)


def unipc(schedule: NoiseSchedule, steps: int, begin: int = 0) -> Solver:
    """UniPC-2 with B(h) = eʰ - 1, on the clean latents (Zhao et al., 2023, arXiv:2302.04867): each step is corrected at the next."""
    t, s = (x[begin:] for x in by_levels(schedule, steps))
    steps = len(t)
    alpha = 1 / np.sqrt(1 + s**2)
    sigma = s * alpha
    order = [min(2, i + 1, steps - i) for i in range(steps)]

    def move(i, latents, clean, before, ahead=None):
        """From level i to i + 1 with the clean latents there, those a level before, and, to correct, those a level ahead."""
        r = s[i + 1] / s[i]
        slopes = []
        if order[i] == 2:
            place = np.log(s[i] / s[i - 1]) / -np.log(r)  # of the level before, in steps
            slopes = [(before - clean) / place]
        if ahead is not None:
            slopes.append(ahead - clean)
        weights = np.full(len(slopes), 0.5)
        if len(slopes) == 2:
            h, b = np.log(r), r - 1
            weights = np.linalg.solve([[1, 1], [place, 1]], [(b / h - 1) / b, 2 * ((b / h - 1) / h - 1 / 2) / b])
        target = clean + sum(w * slope for w, slope in zip(weights, slopes, strict=True))
        return sigma[i + 1] / sigma[i] * latents + alpha[i + 1] * (1 - r) * target

    def update(i, here):
        last, clean, before = here.memory
        latents = here.latents if i == 0 else move(i - 1, last, clean, before, here.clean)
        return [move(i, latents, here.clean, clean), latents, here.clean, clean]

    return Solver(Asked(t, alpha[:-1], sigma[:-1], np.ones(steps)), 3, update)


# On latents that are clean + s × noise (Karras et al., 2022, arXiv:2206.00364); the network sees them brought to a variance of 1


def on_levels(schedule: NoiseSchedule, t: np.ndarray, s: np.ndarray, slots: int, update: Callable) -> Solver:
    alpha = 1 / np.sqrt(1 + s**2)
    start = np.sqrt(s[0] ** 2 + 1) if schedule.timestep_spacing == "leading" else s[0]
    return Solver(Asked(t, alpha, s * alpha, alpha), slots, update, float(start))


def euler(schedule: NoiseSchedule, steps: int, begin: int = 0, ancestral: bool = False) -> Solver:
    """Euler's method on dx/ds = (x - clean) / s (Karras et al., 2022); ancestral: below the aim, and back to it with fresh noise."""
    t, s = (x[begin:] for x in between_levels(schedule, steps))
    down, up = s[1:], np.zeros(len(t))
    if ancestral:
        down, up = s[1:] ** 2 / s[:-1], s[1:] * np.sqrt(1 - (s[1:] / s[:-1]) ** 2)

    def update(i, here):
        slope = (here.latents - here.clean) / s[i]
        return [here.latents + (down[i] - s[i]) * slope + up[i] * here.noise]

    return on_levels(schedule, t, s[:-1], 0, update)


def lms(schedule: NoiseSchedule, steps: int, begin: int = 0) -> Solver:
    """Linear multistep: the polynomial through the last four slopes, integrated (Adams and Bashforth, 1883, for uneven steps)."""
    t, s = (x[begin:] for x in between_levels(schedule, steps))
    nodes, weights = np.polynomial.legendre.leggauss(2)  # exact up to the third degree

    def share(i, k, order):
        """Integral from s[i] to s[i + 1] of the polynomial that is 1 at s[i - k] and 0 at the others."""
        tau = (s[i] + s[i + 1]) / 2 + (s[i + 1] - s[i]) / 2 * nodes
        others = [s[i - j] for j in range(order) if j != k]
        return (s[i + 1] - s[i]) / 2 * weights @ np.prod([(tau - x) / (s[i - k] - x) for x in others] or [np.ones(2)], axis=0)

    def update(i, here):
        slopes = [(here.latents - here.clean) / s[i], *here.memory]
        order = min(i + 1, 4)
        return [here.latents + sum(share(i, k, order) * slopes[k] for k in range(order)), *slopes[:3]]

    return on_levels(schedule, t, s[:-1], 3, update)


def heun(schedule: NoiseSchedule, steps: int, begin: int = 0) -> Solver:
    """Heun's method (Karras et al., 2022, algorithm 1): Euler's step, then again with the mean slope of its ends; the last only once."""
    t, s = (x[begin:] for x in between_levels(schedule, steps))
    level = np.repeat(np.arange(len(t)), 2)[1:]

    def update(row, here):
        i = level[row]
        slope = (here.latents - here.clean) / s[i]
        if row % 2 == 0:
            return [here.latents + (s[i + 1] - s[i]) * slope, here.latents, slope]
        first, first_slope = here.memory
        return [first + (s[i] - s[i - 1]) * (first_slope + slope) / 2, first, first_slope]

    return on_levels(schedule, t[level], s[level], 2, update)


SOLVERS: dict[str, Callable[[NoiseSchedule, int, int], Solver]] = {
    "ddim": ddim,
    "euler": euler,
    "euler_a": partial(euler, ancestral=True),
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": partial(dpmpp_2m, karras=True),
    "dpmpp_sde": partial(dpmpp_2m, sde=True),
    "pndm": pndm,
    "lms": lms,
    "heun": heun,
    "unipc": unipc,
    "lcm": lcm,
    "ddpm": ddpm,
}
