"""LoRA files of every common naming → adapters in ours. A name says the network, the layer, and which matrix it is.

unet.{layer}.lora_A.weight                                   diffusers, PEFT (base_model.model. in front, or .default. inside)
unet.{layer}.lora.down.weight                                diffusers before 0.22; text encoder: .lora_linear_layer.
{attention}.processor.to_q_lora.down.weight                  diffusers before 0.17, and the original's motion LoRAs
lora_unet_{layer with _ for .}.lora_down.weight, .alpha      kohya
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from anidiff_jax.errors import UserError
from anidiff_jax.weights import files
from anidiff_jax.weights.hashes import hash_of
from anidiff_jax.weights.original import original_names, our_name
from anidiff_jax.weights.tensors import PICKLES, Tensor, metadata_of, tensors_of
from anidiff_jax.weights.tree import Tree, flatten, unflatten

WEIGHTS = "pytorch_lora_weights.safetensors"
CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha in the header
FILES = (WEIGHTS, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")
REFUSED = {  # what other adapters than LoRA are recognised by
    "dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA", "hada_w1": "a LoHa", "lokr_w1": "a LoKr",
    "oft_blocks": "an OFT", "boft_": "a BOFT", "glora": "a GLoRA", ".diff_b": "a full difference", "lora_mid": "a LoRA in Tucker form",
}  # fmt: skip
_MATRIX = re.compile(
    r"^(?P<layer>.+?)(?:\.default)?\.(?:lora_(?P<ab>[AB])|(?:lora_|lora\.|lora_linear_layer\.)(?P<ud>down|up))(?:\.default)?\.weight$"
)
_PLAIN = re.compile(r"\^?(\w|\\?\.|-)*\$?")  # a layer's name, as programs write it: no repetition, over which matching might hang
_PROCESSOR = re.compile(r"^(?P<attention>.+)\.processor\.(?P<to>to_[qkv]|to_out)_lora\.(?P<ud>down|up)\.weight$")


@dataclass(frozen=True)
class Lora:
    """Adapters of the UNet and of the text encoder, ready to apply: B holds alpha / rank already."""

    unet: Tree = field(default_factory=dict)
    text_encoder: Tree = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """Of its weights."""
        return hash_of(self.unet, self.text_encoder)[:16]


@dataclass
class _Layer:
    matrices: dict[str, Tensor] = field(default_factory=dict)  # A, B
    alpha: float | None = None


def load_lora(path: Path, layers: Mapping[str, Sequence[str]]) -> Lora:
    """The adapters in a file or folder. layers: the names of the layers of "unet" and "text_encoder", which kohya's names lose."""
    file = file_of(path)
    tensors, said = tensors_of(file), _Settings(file)
    found: dict[tuple[str, str], _Layer] = {}
    for key, tensor in tensors.items():
        part, layer, which = named(key, layers, file)
        entry = found.setdefault((part, layer), _Layer())
        if which in entry.matrices or (which == "alpha" and entry.alpha is not None):
            raise UserError(f"{file} adapts {layer} twice ({key}): only one of the two could be used")
        if which == "alpha":
            if tensor.shape not in ((), (1,)):
                raise UserError(f"{file}: {key} has shape {list(tensor.shape)}, where one number is expected")
            entry.alpha = float(tensor.read().item())
        else:
            entry.matrices[which] = tensor
    trees: dict[str, dict[str, Any]] = {"unet": {}, "text_encoder": {}}
    for (part, layer), entry in found.items():
        if entry.matrices.keys() != {"A", "B"}:
            raise UserError(f"{file} is not a whole LoRA: {layer} lacks one of its two matrices")
        if any(len(tensor.shape) not in (2, 4) or 0 in tensor.shape for tensor in entry.matrices.values()):
            raise UserError(f"{file}: the matrices of {layer} have shapes that make no LoRA")
        down, up = (entry.matrices[name].read().astype(np.float32) for name in "AB")
        if down.shape[0] != up.shape[1] or np.prod(up.shape[2:], dtype=int) != 1:
            raise UserError(f"{file}: the matrices of {layer} have shapes {down.shape} and {up.shape}, which make no LoRA")
        rank = down.shape[0]
        scale = said.scale(part, layer, rank) if entry.alpha is None else entry.alpha / rank
        trees[part][f"{layer}.lora_A.weight"] = jnp.asarray(files.to_ours("weight", down))
        trees[part][f"{layer}.lora_B.weight"] = jnp.asarray(up.reshape(up.shape[:2]).T * np.float32(scale))
    return Lora(unflatten(trees["unet"]), unflatten(trees["text_encoder"]))


def adapts(path: Path) -> list[str]:
    """The names of the tensors in a LoRA's file."""
    return list(tensors_of(file_of(path)))


def named(key: str, layers: Mapping[str, Sequence[str]], where) -> tuple[str, str, str]:
    """(network, layer, "A" | "B" | "alpha") of a tensor."""
    for sign, kind in REFUSED.items():
        if sign in key:
            raise UserError(f"{where} is {kind} ({key}), not a plain LoRA: it is not supported")
    name = key.removeprefix("module.")
    part = "unet"
    for prefix, its in (("lora_unet_", "unet"), ("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder")):
        if name.startswith(prefix):
            flat, _, rest = name.removeprefix(prefix).partition(".")
            whole = _without_dots(flat, layers.get(its, ()), key, where)
            return its, whole, "alpha" if rest == "alpha" else _which(re.fullmatch(r"lora_(?P<ud>down|up)\.weight", rest), key, where)
    for prefix, its in (("unet.", "unet"), ("text_encoder.", "text_encoder"), ("base_model.model.", "unet")):
        if name.startswith(prefix):
            name, part = name.removeprefix(prefix), its
    if part == "text_encoder" or name.startswith("text_model."):
        part, name = "text_encoder", name if name.startswith("text_model.") else f"text_model.{name}"
    name = our_name(name)
    if name.endswith(".alpha"):
        return part, _layer_name(name.removesuffix(".alpha")), "alpha"
    if processor := _PROCESSOR.match(name):
        return part, _layer_name(f"{processor['attention']}.{processor['to']}"), _which(processor, key, where)
    match = _MATRIX.match(name)
    return part, _layer_name(match["layer"]) if match else "", _which(match, key, where)


def _layer_name(name: str) -> str:
    """The Linear itself, where a file names the attention's output by the module around it."""
    name = re.sub(r"\.processor\.(to_[qkv]|to_out)_lora$", r".\1", name)
    return f"{name}.0" if name.endswith(".to_out") else name


def _which(match: re.Match | None, key: str, where) -> str:
    if match is None:
        raise UserError(f"{where} holds {key}, which belongs to no LoRA that is known here")
    groups = match.groupdict()
    return groups.get("ab") or {"down": "A", "up": "B"}[groups["ud"]]


def _without_dots(flat: str, layers: Iterable[str], key: str, where) -> str:
    for name in layers:
        if name.replace(".", "_") == flat:
            return name
    raise UserError(f"{where} holds {key}, for a layer that this model lacks: it was made for another kind of model")


def _json(text: str, where: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: its header is not valid JSON ({error})") from None
    return value if isinstance(value, dict) else {}


def file_of(path: Path) -> Path:
    if path.is_file():
        return path
    for folder in (path, path / "default"):  # PEFT, and the reference implementation, keep an adapter in a folder of its name
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    single = [file for file in sorted(path.glob("*")) if file.suffix in (".safetensors", *PICKLES)]
    if len(single) == 1:
        return single[0]
    raise UserError(f"{path} holds no {WEIGHTS} and no adapter_model.*: it is not a LoRA")


class _Settings:
    """What stands beside the tensors: PEFT's config, or the header."""

    def __init__(self, file: Path):
        config = file.with_name(CONFIG)
        own = file.name in FILES and config.is_file()  # a file of another name may lie there too, and has its alpha in itself
        self.where = config if own else file
        if own:
            said = files.read_json(config)
            self.said = {"unet": said, "text_encoder": said}
        else:
            header = _json(metadata_of(file).get(METADATA, "{}"), file)
            self.said = {
                part: {key.removeprefix(f"{part}."): value for key, value in header.items() if key.startswith(f"{part}.")}
                for part in ("unet", "text_encoder")
            }
        for said in self.said.values():
            if said.get("use_dora"):
                raise UserError(f"{self.where} describes a DoRA, not a plain LoRA: it is not supported")

    def scale(self, part: str, layer: str, rank: int) -> float:
        """alpha / rank; one where nothing says alpha, as diffusers takes it."""
        said = self.said[part]
        patterns = said.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(map(_PLAIN.fullmatch, patterns)):
            raise UserError(f"{self.where} says alpha_pattern={str(patterns)[:80]}, which names no layers: the LoRA's scale is unknown")
        own = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?{pattern}", layer))
        alpha = next(own, said.get("lora_alpha", rank))
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            raise UserError(f"{self.where} says lora_alpha={alpha!r}: the LoRA's scale is unknown")
        return alpha / (rank**0.5 if said.get("use_rslora") else rank)


def save_lora(lora: Mapping, folder: Path, alpha: float, dropout: float, base: str, metadata: Mapping[str, str] | None = None) -> None:
    """Writes an adapter of the UNet so that `pipe.load_lora_weights(folder)` applies it with the right scale."""
    flat = flatten(lora)
    layers = sorted({key.split(".lora_")[0] for key in flat})
    rank = flat[f"{layers[0]}.lora_A.weight"].shape[1]
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": layers}
    header = {METADATA: json.dumps({f"unet.{k}": v for k, v in settings.items()}), **(metadata or {})}
    files.save({f"unet.{key}": value for key, value in flat.items()}, folder / WEIGHTS, header)
    config = {
        **settings,
        "peft_type": "LORA",
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": base,
    }
    files.save_json(config, folder / CONFIG)


def as_named(lora: Lora, naming: str, where: Path) -> dict[str, Tensor]:
    """The adapters' tensors, alpha / rank folded in, under the names of "diffusers", "original" or "kohya"."""
    found: dict[str, Tensor] = {}
    for part, tree in (("unet", lora.unet), ("text_encoder", lora.text_encoder)):
        flat = flatten(tree)
        for layer in sorted({key.split(".lora_")[0] for key in flat}):
            down, up = (files.tensor_of("weight", flat[f"{layer}.lora_{m}.weight"]) for m in "AB")
            if len(down.shape) == 4:
                up = Tensor.of(up.read()[..., None, None])
            if naming == "diffusers":
                found |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
            elif naming == "kohya":
                stem = f"lora_{'unet' if part == 'unet' else 'te'}_{layer.replace('.', '_')}"
                alpha = Tensor.of(np.array(down.shape[0], np.float32))
                found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}
            else:
                match = re.fullmatch(r"(.*motion_modules\..*attn[12])\.(to_[qkv]|to_out)(\.0)?", layer)
                if match is None:
                    raise UserError(
                        f"{where} adapts {layer}, and the original's motion LoRAs only the attentions of motion modules: merge it into its "
                        "adapter, or train with --trainable_modules '.*motion_modules.*attn.*'"
                    )
                (attention,) = original_names(f"{match[1]}.to_q.weight")
                stem = f"{attention.removesuffix('.to_q.weight')}.processor.{match[2]}_lora"
                found |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return found


def check_fits(lora: Mapping, params: Mapping, where: str | Path) -> None:
    """A UserError where the adapter is for a layer that the network lacks, or of another size."""
    weights, flat = flatten(params), flatten(lora)
    for name in sorted({key.split(".lora_")[0] for key in flat}):
        shape = (*flat[f"{name}.lora_A.weight"].shape[:-1], flat[f"{name}.lora_B.weight"].shape[1])
        own = weights.get(f"{name}.weight")
        if own is None or own.shape != shape:
            has = "none" if own is None else f"a {own.shape} one"
            raise UserError(f"{where}: the LoRA holds a {shape} layer {name}, this model has {has}: it was trained on another model")
