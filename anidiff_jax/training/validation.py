"""A loss that can be compared: fixed clips, noise and timesteps, told apart by how noisy they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.diffusion.schedule import add_noise, target
from anidiff_jax.training.step import Task
from anidiff_jax.weights.tree import Tree


@partial(jax.jit, static_argnames="task")
def _loss(task: Task, trained: Tree, unet: Tree, clip, text, timestep, key):
    noise = jax.random.normal(key, clip.shape)
    noisy = add_noise(task.schedule, clip, noise, timestep)
    prediction = task.networks.unet.apply(task.unet_variables(trained, unet), noisy[None], timestep[None], text[None])[0]
    return jnp.mean(jnp.square(prediction - target(task.schedule, clip, noise, timestep)))


def bucket_losses(task: Task, trained: Tree, frozen: dict[str, Tree], latents, text, buckets: int = 5, seed: int = 0) -> list[float]:
    """Mean squared error of the prediction in each of `buckets` equal ranges of timesteps, from the least noise to the most.

    latents (clips, f, h, w, c) and text (clips, tokens, d). Every clip is met once in the middle of each range, with noise that
    depends on `seed` and its place alone, so two networks are asked the same questions. Not weighted, no dropout.
    """
    steps = (np.arange(buckets) + 0.5) * task.schedule.num_train_timesteps / buckets
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(latents))]
    one = lambda i, step: _loss(task, trained, frozen["unet"], latents[i], text[i], jnp.int32(step), keys[i])
    return np.mean(jax.device_get([[one(i, step) for i in range(len(latents))] for step in steps]), axis=1).tolist()
