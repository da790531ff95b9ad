"""The compiled loop from noise to a video: network, guidance and solver, step after step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.diffusion import rows as solver_rows
from anidiff_jax.diffusion.guidance import Guidance, perturbed_scale, rescaled
from anidiff_jax.diffusion.windows import over_windows
from anidiff_jax.models.unet import UNet
from anidiff_jax.weights.tree import Tree


@dataclass(frozen=True)
class Program:
    """What decides the compiled program. All else are numbers: other ones compile nothing anew.

    rescale, interval, freeu: whether there is such a thing. perturbed: attentions of perturbed-attention guidance, "" for none.
    window: frames that the network sees together, 0 for all; so many windows at_once.
    """

    unet: UNet
    rescale: bool = False
    interval: bool = False
    freeu: bool = False
    perturbed: str = ""
    window: int = 0
    at_once: int = 1


class Numbers(NamedTuple):
    """How strongly each thing acts."""

    guidance_scale: np.float32
    rescale: np.float32
    pag_scale: np.float32
    pag_adaptive_scale: np.float32
    freeu: np.ndarray  # (4,)
    guided: np.ndarray  # (rows,) bool, whether there is guidance
    starts: np.ndarray  # (rows, windows) int32, where the windows begin


def numbers_of(guidance_scale: float, guidance: Guidance, rows: int, starts: np.ndarray | None = None) -> Numbers:
    """The numbers of a guidance over so many rows. starts: of the windows, where there are any."""
    return Numbers(
        guidance_scale=np.float32(guidance_scale),
        rescale=np.float32(guidance.rescale),
        pag_scale=np.float32(guidance.pag_scale),
        pag_adaptive_scale=np.float32(guidance.pag_adaptive_scale),
        freeu=np.asarray(guidance.freeu or (1, 1, 1, 1), np.float32),
        guided=guidance.rows(rows),
        starts=np.zeros((rows, 1), np.int32) if starts is None else starts,
    )


@partial(jax.jit, static_argnums=0, donate_argnames="latents")
def denoise(program: Program, params: Tree, lora: Tree, latents, text, rows: solver_rows.Row, numbers: Numbers, key=None):
    """latents (1, f, h, w, c) of noise → of a video. text (2, tokens, d): empty and prompt; (1, tokens, d): no guidance.

    text may be another for each frame, (1 or 2, f, tokens, d), where the network takes that.
    rows: the solver's. key: of the noise that it adds on the way; None: it adds none.
    """
    variables = {"params": params, "lora": lora}

    def one_row(state, numbered):
        number, row = numbered
        ask = partial(predict, program, variables, state[0] * row.scale, row.timestep, numbers, jnp.asarray(numbers.starts)[number])
        if program.interval:
            prediction = jax.lax.cond(
                jnp.asarray(numbers.guided)[number], lambda: guided(program, ask, text, row.timestep, numbers), lambda: ask(text[-1:])
            )
        else:
            prediction = guided(program, ask, text, row.timestep, numbers)
        noise = jnp.zeros_like(prediction) if key is None else solver_rows.fresh_noise(key, number, prediction.shape)
        return solver_rows.step(row, state, prediction, noise), None

    numbered = (jnp.arange(len(rows.timestep)), rows)
    return jax.lax.scan(one_row, solver_rows.start(rows, latents), numbered)[0][0]


def guided(program: Program, ask: Callable, text, timestep, numbers: Numbers):
    """The prediction, led by the prompt; `ask` is the network.

    Classifier-free guidance (Ho & Salimans, 2022): away from the empty prompt's prediction, by `guidance_scale`. Perturbed-attention
    guidance (Ahn et al., 2024, arXiv:2403.17377): away from that of a network whose attention sees nothing, by `pag_scale`.
    """
    prediction = prompt = ask(text)
    if text.shape[0] == 2:
        empty, prompt = jnp.split(prediction, 2)
        prediction = empty + numbers.guidance_scale * (prompt - empty)
    if program.perturbed:
        scale = perturbed_scale(numbers.pag_scale, numbers.pag_adaptive_scale, timestep)
        prediction = prediction + scale * (prompt - ask(text[-1:], perturbed=True))
    return rescaled(prediction, prompt, numbers.rescale) if program.rescale else prediction


def predict(program: Program, variables: Tree, x, timestep, numbers: Numbers, starts, text, perturbed: bool = False) -> Any:
    """The network's prediction for x (1, f, h, w, c) under each text (n, …) → (n, f, h, w, c)."""
    unet = program.unet.clone(settings=replace(program.unet.settings, perturbed=program.perturbed)) if perturbed else program.unet
    free = (numbers.freeu,) if program.freeu else ()
    ask = lambda x, text: unet.apply(variables, x, jnp.full(x.shape[0], timestep), text, *free)
    if program.window:
        return over_windows(ask, x, text, starts, program.window, program.at_once)
    return ask(jnp.repeat(x, text.shape[0], axis=0), text)
