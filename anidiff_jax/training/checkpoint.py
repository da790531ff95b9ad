"""`checkpoints/iter-N`: the training state (Orbax), and what trained as diffusers reads it. Never the frozen base."""

from pathlib import Path
from typing import Any

import jax

from anidiff_jax.config import TrainConfig
from anidiff_jax.errors import UserError
from anidiff_jax.models.config import is_motion_unet
from anidiff_jax.training.setup import lora_dtype
from anidiff_jax.training.state import TrainState
from anidiff_jax.weights import files
from anidiff_jax.weights.base import Model
from anidiff_jax.weights.lora_files import CONFIG as LORA_CONFIG
from anidiff_jax.weights.lora_files import save_lora
from anidiff_jax.weights.merge import WEIGHTS
from anidiff_jax.weights.tree import Tree, flatten, is_motion, merge, split


def save_checkpoint(run: Path, state: TrainState, frozen_unet: Tree, model: Model, config: TrainConfig) -> Path:
    """Writes iter-N and returns its path; it has this name only when it is whole.

    In it: state/ (to go on training), and one of
        config.json + diffusion_pytorch_model.safetensors      a MotionAdapter, or the UNet where other parts trained too
        pytorch_lora_weights.safetensors + adapter_config.json a LoRA
    """
    import orbax.checkpoint as ocp

    folder = run / "checkpoints" / f"iter-{int(state.step)}"
    header = {"trained_by": "anidiff-jax", "base_model": str(config.model_id_or_path or "embedded"), "step": str(int(state.step))}
    with files.written_whole(folder) as out:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((out / "state").absolute(), state)
        if config.sft_type == "lora":
            lora = jax.tree.map(lambda x: x.astype(lora_dtype(config)), state.params)
            save_lora(lora, out, config.lora_alpha, config.lora_dropout, header["base_model"], header)
        else:
            save_unet_part(state.params, frozen_unet, model, out, header)
        files.save_json(config.to_json(), out / "train_config.json")
    return folder


def save_unet_part(trained: Tree, frozen_unet: Tree, model: Model, out: Path, header: dict[str, str]) -> None:
    """The motion adapter, where nothing else trained; else the whole UNet."""
    whole = merge(frozen_unet, trained)
    if model.motion is not None and all(is_motion(key) for key in flatten(trained)):
        weights, config = split(whole, is_motion)[0], model.motion.to_json()
    else:
        weights, config = whole, unet_json(model)
    weights = jax.tree.map(lambda x: x.astype("float32"), weights)
    files.save_json(config, out / "config.json")
    files.save(weights, out / WEIGHTS, header)


def unet_json(model: Model) -> dict[str, Any]:
    """config.json of the UNet with the motion modules that it holds: UNet2DConditionModel, or UNetMotionModel."""
    raw = dict(model.unet_json)
    if model.motion is None or is_motion_unet(raw):
        return raw
    adapter = model.motion.to_json()
    keep = ("act_fn", "block_out_channels", "cross_attention_dim", "in_channels", "layers_per_block",
            "mid_block_scale_factor", "norm_eps", "norm_num_groups", "out_channels", "sample_size", "transformer_layers_per_block",
            "reverse_transformer_layers_per_block", "use_linear_projection")  # fmt: skip
    return {
        **{key: raw[key] for key in keep if key in raw},
        "_class_name": "UNetMotionModel",
        "down_block_types": [kind.replace("2D", "Motion") for kind in raw["down_block_types"]],
        "up_block_types": [kind.replace("2D", "Motion") for kind in raw["up_block_types"]],
        "num_attention_heads": raw.get("num_attention_heads") or raw.get("attention_head_dim") or 8,
        "motion_max_seq_length": adapter["motion_max_seq_length"],
        "motion_num_attention_heads": adapter["motion_num_attention_heads"],
        "temporal_transformer_layers_per_block": adapter["motion_transformer_layers_per_block"],
        "temporal_transformer_layers_per_mid_block": adapter["motion_transformer_layers_per_mid_block"],
        "use_motion_mid_block": adapter["use_motion_mid_block"],
    }


def kind_of(folder: Path) -> str:
    """What a checkpoint holds: "lora", "motion_adapter" or "unet"; a UserError where it is no checkpoint."""
    if not folder.is_dir():
        raise UserError(f"ckpt_dir {folder} does not exist: give a folder such as output/ad-…/checkpoints/iter-100")
    if (folder / LORA_CONFIG).is_file():
        return "lora"
    if (folder / "config.json").is_file() and (folder / WEIGHTS).is_file():
        return "unet" if (files.read_json(folder / "config.json").get("_class_name") or "").startswith("UNet") else "motion_adapter"
    inside = sorted((p.name for p in folder.glob("**/iter-*") if p.is_dir()), key=lambda name: int(name[5:]) if name[5:].isdigit() else -1)
    raise UserError(f"ckpt_dir {folder} is not a checkpoint" + (f": give the folder {inside[-1]} inside it" if inside else ""))
