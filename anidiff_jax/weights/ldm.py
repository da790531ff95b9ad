"""Single files of Stable Diffusion 1.x, in the names of the latent-diffusion repository → diffusers' names and configurations.

A file says nothing of its structure but in its tensors, so the configurations follow from their names and shapes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anidiff_jax.errors import UserError
from anidiff_jax.weights.files import renamed
from anidiff_jax.weights.tensors import Tensor

UNET, VAE, TEXT, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "model_ema."
OPEN_CLIP, XL = "cond_stage_model.model.", "conditioner.embedders."
HEADS = 8  # of Stable Diffusion 1.x, whatever the width; 2.x, with linear projections, has 64 channels a head

Rules = list[tuple[str, str | Callable[[re.Match], str]]]


def parts_of(tensors: Mapping[str, Tensor], where) -> dict[str, dict[str, Tensor]]:
    """{"unet" | "vae" | "text_encoder": tensors under diffusers' names}: those that the file holds."""
    if any(key.startswith(XL) for key in tensors):
        raise UserError(f"{where} is a Stable Diffusion XL model: Stable Diffusion 1.x and 2.x are supported")
    if any(key.startswith(OPEN_CLIP) for key in tensors):
        raise UserError(f"{where} is a single file of Stable Diffusion 2.x: give it in diffusers layout")
    inside = lambda prefix: {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    parts = {}
    if unet := inside(UNET):
        parts["unet"] = renamed(unet, by_rules(unet_rules(unet, where)), where)
    vae = inside(VAE) or (dict(tensors) if "decoder.mid.block_1.norm1.weight" in tensors else {})
    if vae:
        named = renamed(without_loss(vae), by_rules(vae_rules(vae, where)), where)
        parts["vae"] = {key: _as_linear(key, tensor) for key, tensor in named.items()}
    if text := inside(TEXT):
        parts["text_encoder"] = text
    return parts


def leftovers(tensors: Iterable[str]) -> list[str]:
    """Names that are no part of a network: schedules that follow from the configuration, averages, a trainer's state."""
    return [key for key in tensors if not key.startswith((UNET, VAE, TEXT))]


def by_rules(rules: Rules) -> Callable[[str], str]:
    """The new name of a tensor: every rule that fits is applied, in order."""

    def name_of(key: str) -> str:
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        return key

    return name_of


_RESNET: Rules = [
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.skip_connection\.", ".conv_shortcut."),
]


def unet_rules(keys: Iterable[str], where) -> Rules:
    """input_blocks.n.m → down_blocks.i.….j: blocks are counted through, a level has its layers and then a downsampler."""
    downsamplers = sorted(int(k.split(".")[1]) for k in keys if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", k))
    if not downsamplers:
        raise UserError(f"{where}: its UNet has one resolution only, which is not supported")
    a_level = downsamplers[0]  # blocks of a level: its layers, and the downsampler

    def down(match: re.Match) -> str:
        level, layer = divmod(int(match[1]) - 1, a_level)
        if match[2] == "0.op":
            return f"down_blocks.{level}.downsamplers.0.conv."
        return f"down_blocks.{level}.{'attentions' if match[2] == '1' else 'resnets'}.{layer}."

    def up(match: re.Match) -> str:
        level, layer = divmod(int(match[1]), a_level)
        if match[2].endswith(".conv"):
            return f"up_blocks.{level}.upsamplers.0.conv."
        return f"up_blocks.{level}.{'attentions' if match[2] == '1' else 'resnets'}.{layer}."

    return [
        (r"^time_embed\.0\.", "time_embedding.linear_1."),
        (r"^time_embed\.2\.", "time_embedding.linear_2."),
        (r"^input_blocks\.0\.0\.", "conv_in."),
        (r"^out\.0\.", "conv_norm_out."),
        (r"^out\.2\.", "conv_out."),
        (r"^input_blocks\.(\d+)\.(0\.op|0|1)\.", down),
        (r"^middle_block\.0\.", "mid_block.resnets.0."),
        (r"^middle_block\.1\.", "mid_block.attentions.0."),
        (r"^middle_block\.2\.", "mid_block.resnets.1."),
        (r"^output_blocks\.(\d+)\.([12]\.conv|0|1)\.", up),
        *_RESNET,
    ]


def vae_rules(keys: Iterable[str], where) -> Rules:
    """encoder.down.i.block.j → encoder.down_blocks.i.resnets.j; the decoder's levels are counted from the other end."""
    levels = [int(match[1]) for key in keys if (match := re.match(r"decoder\.up\.(\d+)\.", key))]
    if not levels:
        raise UserError(f"{where}: its VAE has no decoder, or is of another kind")
    last = max(levels)
    return [
        (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"^encoder\.down\.(\d+)\.downsample\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
        (r"^decoder\.up\.(\d+)\.block\.", lambda m: f"decoder.up_blocks.{last - int(m[1])}.resnets."),
        (r"^decoder\.up\.(\d+)\.upsample\.conv\.", lambda m: f"decoder.up_blocks.{last - int(m[1])}.upsamplers.0.conv."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ]


def _as_linear(key: str, tensor: Tensor) -> Tensor:
    """The attention's layers, which single files keep as convolutions of one pixel, as the Linear layers that they are in diffusers."""
    if ".attentions." not in key or len(tensor.shape) != 4:
        return tensor
    return Tensor(tensor.shape[:2], tensor.dtype, lambda: tensor.read().reshape(tensor.shape[:2]))


def without_loss(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Files of a VAE alone often keep its trainer's discriminator and averages."""
    return {k: t for k, t in vae.items() if k.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}


def unet_json(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json of a UNet with diffusers' names."""
    count = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("down_blocks."))
    blocks = range(count)
    shape = lambda key: tensors[key].shape
    attends = [f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in blocks]
    first = next(k for k in tensors if k.endswith(".attn2.to_k.weight"))
    linear = len(shape(first.split(".transformer_blocks.")[0] + ".proj_in.weight")) == 2
    channels = [shape(f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in blocks]
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": [max(1, c // 64) for c in channels] if linear else HEADS,
        "block_out_channels": channels,
        "cross_attention_dim": shape(first)[1],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "in_channels": shape("conv_in.weight")[1],
        "layers_per_block": sum(f"down_blocks.0.resnets.{j}.conv1.weight" in tensors for j in range(9)),
        "norm_num_groups": 32,
        "out_channels": shape("conv_out.weight")[0],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "use_linear_projection": linear,
    }


def vae_json(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json of a VAE with diffusers' names; the scale of the latents is Stable Diffusion 1.x's, which no file says."""
    count = 1 + max(int(k.split(".")[2]) for k in tensors if k.startswith("encoder.down_blocks."))
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(count)],
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "latent_channels": tensors["post_quant_conv.weight"].shape[0],
        "layers_per_block": sum(f"encoder.down_blocks.0.resnets.{j}.conv1.weight" in tensors for j in range(9)),
        "norm_num_groups": 32,
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * count,
    }


def text_json(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json of CLIP's text encoder."""
    named = {key.removeprefix("text_model."): tensor.shape for key, tensor in tensors.items()}
    vocabulary, width = named["embeddings.token_embedding.weight"]
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "intermediate_size": named["encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": named["embeddings.position_embedding.weight"][0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": 1 + max(int(k.split(".")[2]) for k in named if k.startswith("encoder.layers.")),
        "vocab_size": vocabulary,
    }


CONFIGS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Any]]] = {"unet": unet_json, "vae": vae_json, "text_encoder": text_json}
