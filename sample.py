"""Samples videos from prompts as GIFs.

    python sample.py --prompt "a red circle moving right on a white background"      # the embedded tiny model
    python sample.py --ckpt_dir output/ad-…/checkpoints/iter-100                      # a LoRA trained on it
    python sample.py --model_id_or_path SD15 --motion_adapter_id_or_path ADAPTER --eval_human true
    python sample.py --model_id_or_path SD15 --sft_type full --ckpt_dir CHECKPOINT
    python sample.py --model_id_or_path SD15 --motion_adapter_id_or_path ADAPTER --ckpt_dir CHECKPOINT --merge_lora true

Every argument: python sample.py --help.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anidiff_jax.arguments import parse
from anidiff_jax.config import SampleConfig
from anidiff_jax.errors import UserError, run_script

SOURCES = ("model_id_or_path", "motion_adapter_id_or_path", "hub", "vae_path", "text_encoder_path", "ckpt_dir", "lora",
           "motion_norm", "spatial_norm", "motion_scale")  # fmt: skip


def main() -> None:
    config = parse(SampleConfig)
    prompts = ask() if config.eval_human else [config.prompt] if config.prompt is not None else config.prompts()

    from anidiff_jax.parallel import set_up_jax
    from anidiff_jax.training.report import start_log
    from anidiff_jax.video import free_path, save_gif

    set_up_jax()
    start_log()
    folder = Path(config.output_path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before anything is computed
    settings = {"negative_prompt": config.negative_prompt, **config.sampling()}
    pipeline = load(config)
    sources = {name: getattr(config, name) for name in SOURCES}
    recipe = {**settings, "stride": config.sample_stride, **asdict(pipeline.schedule), "dtype": pipeline.dtype, **sources}
    for prompt in prompts:
        (video,) = pipeline(prompt, **settings)
        path = free_path(folder, prompt, config.seed)
        save_gif(video, path, config.fps, {"prompt": prompt, **recipe})
        print(path, flush=True)


def load(config: SampleConfig):
    """The pipeline that the arguments describe: base, adapter, and what was trained; merged first where that is asked."""
    import jax

    from anidiff_jax.pipeline import AnimateDiffPipeline, check_size
    from anidiff_jax.training.checkpoint import kind_of
    from anidiff_jax.weights.merge import write_merged_adapter

    trained: dict[str, Any] = {}
    if config.ckpt_dir is not None:
        kind = kind_of(Path(config.ckpt_dir).expanduser())  # lora, motion_adapter or unet: the pipeline's name for it
        if (kind == "lora") != (config.sft_type == "lora"):
            held, other = ("a LoRA", "lora") if kind == "lora" else ("no LoRA", "full")
            raise UserError(f"ckpt_dir {config.ckpt_dir} holds {held}: give --sft_type {other}")
        trained = {kind: Path(config.ckpt_dir).expanduser()}
    pipeline = AnimateDiffPipeline.from_pretrained(
        config.model_id_or_path,
        **{"motion_adapter": config.motion_adapter_id_or_path} | trained,
        dtype=config.dtype if config.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16",
        model_revision=config.model_revision,
        motion_adapter_revision=config.motion_adapter_revision,
        hub=config.hub,
        motion_num_attention_heads=config.said("motion_num_attention_heads"),
        motion_max_seq_length=config.said("motion_max_seq_length"),
        attention=config.attention,
        vae=config.vae_path,
        text_encoder=config.text_encoder_path,
        motion_norm=config.motion_norm,
        spatial_norm=config.spatial_norm,
        motion_scale=config.motion_scale,
        **config.noise_arguments(),
    )
    check_size(pipeline.model, config.sample_n_frames, config.height, config.width)
    if config.merge_lora:
        adapter, revision = config.motion_adapter_id_or_path, config.motion_adapter_revision
        print(write_merged_adapter(adapter, revision, trained["lora"], config.replace_if_exists, config.hub), flush=True)
        pipeline.merge_lora()
    for path, scale in config.loras():
        pipeline.load_lora(path, scale, config.hub)
    return pipeline


def ask() -> Iterator[str]:
    """Prompts as the user types them, or as they come through a pipe."""
    question = "prompt> " if sys.stdin.isatty() else ""
    while True:
        try:
            prompt = input(question).strip()
        except EOFError:
            return
        if prompt in ("", "exit"):
            return
        yield prompt


if __name__ == "__main__":
    run_script(main)
