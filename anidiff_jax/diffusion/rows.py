"""What a solver does between two evaluations of the network: a small matrix, made on the host, and a product on the device.

Whatever a solver does to the latents is linear: in the latents, in what it remembers, in the network's prediction and in fresh noise. So
`solvers.py` writes each one as its paper has it, but on unit vectors in the place of arrays, once, in float64. What comes out is a matrix
for each evaluation, and all that is left to the device is to multiply by it: one compiled loop for every solver. Clipping alone is not
linear; what is clipped has a vector of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Row(NamedTuple):
    """One evaluation of the network and what follows from it, float32; in a table every field has a leading axis of rows.

    Values are, in this order: latents, memory (slots), prediction, fresh noise, and the clipped clean latents where they are clipped.
    """

    timestep: np.ndarray  # ()
    scale: np.ndarray  # () the network sees the latents times this
    matrix: np.ndarray  # (1 + slots, values) to the new latents and memory
    clean: np.ndarray | None  # (values - 1,) to the clean latents, before they are clipped


def step(row: Row, state, prediction, noise):
    """state (1 + slots, …): latents and memory → the same after this row. prediction, noise (…)."""
    values = jnp.concatenate([state, prediction[None], noise[None]])
    if row.clean is not None:
        clean = jnp.tensordot(row.clean, values, 1, precision="highest")
        values = jnp.concatenate([values, jnp.clip(clean, -1, 1)[None]])
    return jnp.tensordot(row.matrix, values, 1, precision="highest")


def start(rows: Row, latents):
    """latents (videos, …) → the state before the first row (videos, 1 + slots, …): latents, and an empty memory."""
    slots = rows.matrix.shape[1] - 1
    return jnp.pad(latents[:, None], [(0, 0), (0, slots), *[(0, 0)] * (latents.ndim - 1)])


def fresh_noise(key, row, shape: tuple[int, ...]):
    """The noise of a row, standard normal: from the video's key and the row's number alone."""
    return jax.random.normal(jax.random.fold_in(key, row), shape)


class Asked(NamedTuple):
    """Where the network is asked, an entry a row: scale × latents = alpha × clean latents + sigma × noise."""

    timestep: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    scale: np.ndarray

    def noised(self, clean, noise):
        """The latents of the first row, of given clean latents and noise."""
        return np.float32(self.alpha[0] / self.scale[0]) * clean + np.float32(self.sigma[0] / self.scale[0]) * noise

    def after(self) -> np.ndarray:
        """(rows, 2) float32: of what the latents are made after each row: of so much of the clean ones and so much noise."""
        parts = np.stack([self.alpha / self.scale, self.sigma / self.scale], axis=1)
        return np.append(parts[1:], [[1, 0]], axis=0).astype(np.float32)


class Here(NamedTuple):
    """What is at hand in a row, each as a vector of coefficients on the row's values."""

    latents: np.ndarray
    memory: Sequence[np.ndarray]
    prediction: np.ndarray
    noise: np.ndarray
    clean: np.ndarray


@dataclass(frozen=True)
class Solver:
    """Rows, places of memory, and update(row's number, what is at hand) → [latents, *memory]."""

    asked: Asked
    slots: int
    update: Callable[[int, Here], Sequence[np.ndarray]]
    start: float = 1.0


def estimates(prediction_type: str, alpha, sigma, seen, prediction):
    """(clean latents, noise) by the prediction, where seen = alpha × clean + sigma × noise."""
    if prediction_type == "epsilon":
        return (seen - sigma * prediction) / alpha, prediction
    return alpha * seen - sigma * prediction, alpha * prediction + sigma * seen


class Table(NamedTuple):
    """All rows of a video, from noise to image."""

    rows: Row
    start: float  # deviation of the noise to start from
    draws: bool  # whether fresh noise is used at all
    asked: Asked


def table(solver: Solver, prediction_type: str, clip: bool) -> Table:
    """The solver's rows as numbers."""
    asked, matrices, cleans = solver.asked, [], []
    for i in range(len(asked.timestep)):
        latents, *memory, prediction, noise, clipped = np.eye(solver.slots + 4)
        clean, _ = estimates(prediction_type, asked.alpha[i], asked.sigma[i], asked.scale[i] * latents, prediction)
        matrices.append(np.stack(solver.update(i, Here(latents, memory, prediction, noise, clipped if clip else clean))))
        cleans.append(clean[:-1])
    matrix = np.stack(matrices)
    columns = (asked.timestep, asked.scale, matrix if clip else matrix[..., :-1], np.stack(cleans))
    timestep, scale, matrix, clean = (np.asarray(column, np.float32) for column in columns)
    draws = bool((matrix[..., solver.slots + 2] != 0).any())
    return Table(Row(timestep, scale, matrix, clean if clip else None), solver.start, draws, asked)
