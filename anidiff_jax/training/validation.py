"""A loss that can be compared: fixed clips, noise and timesteps, told apart by how noisy they are."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.diffusion.schedule import add_noise, target
from anidiff_jax.training.step import Task
from anidiff_jax.weights.tree import Tree


def bucket_losses(task: Task, trained: Tree, frozen: dict[str, Tree], latents, text, buckets: int = 5, seed: int = 0) -> Sequence[float]:
    """Mean squared error of the prediction in each of `buckets` equal ranges of timesteps, from the least noise to the most.

    latents (clips, f, h, w, c) and text (clips, tokens, d). Every clip is met once in the middle of each range, with noise that
    depends on `seed` and its place alone, so two networks are asked the same questions. Not weighted, no dropout.
    """
    steps = (np.arange(buckets) + 0.5) * task.schedule.num_train_timesteps / buckets

    @jax.jit
    def one(trained, unet, clip, text, timestep, key):
        noise = jax.random.normal(key, clip.shape)
        noisy = add_noise(task.schedule, clip, noise, timestep)
        prediction = task.networks.unet.apply(task.unet_variables(trained, unet), noisy[None], timestep[None], text[None])[0]
        return jnp.mean(jnp.square(prediction - target(task.schedule, clip, noise, timestep)))

    def loss(i: int, timestep) -> float:
        return float(one(trained, frozen["unet"], latents[i], text[i], timestep, jax.random.fold_in(jax.random.key(seed), i)))

    return [float(np.mean([loss(i, jnp.int32(step)) for i in range(len(latents))])) for step in steps]
