"""Files in other programs' names, written from diffusers models with random weights: each table follows the format's own naming."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from tests import reference

WIDE = {"block_out_channels": (32, 64), "attention_head_dim": 8, "norm_num_groups": 32, "cross_attention_dim": 128}


def sd_parts(seed: int = 0):
    """(unet, vae, text encoder) in the proportions that single files are known to have."""
    unet = reference.unet(seed, **WIDE)
    vae = reference.vae(seed + 1, block_out_channels=(32, 64, 64), norm_num_groups=32)
    size = reference.vocabulary_size()
    text = reference.text_encoder(size, seed + 2, hidden_size=128, num_attention_heads=2, intermediate_size=64)
    return unet, vae, text


def write_sd_folder(folder: Path, parts) -> Path:
    unet, vae, text = parts
    tokenizer = reference.tokenizer(folder / "made")
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=reference.ddim(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "sd")
    return folder / "sd"


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip


def ldm_unet_name(key: str, layers: int = 1) -> str:
    """down_blocks.i.resnets.j.… → input_blocks.n.0.…"""
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}  # fmt: skip
    for ours, theirs in fixed.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    block, kind, rest = re.fullmatch(r"(\w+_blocks\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(.*)", key).groups()
    j, rest = rest.split(".", 1)
    if kind == "resnets":
        name, leaf = rest.rsplit(".", 1)
        rest = f"{RESNET[name]}.{leaf}"
    if block == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}.{rest}"
    side, i = block.split(".")
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(int(i) + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{1 + int(i) * (layers + 1) + int(j)}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        attends = int(i) == 1  # in the reference UNet the second up block attends, and has no upsampler
        return f"output_blocks.{int(i) * (layers + 1) + layers}.{2 if attends else 1}.{rest}"
    return f"output_blocks.{int(i) * (layers + 1) + int(j)}.{int(kind == 'attentions')}.{rest}"


def ldm_vae_name(key: str, levels: int = 3) -> str:
    for pattern, new in [
        (r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
        (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"decoder\.up_blocks\.(\d)\.resnets\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block."),
        (r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample."),
        (r"conv_shortcut", "nin_shortcut"), (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"), (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_(.)", r"mid.attn_1.\1"), (r"conv_norm_out", "norm_out"),
    ]:  # fmt: skip
        key = re.sub(pattern, new, key)
    return key


def single_file(parts, ema: bool = False, vae: bool = True, text: bool = True) -> dict[str, torch.Tensor]:
    """The state dict of a Stable Diffusion 1.x file."""
    unet, autoencoder, encoder = parts
    state = {f"model.diffusion_model.{ldm_unet_name(k)}": v for k, v in unet.state_dict().items()}
    if ema:
        state |= {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in list(state.items())}
        state["model_ema.decay"] = torch.tensor(0.9999)
    if vae:
        for k, v in autoencoder.state_dict().items():
            linear = "attentions" in k and v.ndim == 2
            state[f"first_stage_model.{ldm_vae_name(k)}"] = v[:, :, None, None] if linear else v
    if text:
        for k, v in encoder.state_dict().items():
            state[f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}"] = v
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["betas"] = torch.linspace(0, 1, 1000)
    state["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    return {k: v.clone().contiguous() for k, v in state.items()}


def original_motion(adapter) -> dict[str, torch.Tensor]:
    """The state dict of a motion module of the original repository."""
    state = {}
    for key, value in adapter.state_dict().items():
        name = re.sub(r"(motion_modules\.\d+\.)", r"\1temporal_transformer.", key)
        for ours, theirs in {".attn1.": ".attention_blocks.0.", ".attn2.": ".attention_blocks.1.", ".norm1.": ".norms.0.",
                             ".norm2.": ".norms.1.", ".norm3.": ".ff_norm."}.items():  # fmt: skip
            name = name.replace(ours, theirs)
        if name.endswith(".pos_embed.pe"):
            for i in (0, 1):
                state[name.replace(".pos_embed.pe", f".attention_blocks.{i}.pos_encoder.pe")] = value.clone()
        else:
            state[name] = value.clone()
    return state


def save(state: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def lora_layers(unet, text_encoder, rank: int = 3, seed: int = 5) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """{(network, layer): (down, up)} on the layers that LoRAs of images adapt, convolutions of one pixel among them."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for part, network in (("unet", unet), ("text_encoder", text_encoder)):
        for name, module in network.named_modules():
            wanted = "attentions" in name or "motion_modules" in name or name.endswith(("q_proj", "v_proj", "fc1"))
            if wanted and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                draw = lambda *shape: torch.randn(shape, generator=generator) / 4
                down, up = draw(rank, *module.weight.shape[1:]), draw(module.weight.shape[0], rank, *[1] * (module.weight.ndim - 2))
                found[part, name] = down, up
    return found


def kohya(layers, alpha: float) -> dict[str, torch.Tensor]:
    state = {}
    for (part, name), (down, up) in layers.items():
        if part == "text_encoder" and not name.startswith("text_model."):
            name = f"text_model.{name}"
        stem = f"lora_{'unet' if part == 'unet' else 'te'}_{name.replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return state


def peft_names(layers) -> dict[str, torch.Tensor]:
    """As diffusers writes them today."""
    return {f"{part}.{name}.lora_{m}.weight": x for (part, name), pair in layers.items() for m, x in zip("AB", pair, strict=True)}


def old_diffusers(layers) -> dict[str, torch.Tensor]:
    """As diffusers 0.17 to 0.21 wrote them: processors in the UNet, lora_linear_layer in the text encoder."""
    state = {}
    for (part, name), pair in layers.items():
        for m, x in zip(("down", "up"), pair, strict=True):
            if part == "text_encoder":
                state[f"text_encoder.{name}.lora_linear_layer.{m}.weight"] = x
            elif re.search(r"attn[12]\.to_", name):
                attention, to = name.removesuffix(".0").rsplit(".", 1)
                state[f"unet.{attention}.processor.{to}_lora.{m}.weight"] = x
            else:
                state[f"unet.{name}.lora.{m}.weight"] = x
    return state


def original_motion_lora(layers) -> dict[str, torch.Tensor]:
    """As the original repository's motion LoRAs are written: attentions only, module names, no alpha."""
    state = {}
    for (_, name), pair in layers.items():
        match = re.fullmatch(r"(.*motion_modules\.\d+\.)(transformer_blocks\.\d+\.)attn([12])\.(to_[qkv]|to_out)(\.0)?", name)
        if match:
            stem = f"{match[1]}temporal_transformer.{match[2]}attention_blocks.{int(match[3]) - 1}.processor.{match[4]}_lora"
            state |= {f"{stem}.{m}.weight": x for m, x in zip(("down", "up"), pair, strict=True)}
    return state


def domain_adapter(layers) -> dict:
    """As the original repository's v3_sd15_adapter.ckpt: a LoRA of the image attentions, wrapped, no alpha."""
    spatial = {key: pair for key, pair in layers.items() if re.search(r"\battentions\..*attn[12]\.to_", key[1])}
    return {"state_dict": {key.removeprefix("unet."): x for key, x in old_diffusers(spatial).items()}, "animatediff_config": ""}
