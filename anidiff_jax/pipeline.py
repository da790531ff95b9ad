"""Text → video: text states once, one compiled denoising step, frames decoded in chunks."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anidiff_jax.defaults import EMBEDDED_DEFAULTS, PRESETS
from anidiff_jax.diffusion import solvers
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.errors import UserError
from anidiff_jax.lora import joined, merge_lora
from anidiff_jax.models.layers import Settings
from anidiff_jax.options import Options
from anidiff_jax.parallel import replicate
from anidiff_jax.prompts import Prompt
from anidiff_jax.sampling import alike, plan_of, sample, tables_of
from anidiff_jax.text import TOKENIZER_LOCK, text_states
from anidiff_jax.weights.base import EMBEDDED, Model, load_model, tell_norms
from anidiff_jax.weights.hub import resolve
from anidiff_jax.weights.kinds import recorded_norms
from anidiff_jax.weights.loras import Lora, check_fits, file_of, load_lora
from anidiff_jax.weights.sources import base_source
from anidiff_jax.weights.tree import Tree, flatten, is_motion

log = logging.getLogger(__name__)

NORMS = ("joint", "per_frame")
PARTS = ("unet", "text_encoder")  # that LoRAs adapt
DEFAULTS: dict[str, Any] = {
    "sample_size": 256,
    "sample_n_frames": 16,
    "num_inference_steps": 25,
    "guidance_scale": 8.0,
    "scheduler": "ddim",
    "context_frames": None,
}


class AnimateDiffPipeline:
    """A text-to-video model ready to sample.

    `model` holds networks and weights, `schedule` the noise, `loras` adapters, each with its scale; all are applied together.
    """

    def __init__(self, model: Model, schedule: NoiseSchedule, loras: Sequence[tuple[Lora, float]] = (), defaults: Mapping | None = None):
        self.model = model
        self.schedule = schedule
        self.loras = list(loras)
        self._told_of_cut = False
        self._replicated: Any = None
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
        prompt: Prompt | Sequence[Prompt],
        negative_prompt: str | Sequence[str] = "",
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 42,
        latents: np.ndarray | None = None,
        scheduler: str | None = None,
        eta: float = 0.0,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Samples a video for each prompt → float32 (prompts, frames, height, width, 3) in [0, 1].

        prompt: text, in which (word:1.3) weighs a word and (word) and [word] weigh it up and down, of any length; or texts that follow
        each other, by frame: {0: "a calm sea", 8: "a storm"}. Several prompts are spread over the local devices.
        negative_prompt: for all prompts, or one for each.
        num_frames: 16 (the embedded model 8) where it is not given; num_inference_steps: 25, or the preset's.
        height, width: pixels, multiples of the VAE's factor (8 for Stable Diffusion); guidance_scale ≤ 1 skips guidance and
        half of the cost. seed: for all prompts, or one for each. A video depends on its prompt and its seed only, not on its neighbours.
        latents: the noise to start from, of deviation 1, (prompts, channels, frames, h, w) as diffusers has it, instead of the seed's.
        scheduler: ddim | euler | euler_a | dpmpp_2m | dpmpp_2m_karras | dpmpp_sde | pndm | lms | heun | unipc | lcm | ddpm; not given,
        ddim or the preset's. eta: with ddim, noise added at each step, between none (0) and ddpm's (1).
        progress(steps done, steps in all) is called after every step; what it raises ends the sampling.
        options: the fields of `options.Options`, which says what they mean: guidance, long videos, FreeInit, starting from a video.
        Raises UserError for a size, a number of frames or steps that the model cannot do.
        """
        networks, params = self.model.networks, self.model.params
        prompts = [prompt] if isinstance(prompt, str | Mapping) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        seeds = [int(seed)] * len(prompts) if isinstance(seed, int | np.integer) else list(seed)
        for name, given in (("negative prompts", negatives), ("seeds", seeds)):
            if len(given) != len(prompts):
                raise UserError(f"{len(given)} {name} for {len(prompts)} prompts: give one for all, or one for each")
        if wrong := [each for each in seeds if not 0 <= each < 2**32]:
            raise UserError(f"seed {wrong[0]} is not one of 0 to {2**32 - 1}")
        num_frames = self.defaults["sample_n_frames"] if num_frames is None else num_frames
        height, width = height or int(self.defaults["sample_size"]), width or int(self.defaults["sample_size"])
        guidance_scale = self.defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        steps = self.defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        asked = Options(**{"context_frames": self.defaults["context_frames"]} | options)
        scheduler = scheduler or self.defaults["scheduler"]
        tables = tables_of(self.schedule, asked, scheduler, steps, eta)
        plan = plan_of(self.model, asked, (num_frames, height, width), tables, guidance_scale, self.defaults["sample_n_frames"])
        if latents is not None:
            expected = (len(prompts), plan.shape[3], *plan.shape[:3])
            if latents.shape != expected:
                raise UserError(f"latents have shape {latents.shape}, expected {expected}: (prompts, channels, frames, h, w)")
            latents = np.asarray(latents, np.float32).transpose(0, 2, 3, 4, 1)  # b c f h w -> b f h w c

        encoder, tokenizer = networks.text_encoder, self.model.tokenizer
        led = negatives if guidance_scale > 1 else None
        texts = text_states(encoder, params["text_encoder"], self.joined_lora("text_encoder"), tokenizer, prompts, led, num_frames, asked)
        groups = alike([text.shape for text in texts], jax.local_device_count())
        steps_done, steps_in_all = itertools.count(1), len(groups) * sum(len(table.rows.timestep) for table in plan.tables)
        done = lambda: progress(next(steps_done), steps_in_all) if progress else None
        videos: dict[int, np.ndarray] = {}
        for group in groups:
            starts = jnp.stack([plan.noise(seeds[i]) if latents is None else jnp.asarray(latents[i]) for i in group])
            weights, lora = self._on_devices() if len(group) > 1 else (params, self.joined_lora("unet"))
            text, own = np.stack([texts[i] for i in group]), [seeds[i] for i in group]
            made = sample(plan, networks.vae, self.schedule, weights, lora, text, starts, own, done)
            videos |= dict(zip(group, np.asarray(made), strict=True))  # a group may make a video twice, so that no device is idle
        if lost := [prompts[i] for i, video in sorted(videos.items()) if not np.isfinite(video).all()]:
            log.warning("values that are not finite, shown black, are in the video of %r: dtype float32 or bfloat16 may hold them", lost[0])
        return np.stack([videos[i] for i in range(len(prompts))])

    def _on_devices(self) -> tuple[dict[str, Tree], Tree]:
        """(weights, LoRAs) on every local device; made once, and again where they are others."""
        now = [self.model.params, *self.loras]  # kept, so that their ids stay theirs
        if self._replicated is None or [*map(id, self._replicated[0])] != [*map(id, now)]:
            self._replicated = None  # first let go of the old ones
            own = {name: self.model.params[name] for name in ("unet", "vae")}
            self._replicated = (now, replicate((own, self.joined_lora("unet"))))
        return self._replicated[1]

    def with_weights(self, params: dict[str, Tree], lora: Tree | None, lora_scale: float) -> "AnimateDiffPipeline":
        """The same pipeline with other weights; nothing is compiled anew."""
        loras = [(Lora(unet=lora), lora_scale)] if lora else []
        return AnimateDiffPipeline(replace(self.model, params=params, hashes={}), self.schedule, loras, self.defaults)
