"""The compiled loop from noise to a video: network, guidance and solver, step after step."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from anidiff_jax.diffusion import rows as solver_rows
from anidiff_jax.models.unet import UNet
from anidiff_jax.weights.tree import Tree


@dataclass(frozen=True)
class Program:
    """What decides the compiled program. All else are numbers: other ones compile nothing anew."""

    unet: UNet


class Numbers(NamedTuple):
    """How strongly each thing acts; float32."""

    guidance_scale: Any


@partial(jax.jit, static_argnums=0, donate_argnames="latents")
def denoise(program: Program, params: Tree, lora: Tree, latents, text, rows: solver_rows.Row, numbers: Numbers, key=None):
    """latents (1, f, h, w, c) of noise → of a video. text (2, tokens, d): empty and prompt; (1, tokens, d): no guidance.

    text may be another for each frame, (1 or 2, f, tokens, d), where the network takes that.
    Classifier-free guidance (Ho & Salimans, 2022): away from the empty prompt's prediction, by `guidance_scale`.
    rows: the solver's. key: of the noise that it adds on the way; None: it adds none.
    """

    def one_row(state, numbered):
        number, row = numbered
        prediction = guided(program, params, lora, state[0] * row.scale, text, row, numbers)
        noise = jnp.zeros_like(prediction) if key is None else solver_rows.fresh_noise(key, number, prediction.shape)
        return solver_rows.step(row, state, prediction, noise), None

    numbered = (jnp.arange(len(rows.timestep)), rows)
    return jax.lax.scan(one_row, solver_rows.start(rows, latents), numbered)[0][0]


def guided(program: Program, params: Tree, lora: Tree, x, text, row: solver_rows.Row, numbers: Numbers):
    """What the network predicts for x (1, f, h, w, c), led by the prompt."""
    predictions = predict(program, params, lora, x, text, row)
    if text.shape[0] == 1:
        return predictions
    empty, prompt = jnp.split(predictions, 2)
    return empty + numbers.guidance_scale * (prompt - empty)


def predict(program: Program, params: Tree, lora: Tree, x, text, row: solver_rows.Row) -> Any:
    """The network's prediction for x (1, f, h, w, c) under each text (n, …) → (n, f, h, w, c)."""
    x = jnp.repeat(x, text.shape[0], axis=0)
    return program.unet.apply({"params": params, "lora": lora}, x, jnp.full(x.shape[0], row.timestep), text)
