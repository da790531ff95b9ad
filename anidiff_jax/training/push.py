"""Checkpoints → a repository on a hub, with a card and a sample. What goes wrong here never harms the training."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anidiff_jax.config import TrainConfig
from anidiff_jax.training.runs import best_of
from anidiff_jax.weights.hub import in_a_line, public_name, token_of, upload

log = logging.getLogger(__name__)

PRIVATE = ("csv_path", "video_folder", "validation_csv", "latent_cache", "output_dir", "validation_prompts_path", "resume_from_checkpoint")

MODELS = ("model_id_or_path", "motion_adapter_id_or_path", "vae_path", "text_encoder_path")


class Hub:
    """Pushes by the strategy that was asked for, in a thread of its own; without push_to_hub it does nothing.

    The token is never written anywhere.
    """

    def __init__(self, config: TrainConfig, clips: int):
        self.config, self.clips = config, clips
        self._pushed: Path | None = None
        self._waiting: set[Path] = set()
        self._thread = ThreadPoolExecutor(1)  # a slow hub holds nothing up

    def saved(self, checkpoint: Path, is_best: bool) -> None:
        """After each checkpoint."""
        if self.config.push_to_hub and self.config.push_hub_strategy == "all_checkpoints":
            self._submit(checkpoint, f"{checkpoint.name}/")
        elif self.config.push_to_hub and self.config.push_hub_strategy == "push_best" and is_best:
            self._submit(checkpoint)

    def needs(self, checkpoint: Path) -> bool:
        """Whether it is still to be pushed: a slow hub gets it before it may be deleted."""
        return checkpoint in self._waiting

    def wait(self) -> None:
        """Returns when all is pushed that was to be; nothing can be pushed after it."""
        self._thread.shutdown()

    def finished(self, last: Path) -> None:
        """After the run: the last checkpoint, where it is wanted, or where there was no validation to find a best one; waits."""
        self.wait()
        if not self.config.push_to_hub or self.config.push_hub_strategy == "all_checkpoints":
            return
        best = best_of(last.parent.parent) if self.config.push_hub_strategy == "push_best" else None
        wanted = last.parent / f"iter-{best['step']}" if best else last
        if wanted != self._pushed and wanted.is_dir():
            self._push(wanted)

    def _submit(self, checkpoint: Path, prefix: str = "") -> None:
        self._waiting.add(checkpoint)
        self._thread.submit(self._push, checkpoint, prefix).add_done_callback(lambda _: self._waiting.discard(checkpoint))

    def _push(self, checkpoint: Path, prefix: str = "") -> None:
        c = self.config
        token = c.hub_token
        try:
            token = token_of(c.hub, c.hub_token)
            own = [path for path in checkpoint.iterdir() if path.is_file() and path.name != "train_config.json"]
            files: dict[str, Path | bytes] = {prefix + path.name: path for path in sorted(own)}
            sample = next(iter(sorted((checkpoint.parent.parent / "samples" / checkpoint.name).glob("*.gif"))), None)
            if sample is not None:
                files[f"{prefix}sample.gif"] = sample
            files[f"{prefix}README.md"] = card(c, checkpoint, self.clips, sample is not None).encode()
            message = f"{checkpoint.name} of {checkpoint.parent.parent.name}"
            repo = upload(c.hub, c.hub_model_id or "", files, message, c.hub_private_repo, token)
            self._pushed = checkpoint
            log.info("pushed %s to %s", checkpoint, repo)
        except Exception as error:  # of many kinds; the training matters more
            log.warning("%s could not be pushed to %s: %s", checkpoint, c.hub_model_id, in_a_line(error, token))


def card(config: TrainConfig, checkpoint: Path, clips: int, sample: bool) -> str:
    """The model card of a checkpoint. Of paths on this machine it says the last name only."""
    from huggingface_hub import ModelCardData

    base = public_name(config.model_id_or_path)
    on_hub = "/".join(base.split("/")[:2]) if base and base == config.model_id_or_path else None  # of a file, its repository
    tags = ["animatediff", "text-to-video", *(["lora"] if config.sft_type == "lora" else [])]
    given = {name: value for name, value in config.to_json().items() if name in config.given and name not in PRIVATE}
    given |= {name: public_name(given[name]) for name in MODELS if name in given}
    if "lora" in given:
        given["lora"] = [f"{public_name(path)}:{scale:g}" for path, scale in config.loras()]
    kind = "LoRA for AnimateDiff" if config.sft_type == "lora" else "AnimateDiff weights"
    lines = ["---", ModelCardData(base_model=on_hub, library_name="diffusers", tags=tags).to_yaml(), "---", "", f"# {kind}", ""]
    if sample:
        lines += ["![a sample](sample.gif)", ""]
    lines += [
        f"- base model: {base or 'the tiny model that anidiff-jax ships'}",
        f"- motion adapter: {public_name(config.motion_adapter_id_or_path) or 'none given'}",
        f"- clips: {clips}, of {config.sample_n_frames} frames, {config.height} × {config.width} pixels, stride {config.sample_stride}",
        f"- updates: {checkpoint.name[5:]}, with anidiff-jax",
        "",
        "Settings that were given:",
        "",
        *(f"- `{name}`: {value}" for name, value in sorted(given.items())),
        "",
    ]
    return "\n".join(lines)
