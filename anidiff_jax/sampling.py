"""What is computed for a video, from noise and text states to frames; `pipeline.py` is what people call."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.denoising import Kept, Numbers, Program, denoise, numbers_of
from anidiff_jax.diffusion import solvers
from anidiff_jax.diffusion.free_init import FreeInit, renoised
from anidiff_jax.diffusion.guidance import Guidance
from anidiff_jax.diffusion.rows import Table
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.diffusion.windows import Context, noise_order
from anidiff_jax.errors import UserError
from anidiff_jax.inits import mask_of, picture_of, video_of
from anidiff_jax.models.vae import AutoencoderKL, encode_frames
from anidiff_jax.options import Options
from anidiff_jax.parallel import to_devices
from anidiff_jax.random import purpose
from anidiff_jax.weights.base import Model
from anidiff_jax.weights.tree import Tree

PIXELS_AT_ONCE = 512 * 512  # the VAE works on as many frames at a time as have this many pixels together


@dataclass(frozen=True)
class Plan:
    """How the videos of a call are made: all that does not depend on prompts and seeds.

    tables: of the solver, one for each of FreeInit's iterations. given, clean, mask: what is painted over, uint8 (f, H, W, 3), its latents,
    and where of these it is.
    """

    shape: tuple[int, int, int, int]
    tables: list[Table]
    numbers: Numbers
    guidance: Guidance
    program: Program
    context: Context
    free_noise: str
    free_init: FreeInit
    clean: Any
    mask: Any
    given: Any

    def noise(self, seed: int):
        """What a video starts from, standard normal (f, h, w, c)."""
        window, (frames, *rest) = self.program.window, self.shape
        if not window or self.free_noise == "none":
            return initial_noise(seed, self.shape)
        key_of = partial(jax.random.fold_in, purpose(seed, "free_noise"))
        permuted = lambda frame, count: np.asarray(jax.random.permutation(key_of(frame), count))
        order = noise_order(self.free_noise, frames, window, self.context.stride(window), permuted)
        return initial_noise(seed, (window, *rest))[order]

    def starts(self, rows: int) -> np.ndarray | None:
        """(rows, windows) where the windows begin, if there are any."""
        return self.context.starts(self.shape[0], self.program.window, rows) if self.program.window else None


def tables_of(schedule: NoiseSchedule, asked: Options, scheduler: str, steps: int, eta: float) -> list[Table]:
    """The solver's rows, of each of FreeInit's iterations; where a given video is painted over, only the last of them."""
    begin = steps - min(int(steps * asked.strength), steps) if asked.has_init else 0
    if begin and begin == steps:
        raise UserError(f"strength {asked.strength} of {steps} steps is less than one step: take more of either")
    free_init = asked.free_init
    return [solvers.table(schedule, scheduler, free_init.steps(i, steps), eta, begin) for i in range(max(1, free_init.iterations))]


def plan_of(model: Model, asked: Options, size: tuple[int, int, int], tables: list[Table], guidance_scale: float, usual: int) -> Plan:
    """size: frames, height, width. usual: frames that the model is made for. UserError for what it cannot do."""
    (frames, height, width), networks = size, model.networks
    check_size(model, *size, windows=True)
    if asked.clip_skip >= (layers := networks.text_encoder.config.layers):
        raise UserError(f"clip_skip {asked.clip_skip} must be less than the text encoder's {layers} layers")
    side, channels = networks.vae.config.factor, networks.vae.config.latent_channels
    window = asked.context.window(frames, usual, most_frames(model))
    perturbed = asked.guidance.perturbed(model.layers()["unet"])
    led = guidance_scale > 1 or perturbed != ""
    given = clean = mask = None
    if asked.has_init:
        given = (
            video_of("init_video", asked.init_video, *size, asked.init_stride)
            if asked.init_video is not None
            else picture_of("init_image", asked.init_image, *size)
        )
        clean = encode(networks.vae, model.params["vae"], given)
    if asked.mask_video is not None:
        mask = mask_of(asked.mask_video, *size, asked.init_stride, side)
    return Plan(
        shape=(frames, height // side, width // side, channels),
        tables=tables,
        numbers=numbers_of(guidance_scale, asked.guidance),
        guidance=asked.guidance if led else Guidance(),
        program=Program(
            networks.unet,
            rescale=led and asked.guidance.rescale > 0,
            freeu=asked.guidance.freeu is not None,
            perturbed=perturbed,
            window=window,
            at_once=asked.context.batch if window else 1,
        ),
        context=asked.context,
        free_noise=asked.free_noise,
        free_init=asked.free_init,
        clean=clean,
        mask=mask,
        given=given,
    )


def sample(
    plan: Plan,
    vae: AutoencoderKL,
    schedule: NoiseSchedule,
    params: dict[str, Tree],
    lora: Tree,
    texts,
    noise,
    seeds: Sequence[int],
    done: Callable[[], None],
):
    """noise (videos, f, h, w, c), texts (videos, n, [f,] tokens, d) → frames; one video, or one for each device, where params are then too.

    done() is called after every step.
    """
    several = len(seeds) > 1
    place = to_devices if several else jax.device_put
    every = lambda x: jnp.broadcast_to(x, (len(seeds), *x.shape))
    first = videos = noise
    for again, table in enumerate(plan.tables):
        keys = partial(_keys, seeds, again)
        if again:
            fresh = [jax.random.normal(key, plan.shape) for key in keys("free_init")]
            noise = jnp.stack([renoised(schedule, plan.free_init, *video) for video in zip(videos, first, fresh, strict=True)])
        start = noise * jnp.float32(table.start) if plan.clean is None else table.asked.noised(plan.clean, noise)
        kept = None if plan.mask is None else Kept(every(plan.clean), noise, every(plan.mask))
        rows = len(table.rows.timestep)
        videos = denoise(
            plan.program, params["unet"], lora, place(start), place(texts), table, plan.numbers, plan.guidance.rows(rows),
            plan.starts(rows), place(keys("solver")) if table.draws else None, place(kept), done,
        )  # fmt: skip
    frames = decode_each(vae, params["vae"], videos)
    if plan.mask is None:
        return frames
    anew = plan.mask.repeat(vae.config.factor, 1).repeat(vae.config.factor, 2)  # of latents -> of pixels
    return jnp.where(anew > 0, frames, plan.given / 255)  # the VAE changes what is beside: of its picture, only what was painted


def _keys(seeds: Sequence[int], again: int, name: str):
    """A key for each video, in each of FreeInit's iterations another."""
    keys = [purpose(seed, name) for seed in seeds]
    return jnp.stack([jax.random.fold_in(key, again) for key in keys] if again else keys)


def alike(shapes: Sequence[tuple[int, ...]], devices: int) -> list[list[int]]:
    """Which videos are made together: those of one shape, as many as there are devices, the last one again where too few are left."""
    groups: list[list[int]] = []
    for shape in dict.fromkeys(shapes):
        members = [i for i, own in enumerate(shapes) if own == shape]
        together = devices if len(members) > 1 else 1
        members += members[-1:] * (-len(members) % together)
        groups += [members[i : i + together] for i in range(0, len(members), together)]
    return groups


@partial(jax.jit, static_argnums=0)
def encode(vae: AutoencoderKL, params: Tree, frames):
    """uint8 (f, H, W, 3) → latents (f, h, w, c): the means of the VAE's posterior, scaled."""
    return (encode_frames(vae, params, frames).mean - vae.config.shift_factor) * vae.config.scaling_factor


@partial(jax.jit, static_argnums=0)
def decode(vae: AutoencoderKL, params: Tree, latents):
    """latents (f, h, w, c) → frames (f, H, W, 3) in [0, 1]."""
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    frame = lambda z: vae.apply({"params": params}, z[None], method="decode")[0]
    side = vae.config.factor
    frames = jax.lax.map(frame, z, batch_size=max(1, PIXELS_AT_ONCE // (z.shape[1] * z.shape[2] * side**2)))
    return jnp.clip(frames / 2 + 0.5, 0, 1)


def decode_each(vae: AutoencoderKL, params: Tree, latents):
    """latents (videos, f, h, w, c) → frames (videos, f, H, W, 3); one video, or one on each device."""
    return decode(vae, params, latents[0])[None] if len(latents) == 1 else _decode_on_devices(vae, len(latents))(params, latents)


@cache
def _decode_on_devices(vae: AutoencoderKL, videos: int):
    return jax.pmap(partial(decode, vae), in_axes=(None, 0), devices=jax.local_devices()[:videos])


def initial_noise(seed: int, shape: tuple[int, ...]):
    """Standard normal latents (f, h, w, c) that depend on the seed and the shape only."""
    return jax.random.normal(purpose(seed, "video"), shape)


def check_size(model: Model, num_frames: int, height: int, width: int, windows: bool = False) -> None:
    """A UserError where the model cannot make a clip of this size; windows: where a longer one is made in windows."""
    side = model.networks.vae.config.factor
    for name, value in (("height", height), ("width", width)):
        if value < side or value % side:
            raise UserError(f"{name} {value} is not a positive multiple of {side} pixels: take {max(side, round(value / side) * side)}")
    if num_frames < 1:
        raise UserError(f"num_frames {num_frames} must be at least 1")
    most = most_frames(model)
    if num_frames > most and not windows:
        raise UserError(f"{num_frames} frames are more than the motion modules know ({most}, their motion_max_seq_length): take fewer")


def most_frames(model: Model) -> int:
    """The longest clip that the networks see at once."""
    config = model.networks.unet.config
    return config.max_frames if config.has_motion else sys.maxsize
