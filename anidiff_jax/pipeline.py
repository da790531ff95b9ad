"""Text → video: text states once, one compiled denoising loop, frames decoded in chunks."""

import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.config import EMBEDDED_DEFAULTS, PRESETS
from anidiff_jax.denoising import Program, denoise, numbers_of
from anidiff_jax.diffusion import solvers
from anidiff_jax.diffusion.free_init import FreeInit, renoised
from anidiff_jax.diffusion.guidance import PAG_LAYERS, Guidance
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.diffusion.windows import FREE_NOISE, Context, noise_order
from anidiff_jax.errors import UserError
from anidiff_jax.lora import joined, merge_lora
from anidiff_jax.models.clip import CLIPTextModel
from anidiff_jax.models.layers import Settings
from anidiff_jax.models.vae import AutoencoderKL
from anidiff_jax.random import purpose
from anidiff_jax.weights.base import EMBEDDED, Model, load_model, tell_norms
from anidiff_jax.weights.hub import resolve
from anidiff_jax.weights.kinds import recorded_norms
from anidiff_jax.weights.loras import Lora, check_fits, file_of, load_lora
from anidiff_jax.weights.sources import base_source
from anidiff_jax.weights.tree import Tree, flatten, is_motion

log = logging.getLogger(__name__)

TOKENIZER_LOCK = threading.Lock()  # fast tokenizers do not like two threads; the loader has several

NORMS = ("joint", "per_frame")
PARTS = ("unet", "text_encoder")  # that LoRAs adapt
DEFAULTS = {"sample_size": 256, "sample_n_frames": 16, "num_inference_steps": 25, "guidance_scale": 8.0, "scheduler": "ddim"}
PIXELS_AT_ONCE = 512 * 512  # the VAE works on as many frames at a time as have this many pixels together


@partial(jax.jit, static_argnums=0)
def encode_text(network: CLIPTextModel, params: Tree, ids, lora: Tree | None = None):
    """ids (b, tokens) → text states (b, tokens, d)."""
    return network.apply({"params": params, "lora": lora or {}}, ids)


@partial(jax.jit, static_argnums=0)
def decode(vae: AutoencoderKL, params: Tree, latents):
    """latents (f, h, w, c) → frames (f, H, W, 3) in [0, 1]."""
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    frame = lambda z: vae.apply({"params": params}, z[None], method="decode")[0]
    side = vae.config.factor
    frames = jax.lax.map(frame, z, batch_size=max(1, PIXELS_AT_ONCE // (z.shape[1] * z.shape[2] * side**2)))
    return jnp.clip(frames / 2 + 0.5, 0, 1)


def initial_noise(seed: int, shape: tuple[int, ...]):
    """Standard normal latents (f, h, w, c) that depend on the seed and the shape only."""
    return jax.random.normal(purpose(seed, "video"), shape)


class AnimateDiffPipeline:
    """A text-to-video model ready to sample.

    `model` holds networks and weights, `schedule` the noise, `loras` adapters, each with its scale; all are applied together.
    """

    def __init__(self, model: Model, schedule: NoiseSchedule, loras: Sequence[tuple[Lora, float]] = (), defaults: Mapping | None = None):
        self.model = model
        self.schedule = schedule
        self.loras = list(loras)
        self._told_of_cut = False
        self.defaults = {**DEFAULTS, **(defaults or {})}

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None = None,
        motion_adapter: str | Path | None = None,
        *,
        dtype: str = "float32",
        lora: str | Path | None = None,
        unet: str | Path | None = None,
        motion_num_attention_heads: int | None = None,
        motion_max_seq_length: int | None = None,
        model_revision: str | None = None,
        motion_adapter_revision: str | None = None,
        hub: str | None = None,
        attention: str = "auto",
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        motion_norm: str = "joint",
        spatial_norm: str = "per_frame",
        motion_scale: float = 1.0,
        preset: str | None = None,
        scheduler: str | None = None,
        **noise: Any,
    ) -> "AnimateDiffPipeline":
        """Loads a base model and a motion adapter, from files or folders of any common kind or from hub ids.

        base: Stable Diffusion 1.x or 2.x in diffusers layout, or a single file of 1.x; None takes the embedded model, with its own
            adapter unless one is given. vae, text_encoder: take the place of the base's, or bring what a single file lacks.
        motion_adapter: motion modules, of diffusers' naming or the original's, or a training checkpoint; None samples without
            motion modules, unless the base is itself a video model.
        lora: a training checkpoint or LoRA file to apply, unmerged; more with `load_lora`.
        unet: a checkpoint of a UNet that trained as a whole, which takes the place of the base's.
        motion_num_attention_heads: for an adapter file without config; motion_*: an error where the adapter says otherwise.
        hub: hf | modelscope, where ids are looked up; None: the one, then the other.
        dtype: float32 | bfloat16 | float16, of weights and computation. attention: auto | xla | chunked | cudnn.
        noise: beta_start, beta_end, beta_schedule, steps_offset, clip_sample, num_train_timesteps, prediction_type, timestep_spacing,
            set_alpha_to_one, rescale_betas_zero_snr; not given, AnimateDiff's recipe, and the base's own prediction_type.
        preset: official | diffusers | lcm | lightning, a known recipe: noise, scheduler, steps and guidance where they are not given.
        scheduler: the solver of calls that name none, see `__call__`.
        motion_norm: joint | per_frame. spatial_norm: per_frame | joint. motion_scale: see `layers.Settings`.
        Raises UserError (a ValueError) when something does not fit, and says what.
        """
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype={dtype!r} is not one of float32, bfloat16, float16")
        if attention not in ("auto", "xla", "chunked", "cudnn"):
            raise UserError(f"attention={attention!r} is not one of auto, xla, chunked, cudnn")
        if motion_norm not in NORMS or spatial_norm not in NORMS:
            raise UserError(f"motion_norm={motion_norm!r}, spatial_norm={spatial_norm!r}: each is one of {', '.join(NORMS)}")
        unknown = noise.keys() - set(NoiseSchedule.names())
        if unknown:
            raise UserError(f"unknown argument {', '.join(sorted(unknown))}; the noise arguments are {', '.join(NoiseSchedule.names())}")
        if preset is not None and preset not in PRESETS:
            raise UserError(f"preset={preset!r} is not one of {', '.join(PRESETS)}")
        recipe = PRESETS[preset] if preset is not None else {}
        noise = {name: value for name, value in recipe.items() if name in NoiseSchedule.names()} | noise
        defaults = {name: value for name, value in recipe.items() if name in DEFAULTS}
        if scheduler is not None:
            solvers.check_name(scheduler)
            defaults["scheduler"] = scheduler
        if base is None:
            defaults = EMBEDDED_DEFAULTS | defaults
            base, motion_adapter = EMBEDDED, motion_adapter or EMBEDDED / "motion_adapter"
        local = lambda given, revision=None: None if given is None else resolve(str(given), revision, hub)
        model = load_model(
            base_source(resolve(str(base), model_revision, hub), local(vae), local(text_encoder), local(unet)),
            local(motion_adapter, motion_adapter_revision),
            motion_heads=motion_num_attention_heads,
            motion_frames=motion_max_seq_length,
            settings=Settings(
                dtype=dtype, attention=attention, motion_norm=motion_norm, spatial_norm=spatial_norm, motion_scale=motion_scale
            ),
            dtype=dtype,
        )
        schedule = NoiseSchedule(**noise)
        pipe = cls(model, schedule if "prediction_type" in noise else schedule.for_base(model.scheduler), defaults=defaults)
        if lora is not None:
            pipe.load_lora(lora, hub=hub)
        return pipe

    def load_lora(self, path: str | Path, scale: float = 1.0, hub: str | None = None) -> None:
        """Applies a LoRA of any common naming, multiplied by `scale`, beside those loaded before. `loras = []` takes all off."""
        path = resolve(str(path), hub=hub)
        adapter = load_lora(path, self.model.layers())
        if any(map(is_motion, flatten(adapter.unet))) and not self.model.networks.unet.config.has_motion:
            raise UserError(f"{path} is a LoRA of motion modules: give the motion adapter that it was trained on as well")
        tell_norms(recorded_norms(file_of(path)), self.model.networks.unet.settings, path)
        for part in PARTS:
            check_fits(getattr(adapter, part), self.model.params[part], path)
        self.loras.append((adapter, scale))

    def merge_lora(self) -> None:
        """Folds the LoRAs into the weights; frames stay the same to rounding."""
        hashes = self.hashes
        folded = {part: merge_lora(self.model.params[part], self.joined_lora(part), 1.0) for part in PARTS}
        self.model.params, self.model.hashes = {**self.model.params, **folded}, hashes
        self.loras = []

    @property
    def hashes(self) -> dict[str, str]:
        """Of all weights, as they were read: unet, motion_modules, vae, text_encoder, and lora_1 and so on, those merged first."""
        own = dict(self.model.hashes)
        first = 1 + sum(name.startswith("lora_") for name in own)
        return own | {f"lora_{i}": lora.hash for i, (lora, _) in enumerate(self.loras, first)}

    def joined_lora(self, part: str) -> Tree:
        """All adapters of one network as one."""
        return joined([(getattr(lora, part), scale) for lora, scale in self.loras if scale != 0])

    @property
    def dtype(self) -> str:
        return self.model.networks.unet.settings.dtype

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts → ids (b, tokens) int32, padded and cut to the text encoder's length; the first cut is said in the log."""
        tokenizer, length = self.model.tokenizer, self.model.networks.text_encoder.config.max_length
        with TOKENIZER_LOCK:
            ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        for prompt, own in zip(prompts, ids, strict=True):
            if len(own) > length and not self._told_of_cut:
                self._told_of_cut = True
                log.warning("text is cut after %d tokens, here %d too late (said once): %s", length, len(own) - length, prompt)
        cut = [own if len(own) <= length else [*own[: length - 1], own[-1]] for own in ids]  # the end token stays
        return np.array([own + [tokenizer.pad_token_id] * (length - len(own)) for own in cut], np.int32)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 42,
        latents: np.ndarray | None = None,
        scheduler: str | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        freeu: Sequence[float] | None = None,
        pag_scale: float = 0.0,
        pag_adaptive_scale: float = 0.0,
        pag_layers: str = PAG_LAYERS,
        context_frames: int | None = None,
        context_overlap: int | None = None,
        context_schedule: str = "uniform",
        context_batch: int = 1,
        closed_loop: bool = False,
        free_noise: str = "shuffle",
        free_init_iterations: int = 0,
        free_init_filter: str = "butterworth",
        free_init_order: int = 4,
        free_init_spatial_stop: float = 0.25,
        free_init_temporal_stop: float = 0.25,
        free_init_fast: bool = False,
    ) -> np.ndarray:
        """Samples a video for each prompt → float32 (prompts, frames, height, width, 3) in [0, 1].

        num_frames: 16 (the embedded model 8) where it is not given; num_inference_steps: 25, or the preset's.
        height, width: pixels, multiples of the VAE's factor (8 for Stable Diffusion); guidance_scale ≤ 1 skips guidance and
        half of the cost. A video depends on its prompt and the seed only, not on its neighbours in the list.
        latents: the noise to start from, of deviation 1, (prompts, channels, frames, h, w) as diffusers has it, instead of the seed's.
        scheduler: ddim | euler | euler_a | dpmpp_2m | dpmpp_2m_karras | dpmpp_sde | pndm | lms | heun | unipc | lcm | ddpm; not given,
        ddim or the preset's. eta: with ddim, noise added at each step, between none (0) and ddpm's (1).
        negative_prompt: for all prompts, or one for each.
        guidance_rescale: share by which guidance is brought back to the prediction's own deviation; 0.7 against overexposure.
        guidance_start, guidance_end: shares of the steps between which there is guidance; outside it costs nothing.
        freeu: s1, s2, b1, b2 of FreeU. pag_scale: perturbed-attention guidance, 0 for none; less by pag_adaptive_scale for each timestep
        that is gone; pag_layers: regular expression on the names of the self-attentions that are perturbed.
        context_frames: a longer video is made in windows of so many frames; not given, one longer than the motion modules know, in windows
        of 16 (the embedded model 8). context_overlap, context_schedule, context_batch, closed_loop: see `windows.Context`.
        free_noise: shuffle | repeat | none, the noise of frames after the first window: of earlier ones, or their own.
        free_init_iterations: samplings, each from noise with the low frequencies of the one before; how, says `free_init.FreeInit`.
        Raises UserError for a size, a number of frames or steps that the model cannot do.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, or one for each")
        networks, params = self.model.networks, self.model.params
        num_frames = self.defaults["sample_n_frames"] if num_frames is None else num_frames
        height, width = height or int(self.defaults["sample_size"]), width or int(self.defaults["sample_size"])
        guidance_scale = self.defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        steps = self.defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        check_size(self.model, num_frames, height, width, windows=True)
        context = Context(context_frames, context_overlap, context_schedule, context_batch, closed_loop)
        window = context.window(num_frames, self.defaults["sample_n_frames"], most_frames(self.model))
        if free_noise not in FREE_NOISE:
            raise UserError(f"free_noise={free_noise!r} is not one of {', '.join(FREE_NOISE)}")
        side, channels = networks.vae.config.factor, networks.vae.config.latent_channels
        shape = (num_frames, height // side, width // side, channels)
        if latents is not None:
            expected = (len(prompts), channels, *shape[:3])
            if latents.shape != expected:
                raise UserError(f"latents have shape {latents.shape}, expected {expected}: (prompts, channels, frames, h, w)")
            latents = np.asarray(latents, np.float32).transpose(0, 2, 3, 4, 1)  # b c f h w -> b f h w c
        free_init = FreeInit(
            free_init_iterations, free_init_filter, free_init_order, free_init_spatial_stop, free_init_temporal_stop, free_init_fast
        )
        name = scheduler or self.defaults["scheduler"]
        tables = [solvers.table(self.schedule, name, free_init.steps(i, steps), eta) for i in range(max(1, free_init.iterations))]
        guidance = Guidance(guidance_rescale, guidance_start, guidance_end, pag_scale, pag_adaptive_scale, pag_layers, freeu)
        perturbed = guidance.perturbed(self.model.layers()["unet"])
        led = guidance_scale > 1 or perturbed != ""
        program = Program(
            networks.unet,
            rescale=led and guidance.rescale > 0,
            interval=led and not guidance.always,
            freeu=freeu is not None,
            perturbed=perturbed,
            window=window,
            at_once=context_batch if window else 1,
        )
        starts = lambda rows: context.starts(num_frames, window, rows) if window else None
        numbers = [numbers_of(guidance_scale, guidance, rows, starts(rows)) for rows in (len(table.rows.timestep) for table in tables)]
        lora, text_lora = self.joined_lora("unet"), self.joined_lora("text_encoder")

        if window and free_noise != "none":
            key_of = partial(jax.random.fold_in, purpose(seed, "free_noise"))
            permuted = lambda frame, count: np.asarray(jax.random.permutation(key_of(frame), count))
            order = noise_order(free_noise, num_frames, window, context.stride(window), permuted)
            drawn = initial_noise(seed, (window, *shape[1:]))[order]
        else:
            drawn = initial_noise(seed, shape)
        videos = []
        for i, (text, negative_prompt) in enumerate(zip(prompts, negatives, strict=True)):
            ids = self.tokenize([negative_prompt, text] if guidance_scale > 1 else [text])
            states = encode_text(networks.text_encoder, params["text_encoder"], ids, text_lora)
            first = last = drawn if latents is None else jnp.array(latents[i])
            for again, (table, how) in enumerate(zip(tables, numbers, strict=True)):
                fresh_key, solver_key = (jax.random.fold_in(purpose(seed, name), again) for name in ("free_init", "solver"))
                noise = renoised(self.schedule, free_init, last, first, jax.random.normal(fresh_key, shape)) if again else first
                key = (solver_key if again else purpose(seed, "solver")) if table.draws else None
                last = denoise(program, params["unet"], lora, noise[None] * jnp.float32(table.start), states, table.rows, how, key)[0]
            videos.append(decode(networks.vae, params["vae"], last))
        return np.stack([np.asarray(video) for video in videos])

    def with_weights(self, params: dict[str, Tree], lora: Tree | None, lora_scale: float) -> "AnimateDiffPipeline":
        """The same pipeline with other weights; nothing is compiled anew."""
        loras = [(Lora(unet=lora), lora_scale)] if lora else []
        return AnimateDiffPipeline(replace(self.model, params=params, hashes={}), self.schedule, loras, self.defaults)


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
