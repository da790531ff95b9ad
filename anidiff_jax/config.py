"""The settings of train.py and sample.py: documented once, checked once. `arguments.py` reads them from command lines and files."""

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from anidiff_jax.errors import UserError, read_text
from anidiff_jax.options import Options, arg
from anidiff_jax.prompts import check_travel, joined_lines

EMBEDDED_PROMPTS = Path(__file__).parent / "shapes" / "validation.txt"
PROMPTS = Path(__file__).parent / "validation.txt"


@dataclass(frozen=True)
class _Shared:
    """Arguments that training and sampling have in common. `given` names those that the user set."""

    model_id_or_path: str | None = arg(
        None, "base model: folder in diffusers layout, single file of Stable Diffusion 1.x, or hub id; none = the embedded tiny model"
    )
    model_revision: str | None = arg(None, "revision of the base model on the hub")
    motion_adapter_id_or_path: str | None = arg(
        None,
        "motion modules: diffusers folder, file of diffusers' or the original naming, checkpoint of full training, or hub id; "
        "LoRA on motion modules needs them, full training without them begins from nothing",
    )
    motion_adapter_revision: str | None = arg(None, "revision of the motion adapter on the hub")
    hub: Literal["hf", "modelscope"] | None = arg(
        None, "where hub ids are looked up (none = Hugging Face, then ModelScope where its package is), and where push_to_hub pushes (hf)"
    )
    vae_path: str | None = arg(None, "VAE in place of the base model's: file, folder or hub id of a VAE or of a whole model")
    text_encoder_path: str | None = arg(None, "the same for the text encoder, with the tokenizer beside it")
    lora: list[str] = field(
        default_factory=list,
        metadata={
            "help": "LoRA to apply, of any common naming, as path[:scale]; repeatable; in training it is folded into the frozen weights",
            "action": "extend",
        },
    )
    motion_norm: Literal["joint", "per_frame"] = arg(
        "joint", "statistics of the motion modules' norms: over all frames (diffusers) or in each alone (the original AnimateDiff)"
    )
    spatial_norm: Literal["joint", "per_frame"] = arg(
        "per_frame", "statistics of the image layers' norms: in each frame alone, or over all frames (v1 motion modules)"
    )
    motion_scale: float = arg(1.0, "factor of what the motion modules add; 0 = the image model alone")
    motion_num_attention_heads: int = arg(8, "heads of fresh motion modules, or of a file that does not say; an adapter's own are fixed")
    motion_max_seq_length: int = arg(32, "longest clip that fresh motion modules know, in frames; an adapter brings its own")
    sft_type: Literal["lora", "full"] = arg("lora", "train low-rank adapters, or the parameters themselves")
    sample_size: str = arg("256", "height and width in pixels: one number for both, or HEIGHTxWIDTH")
    sample_n_frames: int = arg(16, "frames a clip")
    sample_stride: int = arg(4, "distance of the frames of a clip in its video, in frames; in sampling it documents the motion's speed")
    validation_prompts_path: str | None = arg(None, "text file with a prompt a line; none = a file of the package")
    num_inference_steps: int = arg(25, "denoising steps of a video")
    guidance_scale: float = arg(8.0, "classifier-free guidance; 1 or less = none, at half the cost")
    preset: Literal["official", "diffusers", "lcm", "lightning"] | None = arg(
        None, "a known recipe: scheduler, steps, guidance and noise where they are not given; lcm and lightning for models of that kind"
    )
    scheduler: Literal[
        "ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_sde", "pndm", "lms", "heun", "unipc", "lcm", "ddpm"
    ] = arg("ddim", "the solver that takes the noise away, see docs/sampling.md")
    eta: float = arg(0.0, "with ddim, noise added at every step: 0 = none, 1 = as much as ddpm")
    num_train_timesteps: int = arg(1000, "steps of the noise")
    beta_start: float = arg(0.00085, "variance of the noise's first step")
    beta_end: float = arg(0.012, "variance of the noise's last step")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = arg("linear", "how the variance grows between them")
    steps_offset: int = arg(1, "with leading, added to every timestep of sampling")
    clip_sample: bool = arg(False, "clip the predicted clean latents to [-1, 1] in sampling")
    timestep_spacing: Literal["leading", "linspace", "trailing"] = arg("leading", "which of these steps sampling visits")
    set_alpha_to_one: bool = arg(True, "the last step of ddim and pndm ends at the clean image; false = at the noise's first step")
    prediction_type: Literal["epsilon", "v_prediction"] | None = arg(
        None, "what the network predicts: the noise, or the velocity; none = as the base model was trained"
    )
    rescale_betas_zero_snr: bool = arg(False, "let nothing of the clip be left at the noise's last step; for velocity prediction")
    seed: int = arg(42, "everything random comes from it")
    enable_xformers_memory_efficient_attention: bool = arg(True, "attention in little memory, as suits the shape; false = all logits")
    ignore_args_error: bool = arg(False, "warn about unknown arguments instead of stopping (for notebooks)")
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self):
        for name in ("num_inference_steps", "sample_stride", "sample_n_frames", "motion_max_seq_length"):
            _at_least(self, name, 1)
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", str(self.sample_size)):
            raise UserError(f"sample_size {self.sample_size} is not a size: give pixels, as 256, or height and width, as 256x384")
        _at_least(self, "motion_num_attention_heads", 1)
        _at_least(self, "seed", 0)
        _at_least(self, "steps_offset", 0)
        for f in fields(self):
            if isinstance(getattr(self, f.name), float) and not math.isfinite(getattr(self, f.name)):
                raise UserError(f"{f.name} {getattr(self, f.name)} is not a number to compute with")
        if self.seed >= 2**32:
            raise UserError(f"seed {self.seed} must be less than 2**32")
        self._check_sampling()

    def _check_sampling(self) -> None:
        """A scheduler that cannot do what is asked says so now, not at the first video."""
        from anidiff_jax.diffusion import solvers

        schedule = self.noise()
        if self.prediction_type is None:  # with which everything goes; the base model is not known yet
            schedule = replace(schedule, prediction_type="v_prediction")
        solvers.table(schedule, self.scheduler, self.num_inference_steps, self.eta)

    def noise_arguments(self) -> dict[str, Any]:
        """The arguments of the noise; prediction_type only where it was given, since else the base model says it."""
        from anidiff_jax.diffusion.schedule import NoiseSchedule

        return {name: getattr(self, name) for name in NoiseSchedule.names() if getattr(self, name) is not None}

    def noise(self, base_scheduler: Mapping[str, Any] | None = None):
        """The noise that these arguments describe. base_scheduler: the base model's, for what it predicts where they leave it open."""
        from anidiff_jax.diffusion.schedule import NoiseSchedule

        schedule = NoiseSchedule(**self.noise_arguments())
        return schedule.for_base(base_scheduler) if base_scheduler and self.prediction_type is None else schedule

    def sampling(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that these say."""
        return {
            "num_frames": self.sample_n_frames,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "scheduler": self.scheduler,
            "eta": self.eta,
        }

    @property
    def height(self) -> int:
        return int(str(self.sample_size).split("x")[0])

    @property
    def width(self) -> int:
        return int(str(self.sample_size).split("x")[-1])

    def loras(self) -> list[tuple[str, float]]:
        """(path, scale) of each --lora path[:scale]."""
        return [path_and_scale(given) for given in self.lora]

    def said(self, name: str):
        """The value of an argument that the user gave, else None."""
        return getattr(self, name) if name in self.given else None

    @property
    def embedded(self) -> bool:
        return self.model_id_or_path is None

    @property
    def attention(self) -> str:
        return "auto" if self.enable_xformers_memory_efficient_attention else "xla"

    def prompts(self) -> list[str]:
        """The validation prompts, blank lines left out; lines "0: …", "16: …" together are one prompt that travels."""
        path = Path(self.validation_prompts_path or (EMBEDDED_PROMPTS if self.embedded else PROMPTS)).expanduser()
        if not path.is_file():
            raise UserError(f"validation_prompts_path {path} does not exist: give a text file with a prompt a line")
        prompts = joined_lines(line.strip() for line in read_text(path).splitlines() if line.strip())
        if not prompts:
            raise UserError(f"validation_prompts_path {path} holds no prompt: write one a line")
        for prompt in prompts:
            check_travel(prompt, self.sample_n_frames)
        return prompts

    def to_json(self) -> dict[str, Any]:
        """What a run records, and which of it the user gave; never the token. What was gone on with is no setting of another run."""
        given = sorted(self.given - {"hub_token", "resume_from_checkpoint"})
        return {**{k: v for k, v in asdict(self).items() if k != "hub_token"}, "given": given}


@dataclass(frozen=True)
class TrainConfig(_Shared):
    """Arguments of train.py."""

    trainable_modules: str = arg(
        ".*motion_modules.*", "regular expression, full match on parameter names (lora: on names of Linear layers)"
    )
    lora_rank: int = arg(8, "rank of the adapters")
    lora_alpha: int = arg(32, "adapters are multiplied by lora_alpha / lora_rank")
    lora_dropout: float = arg(0.05, "dropout on the adapters' input, in training only", aliases=["--lora_dropout_p"])
    lora_dtype: Literal["fp32", "bf16", "fp16", "AUTO"] = arg("fp32", "type of the adapters' weights; AUTO = the model's")
    csv_path: str | None = arg(None, "csv with header name,contentUrl (or videoid,name); none = a .txt caption beside each video")
    video_folder: str | None = arg(None, "folder that holds the videos")
    dataset_sample_size: int | None = arg(None, "train on this many rows, drawn by the seed; none = all")
    random_flip: bool = arg(False, "mirror half of the clips; off, since captions may name a direction")
    text_dropout_rate: float = arg(0.1, "share of clips whose caption is left out, so that guidance works")
    dataloader_num_workers: int = arg(1, "threads that decode videos")
    latent_cache: str | None = arg(None, "folder: encode videos and captions into it once, and train from it")
    check_data: bool = arg(False, "only look at every video, and write clean.csv and data_report.json into output_dir")
    batch_size: int = arg(1, "clips a device and micro-batch")
    gradient_accumulation_steps: int = arg(16, "micro-batches an update; their mean is exact")
    num_train_epochs: int = arg(1, "passes over the clips")
    max_steps: int = arg(-1, "optimizer updates; 0 or more overrides num_train_epochs")
    learning_rate: float | None = arg(None, "peak learning rate; none = 1e-4")
    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = arg(
        "cosine", "course of the learning rate over optimizer updates"
    )
    warmup_ratio: float = arg(0.05, "share of the updates over which the learning rate rises (constant: none)")
    weight_decay: float = arg(0.01, "AdamW's decoupled weight decay")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this global norm")
    loss_weighting: Literal["none", "inverse_snr"] = arg(
        "none", "weight of a clip's loss by its noise; inverse_snr looks at high noise, where motion is decided"
    )
    snr_gamma: float | None = arg(None, "min-SNR weighting with this γ (5 is usual) instead; none = off")
    min_timestep: int = arg(0, "steps of noise are drawn from this one: from 600, say, where motion is decided, it is learnt faster")
    max_timestep: int | None = arg(None, "and up to this one, which is not drawn itself; none = num_train_timesteps")
    timestep_bias_begin: int | None = arg(None, "steps from this one on are drawn more often, the others too; none = all alike")
    timestep_bias_multiplier: float = arg(3.0, "with timestep_bias_begin: this many times as often")
    noise_offset: float = arg(0.0, "deviation of a shift of all noise of a frame's channel, so that very dark and bright clips are learnt")
    ema_decay: float = arg(0.0, "moving average of what trains (0.999, say), which samples, validation and exports then use; 0 = none")
    gradient_checkpointing: bool = arg(False, "recompute part of each layer in the backward pass: far less memory, a sixth more work")
    mixed_precision: bool = arg(True, "compute in bfloat16 on GPU and TPU; what trains stays in float32")
    deterministic: bool = arg(False, "on GPUs, only kernels that give the same bits every time; CPUs do anyway")
    ddp_backend: Literal["nccl", "gloo", "mpi", "ccl", "hccl"] = arg("nccl", "nccl = the GPUs' own collectives; gloo, mpi = those of CPUs")
    coordinator_address: str | None = arg(None, "host:port of process 0, where a run has several that do not find each other by themselves")
    num_processes: int | None = arg(None, "with coordinator_address: how many processes the run has")
    process_id: int | None = arg(None, "with coordinator_address: which of them this one is, from 0")
    output_dir: str = arg("output", "the run is written to <output_dir>/ad-<time>/")
    eval_steps: int = arg(50, "updates between validations: loss and videos")
    validation_csv: str | None = arg(None, "csv of clips that never train, in video_folder; their loss says which checkpoint is best")
    validation_fraction: float = arg(0.0, "instead: this share of the rows, drawn by the seed, does not train but validates")
    validation_clips: int = arg(32, "at most this many clips are validated on")
    save_steps: int | None = arg(None, "updates between checkpoints; none = eval_steps")
    save_total_limit: int | None = arg(None, "keep this many checkpoints, the best and the last among them; none = all")
    resume_from_checkpoint: str | None = arg(
        None, "go on with a run: its folder, a checkpoint iter-N, or latest (in output_dir). Arguments not given are the run's own"
    )
    export: Literal["none", "diffusers", "original", "all"] = arg(
        "none", "after training, write what trained for other programs too, in float16 into <run>/export, a LoRA merged"
    )
    use_tensorboard: bool = arg(False, "log to TensorBoard files in the run's folder too (pip install tensorboardX)")
    use_wandb: bool = arg(False, "log to Weights & Biases too (pip install wandb)")
    push_to_hub: bool = arg(False, "push checkpoints, with a card and a sample, to the hub")
    hub_model_id: str | None = arg(None, "with push_to_hub: owner/name")
    hub_private_repo: bool = arg(False, "with push_to_hub: make the repository private")
    push_hub_strategy: Literal["push_last", "push_best", "all_checkpoints"] = arg(
        "push_best", "with push_to_hub: push_best = the checkpoint of the lowest validation loss (without validation the last, at the end)"
    )
    hub_token: str | None = field(default=None, repr=False, metadata={"help": "with push_to_hub: access token; never stored"})

    @property
    def timesteps(self) -> tuple[int, int]:
        """The first step of noise that is drawn, and the one after the last."""
        return self.min_timestep, self.num_train_timesteps if self.max_timestep is None else self.max_timestep

    @property
    def timestep_bias(self) -> tuple[int, float] | None:
        """A step, and how many times as often those from it on are drawn."""
        return None if self.timestep_bias_begin is None else (self.timestep_bias_begin, self.timestep_bias_multiplier)

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "gradient_accumulation_steps", "num_train_epochs", "lora_rank", "eval_steps", "dataloader_num_workers"):
            _at_least(self, name, 1)
        if self.snr_gamma is not None and (self.snr_gamma <= 0 or self.loss_weighting != "none"):
            raise UserError(
                f"snr_gamma {self.snr_gamma} must be above 0, and goes without loss_weighting: both weigh the loss by its noise"
            )
        first, end = self.timesteps
        if not 0 <= first < end <= self.num_train_timesteps:
            raise UserError(
                f"min_timestep {self.min_timestep} and max_timestep {self.max_timestep} must satisfy "
                f"0 <= min_timestep < max_timestep <= num_train_timesteps, which is {self.num_train_timesteps}"
            )
        if self.timestep_bias_begin is not None and not first < self.timestep_bias_begin < end:
            raise UserError(f"timestep_bias_begin {self.timestep_bias_begin} must lie between the steps that are drawn, {first} and {end}")
        if self.timestep_bias_multiplier <= 0:
            raise UserError(f"timestep_bias_multiplier {self.timestep_bias_multiplier} must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay {self.ema_decay} must be at least 0 and less than 1")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction {self.validation_fraction} must be at least 0 and less than 1")
        if self.validation_fraction and self.validation_csv is not None:
            raise UserError("validation_csv and validation_fraction both say what to validate on: give one")
        _at_least(self, "noise_offset", 0)
        _at_least(self, "validation_clips", 1)
        for name in ("save_steps", "dataset_sample_size", "save_total_limit"):
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        for name in ("warmup_ratio", "text_dropout_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} must be between 0 and 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout {self.lora_dropout} must be at least 0 and less than 1")
        _at_least(self, "weight_decay", 0)
        for name in ("max_grad_norm", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} {getattr(self, name)} must be above 0")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise UserError(f"learning_rate {self.learning_rate} must be positive")
        if self.ddp_backend in ("ccl", "hccl"):
            raise UserError(f"ddp_backend {self.ddp_backend} is for Intel and Ascend devices under PyTorch, which JAX has not: take nccl")
        if self.push_to_hub:
            from anidiff_jax.weights.hub import token_of

            # Hugging Face takes a bare name for the token's owner's.
            if not self.hub_model_id or (self.hub == "modelscope" and self.hub_model_id.count("/") != 1):
                raise UserError("push_to_hub needs --hub_model_id owner/name, where to push to")
            if not token_of(self.hub, self.hub_token):
                named, login = ("MODELSCOPE_API_TOKEN", "ms login") if self.hub == "modelscope" else ("HF_TOKEN", "hf auth login")
                raise UserError(f"push_to_hub needs a token: set {named}, log in with `{login}`, or give --hub_token")
        for wanted, package in ((self.use_wandb, "wandb"), (self.use_tensorboard, "tensorboardX")):
            if wanted and importlib.util.find_spec(package) is None:
                raise UserError(f"use_{package.removesuffix('X').lower()} needs the package {package}: pip install {package}")
        try:
            re.compile(self.trainable_modules)
        except re.error as error:
            raise UserError(f"trainable_modules={self.trainable_modules!r} is not a regular expression: {error}") from None


@dataclass(frozen=True)
class SampleConfig(Options, _Shared):
    """Arguments of sample.py."""

    ckpt_dir: str | None = arg(None, "checkpoint of a training run (…/checkpoints/iter-N); none = the plain adapter")
    merge_lora: bool = arg(False, "fold the LoRA into the motion adapter and write it to <ckpt_dir>-merged, then sample")
    replace_if_exists: bool = arg(False, "let merge_lora replace that folder")
    prompt: str | None = arg(None, "sample this prompt instead of the prompts file")
    negative_prompt: str = arg("", "what the video should not show")
    eval_human: bool = arg(False, "ask for prompts; /help lists what changes the next video; an empty line, exit or Ctrl-D ends it")
    dtype: Literal["auto", "float32", "bfloat16"] = arg(
        "auto", "type of weights and computation; auto = bfloat16 on GPU and TPU, float32 on CPU"
    )
    num_videos_per_prompt: int = arg(1, "videos of each prompt; video i, from 0, has seed + i")
    grid: list[str] = field(
        default_factory=list,
        metadata={
            "help": "videos over a list, or over two as columns and rows, as seed=1,2,3 guidance_scale=4,8 or prompt='a cat|a dog' (prompt "
            "alone: the prompts file); besides the videos, all of them in one GIF and one PNG, and an MP4 where output_format has it",
            "action": "extend",
        },
    )
    from_json: str | None = arg(
        None, "make a video again from its JSON, or from the video itself; what is given besides changes it. A merged LoRA is not rewritten"
    )
    fps: float = arg(8.0, "frames a second")
    output_format: list[str] = field(
        default_factory=list,
        metadata={
            "help": "one or several; none = gif. mp4: H.264. png: a folder of frames. sheet: some frames in one PNG. Each with a JSON",
            "action": "extend",
            "choices": ("gif", "mp4", "webp", "png", "sheet"),
        },
    )
    gif_dither: Literal["floyd_steinberg", "none"] = arg("floyd_steinberg", "how GIFs show colours that their palette of 256 lacks")
    gif_loop: int = arg(0, "times that a GIF or WebP plays; 0 = endless")
    mp4_crf: int = arg(17, "quality of mp4, H.264's constant rate factor, 0 to 51: lower is better, and 6 less makes files twice as large")
    webp_quality: int = arg(90, "quality of WebP, 0 to 100; 100 loses nothing")
    output_path: str = arg("./generated", "folder for what is made")
    verbose: bool = arg(False, "say of each video what it cost: compiling, steps, decoding, memory")

    def __post_init__(self):
        _Shared.__post_init__(self)
        Options.__post_init__(self)
        most = 50 if "gif" in self.formats or self.grid else 1000
        if not 0 < self.fps <= most:
            why = ", the fastest that viewers play a GIF: leave out gif, or lower it" if most == 50 else ""
            raise UserError(f"fps {self.fps} must be above 0 and at most {most}{why}")
        _at_least(self, "num_videos_per_prompt", 1)
        if self.seed + self.num_videos_per_prompt > 2**32:
            raise UserError(f"seed {self.seed} + num_videos_per_prompt {self.num_videos_per_prompt} must be at most 2**32")
        for name, highest in (("mp4_crf", 51), ("webp_quality", 100), ("gif_loop", 65535)):
            if not 0 <= getattr(self, name) <= highest:
                raise UserError(f"{name} {getattr(self, name)} must be between 0 and {highest}")
        if self.merge_lora and (self.ckpt_dir is None or self.sft_type != "lora"):
            raise UserError("merge_lora needs --sft_type lora and --ckpt_dir, the checkpoint whose LoRA is to be merged")

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | self.options()

    @property
    def formats(self) -> list[str]:
        """Those of `output_format`, each once."""
        return list(dict.fromkeys(self.output_format)) or ["gif"]

    def but(self, **changes: Any) -> "SampleConfig":
        """The same arguments but for these; checked as all are."""
        changed = replace(self, **changes)
        object.__setattr__(changed, "given", self.given)
        return changed


def path_and_scale(given: str) -> tuple[str, float]:
    """ "style.safetensors:0.7" → ("style.safetensors", 0.7); without a scale it is one."""
    path, colon, scale = given.rpartition(":")
    try:
        return (path, float(scale)) if colon else (given, 1.0)
    except ValueError:  # the colon belongs to the path
        return given, 1.0


def _at_least(config, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise UserError(f"{name} {getattr(config, name)} must be at least {least}")
