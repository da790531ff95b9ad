"""A Stable Diffusion folder in diffusers layout, and a motion adapter's → networks and their parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from anidiff_jax.weights import store
from anidiff_jax.weights.files import Tensor, load, read_json
from anidiff_jax.weights.store import STEMS
from anidiff_jax.weights.tree import Tree, is_motion, merge, split

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


def load_model(
    base: Path,
    motion_adapter: Path | None = None,
    *,
    unet: Path | None = None,
    fresh_motion: bool = False,
    motion_heads: int | None = None,
    motion_frames: int | None = None,
    settings: Settings | None = None,
    dtype: str | None = "float32",
    keep_float32: Callable[[str], bool] = lambda key: False,
    seed: int = 0,
) -> Model:
    """Loads a base model with a motion adapter, with fresh motion modules, or with none.

    unet: a folder whose UNet takes the place of the base's (one that trained as a whole).
    motion_heads, motion_frames: what the user said of the motion modules. It shapes fresh ones, gives the heads of a file
    without config, and is an error where an adapter says otherwise.
    dtype: of all weights (None: as stored), except those of the UNet for which keep_float32(key). A base that is itself a
    video model (UNetMotionModel) brings its own motion modules. Errors (UserError) name the file and the tensor or key.
    """
    base, settings = store.base_folder(base), settings or Settings()
    dtype_of = lambda key: "float32" if keep_float32(key) else dtype
    unet_folder = unet or base / "unet"
    unet_json = read_json(unet_folder / "config.json")
    unet_tensors = store.tensors_in(unet_folder)
    groups = unet_json.get("norm_num_groups") or 32
    own_motion = {k: t for k, t in unet_tensors.items() if is_motion(k)}
    unet_tensors = {k: t for k, t in unet_tensors.items() if not is_motion(k)}

    motion: MotionConfig | None = None
    motion_tensors: dict[str, Tensor] = {}
    if motion_adapter is not None:
        adapter_json, motion_tensors = store.motion_adapter(motion_adapter)
        if not adapter_json.get("motion_num_attention_heads"):
            adapter_json = {**adapter_json, "motion_num_attention_heads": motion_heads}
        motion = motion_config(adapter_json, {k: t.shape for k, t in motion_tensors.items()}, groups, str(motion_adapter))
    elif own_motion:
        motion_tensors = own_motion
        motion = motion_config(unet_json, {k: t.shape for k, t in own_motion.items()}, groups, str(unet_folder))
    elif fresh_motion:
        motion = fresh_motion_config(unet_json, motion_heads or 8, motion_frames or 32)
    elif is_motion_unet(unet_json):
        raise UserError(f"{unet_folder}: its config.json describes a video model, but it holds no motion modules")

    if motion is not None:
        said = {"motion_num_attention_heads": (motion_heads, motion.heads[0]), "motion_max_seq_length": (motion_frames, motion.max_frames)}
        for name, (given, own) in said.items():
            if given is not None and given != own:
                raise UserError(f"{name} {given} conflicts with the motion adapter, which has {own}: leave the argument out")

    networks = Networks(
        CLIPTextModel(clip_config(read_json(base / "text_encoder" / "config.json")), settings),
        AutoencoderKL(vae_config(read_json(base / "vae" / "config.json")), settings),
        UNet(unet_config(unet_json, motion, str(unet_folder / "config.json")), settings),
    )
    _check_fit(networks, base)
    motion_shapes, image_shapes = split(shapes(networks.unet), is_motion)
    # The largest first: while a tensor is read and transposed, memory holds it twice.
    weights = load(image_shapes, unet_tensors, dtype_of, unet_folder)
    if motion_tensors:
        weights = merge(weights, load(motion_shapes, motion_tensors, dtype_of, motion_adapter or unet_folder))
    elif motion is not None:
        weights = merge(weights, draw(motion_shapes, seed))
    params = {
        "unet": weights,
        "vae": load(shapes(networks.vae), named_tensors(base, "vae"), lambda _: dtype, base / "vae"),
        "text_encoder": load(shapes(networks.text_encoder), named_tensors(base, "text_encoder"), lambda _: dtype, base / "text_encoder"),
    }
    scheduler = base / "scheduler" / "scheduler_config.json"
    return Model(
        networks, params, load_tokenizer(base / "tokenizer"), motion, unet_json, read_json(scheduler) if scheduler.exists() else {}
    )


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


def named_tensors(base: Path, part: str) -> dict[str, Tensor]:
    """A component's tensors under the names of today's diffusers and, for the text encoder, with `text_model.` in front."""
    return NAMES[part](store.tensors_in(base / part, STEMS[part]))


def _text_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names with `text_model.`, as older transformers wrote them; without the position_ids buffer."""
    named = {k if k.startswith("text_model.") else f"text_model.{k}": t for k, t in tensors.items()}
    return {k: t for k, t in named.items() if not k.endswith("position_ids")}


def _vae_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Today's names of the attention layers, for files written before diffusers 0.17."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

    def rename(key):
        *path, layer, leaf = key.split(".")
        return ".".join([*path, old.get(layer, layer) if "attentions" in path else layer, leaf])

    return {rename(k): t for k, t in tensors.items()}


NAMES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {"vae": _vae_names, "text_encoder": _text_names}
