"""The arguments of train.py and sample.py: documented once, checked once. docs/arguments.md says where they differ from the reference's."""

import difflib
import importlib.util
import itertools
import json
import logging
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from anidiff_jax.errors import UserError, read_text

log = logging.getLogger(__name__)

# What an argument that is not given becomes when no model is given either, and the embedded one is taken.
EMBEDDED_DEFAULTS: dict[str, Any] = {
    "sample_size": "64",
    "sample_stride": 1,
    "sample_n_frames": 8,
    "guidance_scale": 5.0,
    "num_train_epochs": 20,
    "loss_weighting": "inverse_snr",
}
EMBEDDED_PROMPTS = Path(__file__).parent / "shapes" / "validation.txt"
PROMPTS = Path(__file__).parent / "validation.txt"


def arg(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class _Shared:
    """Arguments that training and sampling have in common. `given` names those that the user set."""

    model_id_or_path: str | None = arg(None, "base model: folder in diffusers layout or hub id; none = the embedded tiny model")
    model_revision: str | None = arg(None, "revision of the base model on the hub")
    motion_adapter_id_or_path: str | None = arg(None, "motion adapter: folder, .safetensors file, checkpoint of full training, or hub id")
    motion_adapter_revision: str | None = arg(None, "revision of the motion adapter on the hub")
    sft_type: Literal["lora", "full"] = arg("lora", "train low-rank adapters, or the parameters themselves")
    seed: int = arg(42, "everything random comes from it")
    ignore_args_error: bool = arg(False, "warn about unknown arguments instead of stopping (for notebooks)")
    validation_prompts_path: str | None = arg(None, "text file with a prompt a line; none = a file of the package")
    enable_xformers_memory_efficient_attention: bool = arg(True, "choose attention by shape and device; false = keep all logits")
    num_inference_steps: int = arg(25, "denoising steps of a video")
    guidance_scale: float = arg(8.0, "classifier-free guidance; 1 or less = none, at half the cost")
    sample_size: str = arg("256", "height and width in pixels: one number for both, or HEIGHTxWIDTH")
    sample_stride: int = arg(4, "distance of the frames of a clip in its video, in frames; in sampling it documents the motion's speed")
    sample_n_frames: int = arg(16, "frames a clip")
    motion_num_attention_heads: int = arg(8, "heads of fresh motion modules; an adapter brings its own")
    motion_max_seq_length: int = arg(32, "longest clip that fresh motion modules know, in frames; an adapter brings its own")
    num_train_timesteps: int = arg(1000, "steps of the noise")
    beta_start: float = arg(0.00085, "variance of the noise's first step")
    beta_end: float = arg(0.012, "variance of the noise's last step")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = arg("linear", "how the variance grows between them")
    steps_offset: int = arg(1, "added to every timestep of sampling")
    clip_sample: bool = arg(False, "clip the predicted clean latents to [-1, 1] in sampling")
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
        self.noise()

    def noise(self):
        """The noise that these arguments describe."""
        from anidiff_jax.diffusion.schedule import NoiseSchedule

        return NoiseSchedule(**{name: getattr(self, name) for name in NoiseSchedule.names() if hasattr(self, name)})

    def sampling(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that these say."""
        return {
            "num_frames": self.sample_n_frames,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
        }

    @property
    def height(self) -> int:
        return int(str(self.sample_size).split("x")[0])

    @property
    def width(self) -> int:
        return int(str(self.sample_size).split("x")[-1])

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
        """The validation prompts, blank lines left out."""
        path = Path(self.validation_prompts_path or (EMBEDDED_PROMPTS if self.embedded else PROMPTS)).expanduser()
        if not path.is_file():
            raise UserError(f"validation_prompts_path {path} does not exist: give a text file with a prompt a line")
        prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not prompts:
            raise UserError(f"validation_prompts_path {path} holds no prompt: write one a line")
        return prompts

    def to_json(self) -> dict[str, Any]:
        """What a run records, and which of it the user gave; never the token."""
        return {**{k: v for k, v in asdict(self).items() if k != "hub_token"}, "given": sorted(self.given - {"hub_token"})}


@dataclass(frozen=True)
class TrainConfig(_Shared):
    """Arguments of train.py."""

    trainable_modules: str = arg(
        ".*motion_modules.*", "regular expression, full match on parameter names (lora: on names of Linear layers)"
    )
    csv_path: str | None = arg(None, "csv with header name,contentUrl (or videoid,name); none = a .txt caption beside each video")
    video_folder: str | None = arg(None, "folder that holds the videos")
    dataset_sample_size: int | None = arg(None, "train on this many rows, drawn by the seed; none = all")
    random_flip: bool = arg(False, "mirror half of the clips; off, since captions may name a direction")
    text_dropout_rate: float = arg(0.1, "share of clips whose caption is left out, so that guidance works")
    dataloader_num_workers: int = arg(1, "threads that decode videos")
    check_data: bool = arg(False, "only look at every video, and write clean.csv and data_report.json into output_dir")
    latent_cache: str | None = arg(None, "folder: encode videos and captions into it once, and train from it")
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
    loss_weighting: Literal["none", "inverse_snr"] = arg(
        "none", "weight of a clip's loss by its noise; inverse_snr looks at high noise, where motion is decided"
    )
    snr_gamma: float | None = arg(None, "min-SNR weighting with this γ (5 is usual) instead; none = off")
    noise_offset: float = arg(0.0, "deviation of a shift of all noise of a frame's channel, so that very dark and bright clips are learnt")
    ema_decay: float = arg(0.0, "moving average of what trains (0.999, say), which samples, validation and exports then use; 0 = none")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this global norm")
    lora_rank: int = arg(8, "rank of the adapters")
    lora_alpha: int = arg(32, "adapters are multiplied by lora_alpha / lora_rank")
    lora_dropout: float = arg(0.05, "dropout on the adapters' input, in training only", aliases=["--lora_dropout_p"])
    lora_dtype: Literal["fp32", "bf16", "fp16", "AUTO"] = arg("fp32", "type of the adapters' weights; AUTO = the model's")
    gradient_checkpointing: bool = arg(False, "recompute each layer in the backward pass: less memory, about a third more time")
    mixed_precision: bool = arg(True, "compute in bfloat16 on GPU and TPU; what trains stays in float32")
    validation_csv: str | None = arg(None, "csv of clips that never train, in video_folder; their loss says which checkpoint is best")
    validation_fraction: float = arg(0.0, "instead: this share of the rows, drawn by the seed, does not train but validates")
    validation_clips: int = arg(32, "at most this many clips are validated on")
    eval_steps: int = arg(50, "updates between validations: loss and videos")
    save_steps: int | None = arg(None, "updates between checkpoints; none = eval_steps")
    save_total_limit: int | None = arg(None, "keep this many checkpoints, the best and the last among them; none = all")
    resume_from_checkpoint: str | None = arg(
        None, "go on with a run: its folder, a checkpoint iter-N, or latest (in output_dir). Arguments not given are the run's own"
    )
    deterministic: bool = arg(False, "on GPUs, only kernels that give the same bits every time; CPUs do anyway")
    output_dir: str = arg("output", "the run is written to <output_dir>/ad-<time>/")
    ddp_backend: Literal["nccl", "gloo", "mpi", "ccl", "hccl"] = arg("nccl", "nccl = the GPUs' own collectives; gloo, mpi = those of CPUs")
    coordinator_address: str | None = arg(None, "host:port of process 0, where a run has several that do not find each other by themselves")
    num_processes: int | None = arg(None, "with coordinator_address: how many processes the run has")
    process_id: int | None = arg(None, "with coordinator_address: which of them this one is, from 0")
    push_to_hub: bool = arg(False, "push checkpoints, with a card and a sample, to the Hugging Face Hub")
    hub_model_id: str | None = arg(None, "with push_to_hub: owner/name")
    hub_private_repo: bool = arg(False, "with push_to_hub: make the repository private")
    push_hub_strategy: Literal["push_last", "push_best", "all_checkpoints"] = arg("push_best", "with push_to_hub: what to push")
    hub_token: str | None = field(default=None, repr=False, metadata={"help": "with push_to_hub: access token; never stored"})
    use_wandb: bool = arg(False, "log to Weights & Biases too (pip install wandb)")
    use_tensorboard: bool = arg(False, "log to TensorBoard files in the run's folder too (pip install tensorboardX)")

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "gradient_accumulation_steps", "num_train_epochs", "lora_rank", "eval_steps", "dataloader_num_workers"):
            _at_least(self, name, 1)
        if self.snr_gamma is not None and (self.snr_gamma <= 0 or self.loss_weighting != "none"):
            raise UserError(
                f"snr_gamma {self.snr_gamma} must be above 0, and goes without loss_weighting: both weigh the loss by its noise"
            )
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
            from huggingface_hub import get_token

            if not self.hub_model_id:
                raise UserError("push_to_hub needs --hub_model_id owner/name, where to push to")
            if not (self.hub_token or get_token()):
                raise UserError("push_to_hub needs a token: set HF_TOKEN, log in with `hf auth login`, or give --hub_token")
        for wanted, package in ((self.use_wandb, "wandb"), (self.use_tensorboard, "tensorboardX")):
            if wanted and importlib.util.find_spec(package) is None:
                raise UserError(f"use_{package.removesuffix('X').lower()} needs the package {package}: pip install {package}")
        try:
            re.compile(self.trainable_modules)
        except re.error as error:
            raise UserError(f"trainable_modules={self.trainable_modules!r} is not a regular expression: {error}") from None


@dataclass(frozen=True)
class SampleConfig(_Shared):
    """Arguments of sample.py."""

    ckpt_dir: str | None = arg(None, "checkpoint of a training run (…/checkpoints/iter-N); none = the plain adapter")
    eval_human: bool = arg(False, "ask for prompts; an empty line, exit or Ctrl-D ends it")
    prompt: str | None = arg(None, "sample this prompt instead of the prompts file")
    negative_prompt: str = arg("", "what the video should not show")
    merge_lora: bool = arg(False, "fold the LoRA into the motion adapter and write it to <ckpt_dir>-merged, then sample")
    replace_if_exists: bool = arg(False, "let merge_lora replace that folder")
    output_path: str = arg("./generated", "folder for the GIFs")
    dtype: Literal["auto", "float32", "bfloat16"] = arg(
        "auto", "type of weights and computation; auto = bfloat16 on GPU and TPU, float32 on CPU"
    )
    fps: float = arg(8.0, "frames a second of the GIFs")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.fps <= 50:
            raise UserError(f"fps {self.fps} must be above 0 and at most 50, the fastest that viewers play")
        if self.merge_lora and (self.ckpt_dir is None or self.sft_type != "lora"):
            raise UserError("merge_lora needs --sft_type lora and --ckpt_dir, the checkpoint whose LoRA is to be merged")


def _at_least(config, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise UserError(f"{name} {getattr(config, name)} must be at least {least}")


Config = TypeVar("Config", TrainConfig, SampleConfig)


def parse(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Command line → config. A JSON or YAML file may come first; what follows it on the command line wins.

    Raises UserError for a value or an argument that does not exist; `--ignore_args_error true` makes the latter a warning.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):  # argparse would print a page
            raise UserError(f"{message} (see --help)")

    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".json", ".yaml", ".yml")) and not words[0].startswith("-"):
        words = _words_of_file(Path(words[0]).expanduser()) + words[1:]
    words = _words_of_run(words) + words
    parser = Parser(kind, allow_abbrev=False, description=kind.__doc__)  # type: ignore[arg-type]
    namespace, rest = parser.parse_known_args(words)
    known = {f.name for f in fields(kind) if f.init}
    named = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    given = {name.removeprefix("no_") if name not in known else name for name in named} & known
    if "lora_dropout_p" in named:
        given.add("lora_dropout")
    values = vars(namespace)
    if rest:
        messages = [_unknown(word, known) for word in rest if word.startswith("-")] or [_unknown(rest[0], known)]
        if not values["ignore_args_error"]:
            raise UserError(messages[0])
        for message in messages:
            log.warning("%s; ignored", message)
    if values["model_id_or_path"] is None:
        values.update({name: value for name, value in EMBEDDED_DEFAULTS.items() if name not in given and name in values})
    config = kind(**{name: value for name, value in values.items() if name in known})
    object.__setattr__(config, "given", frozenset(given))
    return config


def _unknown(word: str, known: set[str]) -> str:
    name = word.lstrip("-").split("=")[0]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"unknown argument {word.split('=')[0]}" + (f": did you mean --{near[0]}?" if near else " (see --help)")


def _words_of_run(words: list[str]) -> list[str]:
    """Where a run is gone on with, its own arguments, which those on the command line may change."""
    given = dict(itertools.pairwise(words)) | dict(w.split("=", 1) for w in words if w.startswith("--") and "=" in w)
    where = given.get("--resume_from_checkpoint")
    if where is None:
        return []
    from anidiff_jax.training.runs import find_checkpoint

    checkpoint = find_checkpoint(where, given.get("--output_dir", TrainConfig.output_dir))
    return _words_of_file(checkpoint / "train_config.json")


def _words_of_file(path: Path) -> list[str]:
    """A config file as the words of a command line; of a run's own, what was given then."""
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    text = read_text(path)
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except Exception as error:  # json's and yaml's own kinds
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must hold names and values at its top level")
    values = {name: value for name, value in values.items() if name in values.pop("given", values)}
    written = {True: "true", False: "false"}
    return [f"--{k}={written[v] if isinstance(v, bool) else v}" for k, v in values.items() if v is not None]


def as_markdown() -> str:
    """docs/arguments.md: python -m anidiff_jax.config > docs/arguments.md"""
    lines = [
        "# Arguments",
        "",
        "Give them as `--name value`; booleans also as a bare `--name`. A JSON or YAML file with names and values may come first;",
        "what follows it wins. Names and defaults are those of ModelScope SWIFT's AnimateDiff scripts, as far as it has them;",
        "[differences.md](differences.md) says where ours mean something else. With no `--model_id_or_path`, the embedded tiny model",
        "is taken, and these defaults change with it:",
        ", ".join(f"`{k} {v}`" for k, v in EMBEDDED_DEFAULTS.items()) + ".",
    ]
    shared = {f.name for f in fields(_Shared)}
    for title, kind, chosen in (
        ("Both", _Shared, lambda name: True),
        ("train.py", TrainConfig, lambda name: name not in shared),
        ("sample.py", SampleConfig, lambda name: name not in shared),
    ):
        lines += ["", f"## {title}", "", "| argument | default | meaning |", "|---|---|---|"]
        for f in fields(kind):
            if f.init and chosen(f.name):
                default = str(f.default).lower() if isinstance(f.default, bool) else "none" if f.default in (None, "") else f.default
                choices = get_args(f.type) if get_origin(f.type) is Literal else ()
                meaning = f.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
                lines.append(f"| `{f.name}` | {default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(as_markdown(), end="")
