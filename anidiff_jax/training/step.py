"""One optimizer update: encode, add noise, predict it, learn. Pure functions of (state, frozen, batch)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from anidiff_jax.diffusion.schedule import NoiseSchedule, add_noise, loss_weight, target
from anidiff_jax.lora import scaled
from anidiff_jax.models.networks import Networks
from anidiff_jax.models.vae import Posterior, encode_frames
from anidiff_jax.parallel import AXIS
from anidiff_jax.random import purpose, quick
from anidiff_jax.training.state import TrainState
from anidiff_jax.weights.tree import Tree, merge


@dataclass(frozen=True)
class Task:
    """What is computed, apart from weights and data.

    lora_scale: None when the UNet's own parameters train. lora_dtype: adapters are rounded to it before they are used.
    loss_weighting, snr_gamma: see `schedule.loss_weight`. timesteps: the first that is drawn, and the one after the last;
    None: all. timestep_bias: a step, and how many times as often those from it on are drawn. noise_offset: deviation of a
    shift of each frame's and channel's noise. ema_decay: of the moving average of what trains; 0 keeps none.
    """

    networks: Networks
    schedule: NoiseSchedule
    seed: int
    lora_scale: float | None = None
    lora_dtype: str = "float32"
    loss_weighting: str = "none"
    snr_gamma: float | None = None
    timesteps: tuple[int, int] | None = None
    timestep_bias: tuple[int, float] | None = None
    noise_offset: float = 0.0
    ema_decay: float = 0.0

    def unet_variables(self, trained: Tree, frozen: Tree) -> dict[str, Tree]:
        """Flax variables of the UNet from what trains and what does not."""
        if self.lora_scale is None:
            return {"params": merge(frozen, trained)}
        lora = jax.tree.map(lambda x: rounded(x, self.lora_dtype), trained)
        return {"params": frozen, "lora": scaled(lora, self.lora_scale)}


def rounded(x, dtype):
    """x as `dtype` holds it, in its own type and with its own gradient: those of a fresh adapter are too small for float16.

    A GPU's XLA leaves out a rounding there and back that it can see.
    """
    if x.dtype == jnp.dtype(dtype):
        return x
    held = jax.lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)
    return x + jax.lax.stop_gradient(held - x)


def encode_clips(task: Task, frozen: dict[str, Tree], pixels, keys):
    """uint8 frames (b, f, H, W, 3), a key a clip → latents (b, f, h, w, c), drawn from the VAE's posterior and scaled."""
    b, f, *image = pixels.shape
    frames = pixels.reshape(b * f, *image)  # b f h w c -> (b f) h w c
    posterior = encode_frames(task.networks.vae, frozen["vae"], frames)
    return draw_latents(task, jax.tree.map(lambda x: x.reshape(b, f, *x.shape[1:]), posterior), keys)  # (b f) h w c -> b f h w c


def draw_latents(task: Task, posterior: Posterior, keys):
    """Posterior of (b, f, h, w, c), a key a clip → latents as the UNet knows them."""
    config = task.networks.vae.config
    return (jax.vmap(Posterior.sample)(posterior, keys) - config.shift_factor) * config.scaling_factor


def draw_timestep(task: Task, key):
    """The step of noise that a clip is asked about: uniform, or those from `timestep_bias` on more often; int32."""
    first, end = task.timesteps or (0, task.schedule.num_train_timesteps)
    if task.timestep_bias is None:
        return jax.random.randint(key, (), first, end)
    begin, multiplier = task.timestep_bias
    share = np.cumsum(np.where(np.arange(first, end) < begin, 1.0, multiplier))
    return first + jnp.searchsorted(share[:-1] / share[-1], jax.random.uniform(key), side="right").astype(jnp.int32)


def denoising_loss(trained, frozen, task: Task, latents, text, keys):
    """Mean over clips of the prediction's squared error, weighted by the timestep: latents (b, f, h, w, c), text (b, tokens, d), keys (b,).

    All frames of a clip share their timestep, and each has noise of its own. What is drawn for a clip follows from its key.
    """

    def question(clip, key):
        for_step, for_noise, for_dropout = jax.random.split(key, 3)
        timestep = draw_timestep(task, for_step)
        noise = jax.random.normal(for_noise, clip.shape)
        if task.noise_offset:
            shift = jax.random.normal(jax.random.fold_in(for_noise, 1), (clip.shape[0], 1, 1, clip.shape[-1]))  # f 1 1 c
            noise = noise + task.noise_offset * shift
        weight = loss_weight(task.schedule, timestep, task.loss_weighting, task.snr_gamma)
        return add_noise(task.schedule, clip, noise, timestep), timestep, target(task.schedule, clip, noise, timestep), weight, for_dropout

    noisy, timesteps, answers, weights, for_dropout = jax.vmap(question)(latents, keys)
    variables = task.unet_variables(trained, frozen["unet"])
    predict = task.networks.unet.apply
    if task.networks.unet.settings.lora_dropout:  # clip by clip, since dropout draws for all that it sees from one key
        one = lambda noisy, t, text, key: predict(variables, noisy[None], t[None], text[None], rngs={"dropout": quick(key)})[0]
        clips = (noisy, timesteps, text, for_dropout)
        # At full size on a CPU, vmap takes 10.4 GB of temporary memory where one clip without it takes 7.5.
        predictions = jax.vmap(one)(*clips) if len(noisy) > 1 else one(*(x[0] for x in clips))[None]
    else:
        predictions = predict(variables, noisy, timesteps, text)
    return jnp.mean(weights * jnp.square(predictions - answers).mean((1, 2, 3, 4)))


def make_update(task: Task, optimizer: optax.GradientTransformation) -> Callable:
    """update(state, frozen, batch) → (state, {"loss", "grad_norm"}) for one device among those of AXIS; see `unless_lost` for a bad one.

    batch: pixels uint8 (micro-batches, clips, f, H, W, 3) and ids (…, tokens), or from the latent cache mean and std
    (…, f, h, w, c) and text (…, tokens, d); index (…) the clip's place in the stream. Every random draw is keyed by it, so a
    clip's noise does not depend on which device gets it.
    """

    def inputs(frozen, clips, keys):
        if "mean" in clips:
            posterior = Posterior(clips["mean"].astype(jnp.float32), clips["std"].astype(jnp.float32))
            return draw_latents(task, posterior, keys), clips["text"]
        text = task.networks.text_encoder.apply({"params": frozen["text_encoder"]}, clips["ids"])
        return encode_clips(task, frozen, clips["pixels"], keys), text

    def gradients(params, frozen, clips):  # one micro-batch
        keys = jax.vmap(lambda index: jax.random.fold_in(purpose(task.seed, "clip"), index))(clips["index"])
        keys = jax.vmap(jax.random.split)(keys)  # (clips, 2)
        latents, text = inputs(frozen, clips, keys[:, 0])
        return jax.value_and_grad(denoising_loss)(params, frozen, task, latents, text, keys[:, 1])

    def update(state: TrainState, frozen: dict[str, Tree], batch: dict[str, Any]):
        zeros = (jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params))
        count = batch["index"].shape[0]
        micro = lambda i: jax.tree.map(lambda x: x[i], batch)
        add = lambda i, total: jax.tree.map(jnp.add, total, gradients(state.params, frozen, micro(i)))
        # A loop whose length XLA cannot see: it would undo a loop of one turn, and then keep every layer's activations until
        # the global norm of the gradients is known.
        total = jax.lax.fori_loop(0, jax.lax.optimization_barrier(jnp.int32(count)), add, zeros)
        loss, grads = jax.lax.pmean(jax.tree.map(lambda x: x / count, total), AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = state.advance(optax.apply_updates(state.params, updates), opt_state, task.ema_decay)
        grad_norm = optax.global_norm(grads)
        return unless_lost(grad_norm, new, state), {"loss": loss, "grad_norm": grad_norm}

    return update


def unless_lost(grad_norm, new: TrainState, old: TrainState) -> TrainState:
    """The new state; where the gradient is not finite, and would make all that trains so for good, the old one, which counts on."""
    finite = jnp.isfinite(grad_norm)
    return jax.tree.map(lambda new, old: new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(finite, new, old), new, old)
