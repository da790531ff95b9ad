"""A loss that can be read and compared: fixed clips, noise and timesteps, told apart by how noisy they are."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.loader import Clips, Videos
from anidiff_jax.data.records import Records
from anidiff_jax.diffusion.schedule import add_noise, target
from anidiff_jax.models.vae import encode_frames
from anidiff_jax.parallel import on_each_device
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.text import encode_text
from anidiff_jax.training.step import Task, draw_latents
from anidiff_jax.weights.tree import Tree

BUCKETS = 5


class Validation:
    """Clips that never train, encoded once."""

    def __init__(self, config: TrainConfig, records: Records, pipeline: AnimateDiffPipeline, task: Task):
        fixed = replace(config, text_dropout_rate=0.0, random_flip=False)
        clips = Clips(records, config.seed, Videos(records, fixed, lambda caption: pipeline.tokenize([caption])[0]))
        chosen = [clips(i, i) for i in range(min(len(records), config.validation_clips))]
        self.task, params = task, pipeline.model.params
        encode = jax.jit(lambda vae, frames: encode_frames(task.networks.vae, vae, frames))
        draw = lambda posterior, i: draw_latents(task, jax.tree.map(lambda x: x[None], posterior), jax.random.key(i)[None])[0]
        self.latents = np.stack([np.asarray(draw(encode(params["vae"], clip["pixels"]), i)) for i, clip in enumerate(chosen)])
        states = [encode_text(task.networks.text_encoder, params["text_encoder"], clip["ids"][None])[0] for clip in chosen]
        self.text = np.stack([np.asarray(x) for x in states])

    def __call__(self, trained: Tree, frozen: dict[str, Tree]) -> dict[str, float]:
        """The mean loss, and that of each bucket: 0 is the least noise."""
        buckets = bucket_losses(self.task, trained, frozen, self.latents, self.text)
        return {"validation_loss": float(np.mean(buckets)), **{f"validation_loss_{i}": loss for i, loss in enumerate(buckets)}}


def bucket_losses(task: Task, trained: Tree, frozen: dict[str, Tree], latents, text, buckets: int = BUCKETS, seed: int = 0) -> list[float]:
    """Mean squared error of the prediction in each of `buckets` equal ranges of timesteps, from the least noise to the most.

    latents (clips, f, h, w, c) and text (clips, tokens, d). Every clip is met once in the middle of each range, with noise that
    depends on `seed` and its place alone, so two networks are asked the same questions. Not weighted, no dropout.
    """
    devices, count = jax.local_device_count(), len(latents)
    filled = np.arange(-(-count // devices) * devices) % count  # the last round of devices may work twice on a clip
    part = lambda x: np.asarray(x)[filled].reshape(devices, -1, *np.shape(x)[1:])
    clips = {"latents": part(latents), "text": part(text), "place": part(np.arange(count, dtype=np.uint32))}
    losses = _losses(task, buckets, seed)(trained, frozen["unet"], clips)  # devices clips buckets
    return np.asarray(losses).reshape(-1, buckets)[:count].mean(0).tolist()


@cache
def _losses(task: Task, buckets: int, seed: int):
    """(trained, unet, clips) → (clips, buckets), on each device for its own clips."""
    steps = jnp.asarray((np.arange(buckets) + 0.5) * task.schedule.num_train_timesteps / buckets, jnp.int32)

    def one_clip(variables, clip):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), clip["place"]), clip["latents"].shape)

        def one_step(step):
            noisy = add_noise(task.schedule, clip["latents"], noise, step)
            prediction = task.networks.unet.apply(variables, noisy[None], step[None], clip["text"][None])[0]
            return jnp.mean(jnp.square(prediction - target(task.schedule, clip["latents"], noise, step)))

        return jax.lax.map(one_step, steps)

    def losses(trained, unet, clips):
        variables = task.unet_variables(trained, unet)
        return jax.lax.map(lambda clip: one_clip(variables, clip), clips)

    return on_each_device(losses)
