"""A Stable Diffusion folder in diffusers layout, and a motion adapter's → networks and their parameters."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anidiff_jax.errors import UserError
from anidiff_jax.models.clip import CLIPTextModel, clip_config
from anidiff_jax.models.config import (
    MotionConfig,
    fresh_motion_config,
    is_motion_unet,
    motion_config,
    unet_config,
)
from anidiff_jax.models.init import draw, shapes
from anidiff_jax.models.layers import Settings
from anidiff_jax.models.networks import Networks
from anidiff_jax.models.unet import UNet
from anidiff_jax.models.vae import AutoencoderKL, vae_config
from anidiff_jax.weights.files import load
from anidiff_jax.weights.kinds import recorded_norms
from anidiff_jax.weights.sources import Source, base_source, motion_source, tokenizer_of
from anidiff_jax.weights.tensors import Tensor
from anidiff_jax.weights.tree import Tree, flatten, is_motion, merge, split

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent.parent / "shapes" / "model"
EMBEDDED_CLIPS = EMBEDDED.parent / "clips"


@dataclass
class Model:
    """Networks, what is in them, and what the files said."""

    networks: Networks
    params: dict[str, Tree]  # text_encoder, vae, unet (image and motion weights in one tree)
    tokenizer: Any
    motion: MotionConfig | None
    unet_json: dict[str, Any]
    scheduler: dict[str, Any]  # scheduler_config.json of the base, {} where it has none
    hashes: dict[str, str] = field(default_factory=dict)  # of what was loaded: unet, motion_modules, vae, text_encoder

    def layers(self) -> dict[str, list[str]]:
        """Names of the layers of the networks that a LoRA may adapt."""
        weights = {part: flatten(self.params[part]) for part in ("unet", "text_encoder")}
        return {part: [key.removesuffix(".weight") for key in flat if key.endswith(".weight")] for part, flat in weights.items()}


def load_model(
    base: Path | Source,
    motion_adapter: Path | None = None,
    *,
    fresh_motion: bool = False,
    motion_heads: int | None = None,
    motion_frames: int | None = None,
    settings: Settings | None = None,
    dtype: str | None = "float32",
    keep_float32: Callable[[str], bool] = lambda key: False,
    seed: int = 0,
) -> Model:
    """Loads a base model with a motion adapter, with fresh motion modules, or with none.

    motion_heads, motion_frames: what the user said of the motion modules. It shapes fresh ones, gives the heads of a file
    without config, and is an error where an adapter says otherwise. motion_adapter: a UNet that trained as a whole brings its own instead.
    dtype: of all weights (None: as stored), except those of the UNet for which keep_float32(key). A base that is itself a
    video model (UNetMotionModel) brings its own motion modules. Errors (UserError) name the file and the tensor or key.
    """
    source = base if isinstance(base, Source) else base_source(base)
    settings = settings or Settings()
    dtype_of = lambda key: "float32" if keep_float32(key) else dtype
    where, unet_json, unet_tensors = source.where, source.configs["unet"], source.named("unet")
    groups = unet_json.get("norm_num_groups") or 32
    own_motion = {k: t for k, t in unet_tensors.items() if is_motion(k)}
    unet_tensors = {k: t for k, t in unet_tensors.items() if not is_motion(k)}

    motion: MotionConfig | None = None
    motion_tensors: dict[str, Tensor] = {}
    if motion_adapter is not None and source.unet is not None and own_motion:
        log.info("%s holds the motion modules that were trained: these are taken, not those of %s", source.unet, motion_adapter)
        motion_adapter = None
    if motion_adapter is not None:
        adapter_json, motion_tensors, found = motion_source(motion_adapter)
        tell_norms(found.norms, settings, motion_adapter)
        if not adapter_json.get("motion_num_attention_heads"):
            adapter_json = {**adapter_json, "motion_num_attention_heads": motion_heads}
        motion = motion_config(adapter_json, {k: t.shape for k, t in motion_tensors.items()}, groups, str(motion_adapter))
    elif own_motion:
        tell_norms(recorded_norms(source.unet or where / "unet"), settings, source.unet or where)
        motion_tensors = own_motion
        motion = motion_config(unet_json, {k: t.shape for k, t in own_motion.items()}, groups, str(where))
    elif fresh_motion:
        motion = fresh_motion_config(unet_json, motion_heads or 8, motion_frames or 32)
    elif is_motion_unet(unet_json):
        raise UserError(f"{where}: its config.json describes a video model, but it holds no motion modules")

    if motion is not None:
        said = {"motion_num_attention_heads": (motion_heads, motion.heads[0]), "motion_max_seq_length": (motion_frames, motion.max_frames)}
        for name, (given, own) in said.items():
            if given is not None and given != own:
                raise UserError(f"{name} {given} conflicts with the motion adapter, which has {own}: leave the argument out")

    networks = Networks(
        CLIPTextModel(clip_config(source.configs["text_encoder"]), settings),
        AutoencoderKL(vae_config(source.configs["vae"]), replace(settings, spatial_norm="per_frame")),
        UNet(unet_config(unet_json, motion, f"{where}: UNet"), settings),
    )
    _check_fit(networks, source.where)
    motion_shapes, image_shapes = split(shapes(networks.unet), is_motion)
    # The largest first: while a tensor is read and transposed, memory holds it twice.
    hashes = {}
    weights, hashes["unet"] = load(image_shapes, unet_tensors, dtype_of, where)
    if motion_tensors:
        modules, hashes["motion_modules"] = load(motion_shapes, motion_tensors, dtype_of, motion_adapter or where)
        weights = merge(weights, modules)
    elif motion is not None:
        weights = merge(weights, draw(motion_shapes, seed))
    params = {"unet": weights}
    for part, network, name in (("vae", networks.vae, "VAE"), ("text_encoder", networks.text_encoder, "CLIP")):
        params[part], hashes[part] = load(shapes(network), source.named(part), lambda _: dtype, f"{source.where}: {name}")
    return Model(networks, params, load_tokenizer(tokenizer_of(source)), motion, unet_json, source.scheduler, hashes)


def tell_norms(trained: Mapping[str, str], settings: Settings, where: Path) -> None:
    """Says it where motion modules were trained with other norms than are computed."""
    other = " ".join(f"--{name} {value}" for name, value in trained.items() if getattr(settings, name) != value)
    if other:
        log.info("%s was trained with other norms: %s computes them so", where, other)


def load_tokenizer(folder: Path):
    """CLIP's tokenizer from vocab.json + merges.txt or tokenizer.json."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder} holds neither tokenizer.json nor vocab.json: the model's tokenizer is missing")
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder))
    except Exception as error:  # of many kinds, from Rust too
        raise UserError(f"{folder}: the tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from None


def _check_fit(networks: Networks, base: Path) -> None:
    text, unet, vae = networks.text_encoder.config, networks.unet.config, networks.vae.config
    if text.hidden_size != unet.cross_attention_dim:
        raise UserError(f"{base}: the text encoder is {text.hidden_size} wide, the UNet expects {unet.cross_attention_dim}")
    if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
        raise UserError(
            f"{base}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels, the VAE has {vae.latent_channels}: "
            "inpainting and other special UNets are not supported"
        )
