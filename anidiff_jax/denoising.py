"""From noise to a video: network, guidance and solver, compiled into one program that is called step after step.

The program holds a step, not the loop: so another number of steps compiles nothing anew, a step without guidance costs half, the bar and
Ctrl-C work, and the compiled program is kept on disk, where JAX keeps none that calls Python. The host only says "go on": it sends the
next step while the device computes, and nothing but a number comes back.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.diffusion import rows as solver_rows
from anidiff_jax.diffusion.guidance import Guidance, perturbed_scale, rescaled
from anidiff_jax.diffusion.rows import Table
from anidiff_jax.diffusion.windows import over_windows
from anidiff_jax.models.unet import UNet
from anidiff_jax.weights.tree import Tree

AHEAD = 2  # steps that are sent before the first of them is done


@dataclass(frozen=True)
class Program:
    """What decides the compiled program. All else are numbers: other ones compile nothing anew.

    rescale, freeu: whether there is such a thing. perturbed: attentions of perturbed-attention guidance, "" for none.
    window: frames that the network sees together, 0 for all; so many windows at_once.
    """

    unet: UNet
    rescale: bool = False
    freeu: bool = False
    perturbed: str = ""
    window: int = 0
    at_once: int = 1

    @property
    def unguided(self) -> "Program":
        """Of the steps that are led by nothing."""
        return replace(self, rescale=False, perturbed="")


class Numbers(NamedTuple):
    """How strongly each thing acts."""

    guidance_scale: np.float32
    rescale: np.float32
    pag_scale: np.float32
    pag_adaptive_scale: np.float32
    freeu: np.ndarray  # (4,)


def numbers_of(guidance_scale: float, guidance: Guidance) -> Numbers:
    return Numbers(
        guidance_scale=np.float32(guidance_scale),
        rescale=np.float32(guidance.rescale),
        pag_scale=np.float32(guidance.pag_scale),
        pag_adaptive_scale=np.float32(guidance.pag_adaptive_scale),
        freeu=np.asarray(guidance.freeu or (1, 1, 1, 1), np.float32),
    )


class Kept(NamedTuple):
    """What is not painted anew: where mask is 0, latents are those of a given video, as noisy as its noise makes them. (…, f, h, w, c)"""

    clean: jax.Array
    noise: jax.Array
    mask: jax.Array  # one channel


class Turn(NamedTuple):
    """What is another in every step."""

    number: np.int32
    row: solver_rows.Row
    starts: np.ndarray  # (windows,) where windows begin
    after: np.ndarray  # (2,) how much of the clean latents and of the noise there is after the step


def denoise(
    program: Program,
    params: Tree,
    lora: Tree,
    latents,
    text,
    table: Table,
    numbers: Numbers,
    guided: np.ndarray,
    starts: np.ndarray | None = None,
    keys=None,
    kept: Kept | None = None,
    done: Callable[[], None] = lambda: None,
):
    """latents (videos, f, h, w, c) as the solver starts → of videos; one video, or one for each device.

    text (videos, 2, tokens, d): empty and prompt; (videos, 1, …): no guidance; or another for each frame, (videos, n, f, tokens, d).
    table: the solver's. guided (rows,): which of its rows are led. starts (rows, windows): where the windows begin, where there are any.
    keys (videos,): of the noise that the solver adds on the way; None: it adds none. done(): is called after each step; what it raises
    ends the loop.
    """
    state, rows, waiting = solver_rows.start(table.rows, latents), len(table.rows.timestep), []
    after = table.asked.after()
    for i in range(rows):
        row = jax.tree.map(lambda x: x[i], table.rows)  # noqa: B023  used at once
        turn = Turn(np.int32(i), row, np.zeros(1, np.int32) if starts is None else starts[i], after[i])
        which = program if guided[i] else program.unguided
        step = step_of(which, len(latents))
        state, tick = step(params, lora, numbers, turn, state, text if guided[i] else text[:, -1:], keys, kept)
        waiting.append(tick)
        if len(waiting) > AHEAD or i == rows - 1:
            for tick in waiting if i == rows - 1 else [waiting.pop(0)]:
                jax.block_until_ready(tick)
                done()
    return state[:, 0]


@cache
def step_of(program: Program, videos: int) -> Callable:
    """The compiled step: of one video, or of several on as many devices."""

    def step(params, lora, numbers, turn, state, text, key, kept):
        state = one_step(program, {"params": params, "lora": lora}, numbers, turn, state, text, key, kept)
        return state, turn.number + 1

    if videos > 1:
        return jax.pmap(step, in_axes=(None, None, None, None, 0, 0, 0, 0), donate_argnums=4, devices=jax.local_devices()[:videos])
    first, alone = (lambda tree: jax.tree.map(lambda x: x[0], tree)), (lambda x: x[None])
    one = lambda params, lora, numbers, turn, *video: jax.tree.map(alone, step(params, lora, numbers, turn, *map(first, video)))
    return jax.jit(one, donate_argnums=4)


def one_step(program: Program, variables: Tree, numbers: Numbers, turn: Turn, state, text, key, kept: Kept | None):
    """state (1 + slots, f, h, w, c): latents, and what the solver remembers → the same after this step."""
    row = turn.row

    def ask(text, perturbed=False):
        return predict(program, variables, state[:1] * row.scale, row.timestep, numbers, turn.starts, text, perturbed)

    prediction = guided_by(program, ask, text, row.timestep, numbers)[0]
    noise = jnp.zeros_like(prediction) if key is None else solver_rows.fresh_noise(key, turn.number, prediction.shape)
    state = solver_rows.step(row, state, prediction, noise)
    if kept is not None:
        there = turn.after[0] * kept.clean + turn.after[1] * kept.noise
        state = state.at[0].set(kept.mask * state[0] + (1 - kept.mask) * there)
    return state


def guided_by(program: Program, ask: Callable, text, timestep, numbers: Numbers):
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
