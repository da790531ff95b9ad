"""Arguments → a pipeline, for sample.py and the studio."""

from pathlib import Path
from typing import Any

import jax

from anidiff_jax.config import SampleConfig
from anidiff_jax.errors import UserError
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.sampling import check_size, most_frames
from anidiff_jax.weights.kinds import kind_of_checkpoint
from anidiff_jax.weights.merge import merged_folder, must_be_free, write_merged_adapter


def check(pipeline: AnimateDiffPipeline, config: SampleConfig) -> None:
    """A UserError for a size, a number of frames or windows that the model cannot make."""
    check_size(pipeline.model, config.sample_n_frames, config.height, config.width, windows=True)
    config.context.window(config.sample_n_frames, pipeline.defaults["sample_n_frames"], most_frames(pipeline.model))


def load(config: SampleConfig) -> AnimateDiffPipeline:
    """The pipeline that the arguments describe: base, adapter, and what was trained; merged first where that is asked."""
    trained: dict[str, Any] = {}
    if config.ckpt_dir is not None:
        kind = kind_of_checkpoint(Path(config.ckpt_dir).expanduser())  # lora, motion_adapter or unet: the pipeline's name for it
        if (kind == "lora") != (config.sft_type == "lora"):
            held, other = ("a LoRA", "lora") if kind == "lora" else ("no LoRA", "full")
            raise UserError(f"ckpt_dir {config.ckpt_dir} holds {held}: give --sft_type {other}")
        trained = {kind: Path(config.ckpt_dir).expanduser()}
    if config.merge_lora and config.from_json is None:
        must_be_free(merged_folder(trained["lora"]), config.replace_if_exists)  # now, and not when all is loaded
        if config.motion_adapter_id_or_path is None and config.model_id_or_path is not None:
            raise UserError("merge_lora needs --motion_adapter_id_or_path, the adapter that the LoRA was trained on, to merge it into")
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
    check(pipeline, config)
    if config.merge_lora:
        adapter, revision = config.motion_adapter_id_or_path, config.motion_adapter_revision
        if config.from_json is None:  # else the folder was written then
            print(write_merged_adapter(adapter, revision, trained["lora"], config.replace_if_exists, config.hub), flush=True)
        pipeline.merge_lora()
    for path, scale in config.loras():
        pipeline.load_lora(path, scale, config.hub)
    return pipeline
