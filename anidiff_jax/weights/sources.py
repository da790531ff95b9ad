"""Base models and motion modules wherever they lie and however they are named → configurations and tensors under diffusers' names."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anidiff_jax.errors import UserError
from anidiff_jax.weights import kinds, ldm, store
from anidiff_jax.weights.files import read_json, renamed
from anidiff_jax.weights.hub import hub_tokenizer
from anidiff_jax.weights.kinds import Kind, recognise
from anidiff_jax.weights.original import from_original
from anidiff_jax.weights.store import PARTS, STEMS
from anidiff_jax.weights.tensors import Tensor
from anidiff_jax.weights.tree import is_motion

log = logging.getLogger(__name__)

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # of Stable Diffusion 1.x, on the hub: single files hold none
ARGUMENTS = {
    kinds.BASE: "--model_id_or_path", kinds.MOTION: "--motion_adapter_id_or_path", kinds.LORA: "--lora", kinds.VAE: "--vae_path",
    kinds.TEXT: "--text_encoder_path", kinds.VIDEO_UNET: "--sft_type full --ckpt_dir", kinds.UNET: "--sft_type full --ckpt_dir",
}  # fmt: skip


@dataclass
class Source:
    """A base model, unread. Its parts are those of `store.PARTS`; its tensors have the names that some diffusers gave them."""

    where: Path
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Tensor]]
    tokenizer: Path | str  # a folder, or the hub id that has it
    scheduler: dict[str, Any]
    index: dict[str, Any]  # model_index.json; {} of a single file
    unet: Path | None = None  # where another took the UNet's place

    def named(self, part: str) -> dict[str, Tensor]:
        """A part's tensors under the names of today's diffusers, and the text encoder's with `text_model.` in front."""
        return NAMES[part](self.tensors[part], self.where) if part in NAMES else dict(self.tensors[part])


def base_source(path: Path, vae: Path | None = None, text_encoder: Path | None = None, unet: Path | None = None) -> Source:
    """A folder in diffusers layout, ours with Orbax arrays, or a single file; the other three take the place of its own parts.

    unet: the folder of one that trained as a whole.
    """
    found = expect(path, kinds.BASE)
    parts, configs = dict[str, dict[str, Tensor]](), dict[str, dict[str, Any]]()
    scheduler, index = dict[str, Any](), dict[str, Any]()
    tokenizer: Path | str = CLIP_TOKENIZER
    for note in found.notes:
        log.info("%s: %s", path, note)
    if found.naming == "LDM":
        parts = ldm.parts_of(found.tensors, path)
        configs = {part: ldm.CONFIGS[part](tensors) for part, tensors in parts.items()}
    else:
        for part in PARTS:
            if (path / part).is_dir():
                parts[part], configs[part] = store.tensors_in(path / part, STEMS[part]), read_json(path / part / "config.json")
        if (path / "tokenizer").is_dir():
            tokenizer = path / "tokenizer"
        if (path / "scheduler" / "scheduler_config.json").is_file():
            scheduler = read_json(path / "scheduler" / "scheduler_config.json")
        if (path / "model_index.json").is_file():
            index = read_json(path / "model_index.json")
    for part, other in (("vae", vae), ("text_encoder", text_encoder), ("unet", unet)):
        if other is not None:
            parts[part], configs[part] = _part_of(other, part)
    if text_encoder is not None:
        own = [folder for folder in (text_encoder / "tokenizer", text_encoder.parent / "tokenizer", text_encoder) if _is_tokenizer(folder)]
        tokenizer = own[0] if own else tokenizer
    for part in PARTS:
        if part not in parts:
            raise UserError(
                f"{path} holds no {part.replace('_', ' ')}: give one with {'--vae_path' if part == 'vae' else '--text_encoder_path'}"
            )
    return Source(path, configs, parts, tokenizer, scheduler, index, unet)


def tokenizer_of(source: Source) -> Path:
    """The folder of its tokenizer, out of the hub where it has none of its own."""
    return hub_tokenizer(source.tokenizer) if isinstance(source.tokenizer, str) else source.tokenizer


def _part_of(path: Path, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One network, from a file or folder of its own or from a whole model."""
    if (path / part).is_dir():
        path = path / part
    own = {"vae": [kinds.VAE], "text_encoder": [kinds.TEXT], "unet": [kinds.UNET, kinds.VIDEO_UNET]}[part]
    if (path / "config.json").is_file():
        expect(path, *own)
        return store.tensors_in(path, STEMS[part]), read_json(path / "config.json")
    found = expect(path, *own, kinds.BASE)
    for note in found.notes:
        log.info("%s: %s", path, note)
    tensors = ldm.parts_of(found.tensors, path).get(part) or (dict(found.tensors) if part == "text_encoder" else {})
    if not tensors:
        raise UserError(f"{path} is a {found.naming} {found.kind} without config.json: give its folder")
    return tensors, ldm.CONFIGS[part](tensors)


def _is_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def motion_source(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Kind]:
    """(config.json, tensors under diffusers' names, what it was) of motion modules; {} where a file has no configuration."""
    if (path / "motion_adapter").is_dir():
        path = path / "motion_adapter"
    found = expect(path, kinds.MOTION)
    for note in found.notes:
        log.info("%s: %s", path, note)
    strange = sorted(key for key in found.tensors if not is_motion(key))
    if strange:
        raise UserError(f"{path} holds unexpected {', '.join(strange[:3])}: it is not a plain motion adapter")
    raw = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    tensors = renamed(found.tensors, lambda key: key.removeprefix("module."), path)
    return raw, from_original(tensors, path) if found.naming == "original" else tensors, found


def expect(path: Path, *wanted: str) -> Kind:
    """What lies at `path`; UserError where that is none of `wanted`, with the argument that takes it."""
    found = recognise(path)
    if found.kind not in wanted or not found.supported:
        what = " ".join(filter(None, [found.naming, found.version, found.kind]))
        do = f"give it as {ARGUMENTS[found.kind]}" if found.supported and found.kind in ARGUMENTS else f"a {wanted[0]} is expected"
        more = f" ({'; '.join(found.notes)})" if found.notes and not found.supported else ""
        raise UserError(f"{path} is {what}{more}{'' if found.supported else ', which is not supported'}: {do}")
    return found


def _text_names(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Names with `text_model.`, as older transformers wrote them; without the position_ids buffer, which is 0, 1, 2, …"""
    named = renamed(tensors, lambda key: key if key.startswith("text_model.") else f"text_model.{key}", where)
    return {k: t for k, t in named.items() if not k.endswith("position_ids")}


def _vae_names(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Today's names of the attention layers, for files written before diffusers 0.17."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

    def rename(key):
        *path, layer, leaf = key.split(".")
        return ".".join([*path, old.get(layer, layer) if "attentions" in path else layer, leaf])

    return renamed(tensors, rename, where)


NAMES: dict[str, Callable[[dict[str, Tensor], Path], dict[str, Tensor]]] = {"vae": _vae_names, "text_encoder": _text_names}
