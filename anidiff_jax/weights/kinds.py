"""What a file or folder is, told from the names and shapes of its tensors: the one place that recognises formats."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anidiff_jax.errors import UserError
from anidiff_jax.weights import ldm, loras, store
from anidiff_jax.weights.files import STEM, WEIGHTS, read_json
from anidiff_jax.weights.original import INSIDE
from anidiff_jax.weights.tensors import PICKLES, Tensor, metadata_of, tensors_of

BASE, MOTION, LORA, UNET, VIDEO_UNET = "base model", "motion modules", "LoRA", "UNet", "video UNet"
VAE, TEXT = "VAE", "text encoder"
DIFFUSERS_NORMS = {"motion_norm": "joint", "spatial_norm": "per_frame"}


@dataclass
class Kind:
    """What lies at a path."""

    kind: str  # one of the above, or the name of what is not supported
    naming: str = ""  # diffusers | original | LDM | kohya | PEFT | …
    version: str = ""
    supported: bool = True
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)  # what is in it that is not used, and what a user should know
    norms: dict[str, str] = field(default_factory=dict)  # with which settings motion modules were trained, where that is known


# Signs of what is not read here, each looked for in the names of the tensors.
_OTHERS: list[tuple[str, str]] = [
    (r"^control_model\.|controlnet_cond_embedding", "ControlNet or SparseCtrl"),
    (r"temporal_attentions\.", "HotShot-XL motion modules"),
    (r"^string_to_param|^emb_params$|^clip_[lg]$", "textual inversion"),
    (r"^image_proj\.|^ip_adapter\.", "IP-Adapter"),
    (r"^double_blocks\.|^joint_blocks\.|^transformer\.single_transformer_blocks\.", "diffusion transformer"),
    (r"\.zero_conv|camera_encoder|pose_encoder", "camera or pose control of motion modules"),
]


def recognise(path: Path) -> Kind:
    """Looks into a file or folder; UserError where it is damaged or no model at all."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a file or folder of weights, or a hub id")
    if path.is_dir():
        return _of_folder(path)
    if path.suffix.lower() not in (".safetensors", *PICKLES):
        raise UserError(f"{path} is no file of weights: .safetensors {' '.join(PICKLES)} are read")
    return of_tensors(tensors_of(path), path)


def _refuse_other_families(index: Path) -> None:
    if index.is_file():
        name = str(read_json(index).get("_class_name") or "")
        if name.startswith("StableDiffusion3") or "XL" in name or "Flux" in name:
            raise UserError(f"{index.parent} is a {name} model: Stable Diffusion 1.x and 2.x are supported")


def _of_folder(path: Path) -> Kind:
    if (path / "unet").is_dir():
        _refuse_other_families(path / "model_index.json")
        width = read_json(path / "unet" / "config.json").get("cross_attention_dim")
        version = "2.x" if width == 1024 else "XL" if width == 2048 else "1.x"
        return Kind(BASE, "diffusers", f"Stable Diffusion {version}", supported=version != "XL")
    if any((folder / name).is_file() for folder in (path, path / "default") for name in loras.FILES):
        file = loras.file_of(path)
        return of_tensors(tensors_of(file), file)
    if (path / "motion_adapter").is_dir():
        return _of_folder(path / "motion_adapter")
    if (path / "config.json").is_file():
        said = read_json(path / "config.json")
        name = str(said.get("_class_name") or (said.get("architectures") or [""])[0])  # as diffusers says it, and transformers
        is_text = "CLIP" in name or "clip" in str(said.get("model_type"))
        found = of_tensors(store.tensors_in(path, store.STEMS["text_encoder"] if is_text else STEM), path)
        if name and not any(word in name for word in ("UNet", "Motion", "Autoencoder", "CLIP")):
            return Kind(name, "diffusers", supported=False)
        return found
    single = [p for p in sorted(path.iterdir()) if p.suffix.lower() in (".safetensors", *PICKLES)]
    if len(single) == 1:
        return recognise(single[0])
    raise UserError(f"{path} is no model: it holds neither unet/ and vae/, nor config.json, nor a LoRA, nor one file of weights")


def of_tensors(tensors: Mapping[str, Tensor], where: Path) -> Kind:
    """The kind of a file's tensors."""
    keys = [key.removeprefix("module.") for key in tensors]
    has = lambda pattern: any(re.search(pattern, key) for key in keys)
    for sign, name in _OTHERS:
        if has(sign):
            return Kind(name, supported=False, tensors=tensors)
    if has(r"^add_embedding\."):
        return Kind(UNET, "diffusers", "Stable Diffusion XL", supported=False, tensors=tensors)
    if has(r"^(model\.diffusion_model|conditioner|first_stage_model)\."):
        return _single_file(tensors)
    if has(r"lora|hada_|lokr_|dora_scale|oft_blocks"):
        return _lora(tensors, keys, where)
    if has(re.escape(INSIDE)) or has(r"motion_modules\."):
        return _motion(tensors, keys, where)
    if has(r"^(encoder|decoder)\.(down|up|mid)"):
        naming = "LDM" if has(r"\.mid\.block_1\.") else "diffusers"
        others = [key for key in tensors if key not in ldm.without_loss(tensors)] if naming == "LDM" else []
        return Kind(VAE, naming, tensors=tensors, notes=[_unused(others)] if others else [])
    if has(r"embeddings\.token_embedding"):
        return Kind(TEXT, "transformers", tensors=tensors)
    if has(r"^down_blocks\..*\.resnets\."):
        return Kind(UNET, "diffusers", tensors=tensors)
    some = ", ".join(list(tensors)[:3]) or "nothing"
    return Kind("nothing that is known here", supported=False, tensors=tensors, notes=[f"it holds {some}"])


def _unused(keys: list[str]) -> str:
    return f"{len(keys)} tensors that are no weights are not used, such as {keys[0]}"


def _single_file(tensors: Mapping[str, Tensor]) -> Kind:
    """One file of a whole model, in the names of latent diffusion."""
    if any(key.startswith(ldm.XL) for key in tensors):
        return Kind(BASE, "LDM", "Stable Diffusion XL", supported=False, tensors=tensors)
    if any(key.startswith(ldm.OPEN_CLIP) for key in tensors):
        return Kind(BASE, "LDM", "Stable Diffusion 2.x", supported=False, tensors=tensors)
    notes = []
    for prefix, name in ((ldm.UNET, "UNet"), (ldm.VAE, "VAE"), (ldm.TEXT, "text encoder")):
        if not any(key.startswith(prefix) for key in tensors):
            notes.append(f"it holds no {name}")
    if any(key.startswith(ldm.EMA) for key in tensors):
        notes.append("it holds averaged weights (EMA) too, which are not used")
    others = [key for key in ldm.leftovers(tensors) if not key.startswith(ldm.EMA)]
    others += [key for key in tensors if key.startswith(ldm.TEXT) and key.endswith("position_ids")]
    others += [key for key in tensors if key.startswith(ldm.VAE) and not ldm.without_loss({key.removeprefix(ldm.VAE): tensors[key]})]
    if others:
        notes.append(_unused(others))
    return Kind(BASE, "LDM", "Stable Diffusion 1.x", tensors=tensors, notes=notes)


def _motion(tensors: Mapping[str, Tensor], keys: list[str], where: Path) -> Kind:
    naming = "original" if any(INSIDE in key for key in keys) else "diffusers"
    rest = [key for key in keys if "motion_modules." not in key]
    if any(key.startswith("down_blocks.") and ".resnets." in key for key in rest):
        if naming == "diffusers":
            return Kind(VIDEO_UNET, naming, tensors=tensors)
        # The original's trainer saves what it trains, motion modules, with the rest of the UNet.
        own = {key: tensor for key, tensor in tensors.items() if "motion_modules." in key}
        found = _motion(own, [key.removeprefix("module.") for key in own], where)
        found.notes.append(f"a whole UNet: its {len(rest)} tensors beside the motion modules are not used")
        return found
    kind = Kind(MOTION, naming, motion_version(keys, tensors, where.name), tensors=tensors)
    if "conv_in.weight" in rest:
        return Kind(MOTION, naming, "PIA", supported=False, tensors=tensors, notes=["its first layer takes an image besides"])
    if rest:
        kind.notes.append(f"{len(rest)} tensors outside of the motion modules, such as {rest[0]}")
    kind.norms = recorded_norms(where)
    if naming == "original" and not kind.norms:
        kind.norms = {"motion_norm": "per_frame", **({"spatial_norm": "joint"} if kind.version == "v1" else {})}
    return kind


def norms_note(norms: Mapping[str, str]) -> list[str]:
    """What a user should know of the norms that motion modules were trained with, if anything."""
    others = " ".join(f"--{name} {value}" for name, value in norms.items() if value != DIFFUSERS_NORMS[name])
    return [f"it was trained with other norms than diffusers computes: {others} computes them so"] if others else []


def recorded_norms(where: Path) -> dict[str, str]:
    """The norms that a file of ours, or one in such a folder, says it was trained with."""
    file = where if where.is_file() else where / f"{store.STEMS['unet']}.safetensors"
    said = metadata_of(file) if file.is_file() else {}
    return {name: said[name] for name in DIFFUSERS_NORMS if name in said}


def motion_version(keys: list[str], tensors: Mapping[str, Tensor], name: str = "") -> str:
    """v1, v2, v3, … of motion modules, from their structure; Lightning is v2 but for its file's name."""
    blocks = {key.split(".")[1] for key in keys if key.startswith("down_blocks.")}
    tables = {tensor.shape[1] for key, tensor in tensors.items() if key.endswith(".pe") and len(tensor.shape) == 3}
    mid = any(key.startswith("mid_block.") for key in keys)
    if len(blocks) == 3 and not mid:
        return "SDXL beta"
    if mid:
        return "Lightning" if "lightning" in name.lower() else "v2"
    if not tables:
        return "AnimateLCM"
    return "v1" if tables == {24} else "v3"


def _of_xl(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a LoRA's matrix reads text states as wide as those of Stable Diffusion XL."""
    return re.search(r"attn2.to_[kv].*(down|lora_A)", key) is not None and shape[1:2] == (2048,)


def _lora(tensors: Mapping[str, Tensor], keys: list[str], where: Path) -> Kind:
    namings: list[tuple[str, Callable[[str], bool]]] = [
        ("kohya", lambda key: key.startswith(("lora_unet_", "lora_te"))),
        ("original", lambda key: INSIDE in key or (".processor." in key and not key.startswith("unet."))),
        ("PEFT", lambda key: key.startswith("base_model.model.")),
        ("diffusers", lambda key: True),
    ]
    naming = next(name for name, fits in namings if any(map(fits, keys)))
    refused = next((kind for key in keys for sign, kind in loras.REFUSED.items() if sign in key), None)
    if refused:
        return Kind(refused.split(" ", 1)[1], naming, supported=False, tensors=tensors)
    if any(key.startswith("lora_te2_") for key in keys) or any(_of_xl(key, tensor.shape) for key, tensor in tensors.items()):
        return Kind(LORA, naming, "Stable Diffusion XL", supported=False, tensors=tensors)
    motion = sum("motion_modules" in key for key in keys)
    text = sum(key.startswith(("lora_te", "text_encoder.", "text_model.")) for key in keys)
    places = [name for name, n in (("motion modules", motion), ("text encoder", text), ("image layers", len(keys) - motion - text)) if n]
    ranks = Counter(min(t.shape[:2]) for k, t in tensors.items() if len(t.shape) >= 2)
    notes = [f"adapts {' and '.join(places)}", f"rank {', '.join(str(r) for r, _ in ranks.most_common(3))}"]
    version = "motion LoRA" if motion == len(keys) else "domain adapter" if naming == "original" and not motion else ""
    return Kind(LORA, naming, version, tensors=tensors, notes=notes)


def kind_of_checkpoint(folder: Path) -> str:
    """What a checkpoint holds: "lora", "motion_adapter" or "unet"; a UserError where it is no checkpoint."""
    if folder.is_file():
        raise UserError(f"ckpt_dir {folder} is a file, and a checkpoint a folder: --lora or --motion_adapter_id_or_path take files")
    if not folder.is_dir():
        raise UserError(f"ckpt_dir {folder} does not exist: give a folder such as output/ad-…/checkpoints/iter-100")
    if (folder / loras.CONFIG).is_file():
        return "lora"
    if (folder / "config.json").is_file() and (folder / WEIGHTS).is_file():
        return "unet" if (read_json(folder / "config.json").get("_class_name") or "").startswith("UNet") else "motion_adapter"
    inside = sorted((p.name for p in folder.glob("**/iter-*") if p.is_dir()), key=lambda name: int(name[5:]) if name[5:].isdigit() else -1)
    raise UserError(f"ckpt_dir {folder} is not a checkpoint" + (f": give the folder {inside[-1]} inside it" if inside else ""))
