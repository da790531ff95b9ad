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
from pathlib import Path

from anidiff_jax.config import SampleConfig, parse
from anidiff_jax.errors import UserError, run_script


def main() -> None:
    config = parse(SampleConfig)
    prompts = ask() if config.eval_human else [config.prompt] if config.prompt is not None else config.prompts()

    from anidiff_jax.parallel import set_up_jax
    from anidiff_jax.training.report import start_log
    from anidiff_jax.video import free_path, save_gif

    start_log()
    set_up_jax()
    pipeline = load(config)
    settings = {
        "negative_prompt": config.negative_prompt,
        "num_frames": config.sample_n_frames,
        "height": config.sample_size,
        "width": config.sample_size,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
    }
    sources = {name: getattr(config, name) for name in ("model_id_or_path", "motion_adapter_id_or_path", "ckpt_dir")}
    for prompt in prompts:
        (video,) = pipeline(prompt, **settings)
        path = free_path(Path(config.output_path).expanduser(), prompt, config.seed)
        save_gif(video, path, config.fps, {"prompt": prompt, **settings, "stride": config.sample_stride, **sources})
        print(path, flush=True)


def load(config: SampleConfig):
    """The pipeline that the arguments describe: base, adapter, and what was trained; merged first where that is asked."""
    import jax

    from anidiff_jax.pipeline import AnimateDiffPipeline
    from anidiff_jax.training.checkpoint import holds_lora
    from anidiff_jax.weights.merge import write_merged_adapter

    checkpoint = None if config.ckpt_dir is None else Path(config.ckpt_dir).expanduser()
    adapter: str | Path | None = config.motion_adapter_id_or_path
    lora: Path | None = None
    if checkpoint is not None:
        if holds_lora(checkpoint) != (config.sft_type == "lora"):
            held, other = ("a LoRA", "lora") if holds_lora(checkpoint) else ("no LoRA", "full")
            raise UserError(f"ckpt_dir {checkpoint} holds {held}: give --sft_type {other}")
        if config.sft_type == "lora":
            lora = checkpoint
        else:
            adapter = checkpoint
    if config.model_id_or_path is not None and adapter is None and lora is not None:
        raise UserError("a LoRA needs the motion adapter that it was trained on: give --motion_adapter_id_or_path")
    dtype = config.dtype if config.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    noise = {name: getattr(config, name) for name in config.noise().names() if hasattr(config, name)}
    open_pipeline = lambda adapter, lora: AnimateDiffPipeline.from_pretrained(
        config.model_id_or_path,
        adapter,
        lora=lora,
        dtype=dtype,
        model_revision=config.model_revision,
        motion_adapter_revision=config.motion_adapter_revision,
        attention=config.attention,
        **noise,
    )
    if lora is None or not config.merge_lora:
        return open_pipeline(adapter, lora)
    merged = write_merged_adapter(adapter, config.motion_adapter_revision, lora, config.replace_if_exists)
    print(merged, flush=True)
    return open_pipeline(merged, None)


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
