"""What came of a run → files for other programs, after training (`--export`)."""

import logging
from pathlib import Path

from anidiff_jax.config import TrainConfig
from anidiff_jax.errors import UserError
from anidiff_jax.weights import files
from anidiff_jax.weights.base import EMBEDDED
from anidiff_jax.weights.hub import public_name, resolve
from anidiff_jax.weights.kinds import kind_of_checkpoint
from anidiff_jax.weights.loras import adapts
from anidiff_jax.weights.merge import merged_adapter, write_adapter, write_original
from anidiff_jax.weights.sources import base_source
from anidiff_jax.weights.tree import is_motion
from anidiff_jax.weights.write_base import with_loras, write_base

log = logging.getLogger(__name__)


def export(checkpoint: Path, config: TrainConfig) -> list[Path]:
    """Writes <run>/export/… in float16, as `config.export` says; returns what was written.

    diffusers: motion-adapter/, a LoRA merged into it; or base/, where layers of the image model alone trained.
    original: motion-module.safetensors, one file for A1111 and ComfyUI.
    What has no such form is a warning: the checkpoint is there, and training does not fail at its end.
    """
    if config.export == "none":
        return []
    try:
        written = _image_model(checkpoint, config) if _of_images(checkpoint) else _motion_modules(checkpoint, config)
    except UserError as error:
        log.warning("not exported: %s", error)
        return []
    for path in written:
        log.info("exported %s", path)
    return written


def _of_images(checkpoint: Path) -> bool:
    """Whether a checkpoint holds layers of the image model alone; UserError where it holds both."""
    kind = kind_of_checkpoint(checkpoint)
    if kind == "motion_adapter":
        return False
    names = adapts(checkpoint) if kind == "lora" else list(files.tensors_in(checkpoint))
    of_motion = [name for name in names if is_motion(name)]
    if of_motion and len(of_motion) < len(names):
        raise UserError(f"{checkpoint} holds layers of motion modules and of the image model; merge or convert it by convert/export_*.py")
    return not of_motion


def _image_model(checkpoint: Path, config: TrainConfig) -> list[Path]:
    if config.export == "original":
        raise UserError(f"{checkpoint} holds layers of the image model, for which the original's naming has no form: --export diffusers")
    kind, target = kind_of_checkpoint(checkpoint), checkpoint.parent.parent / "export" / "base"
    base = EMBEDDED if config.model_id_or_path is None else resolve(config.model_id_or_path, config.model_revision, config.hub)
    local = lambda given: None if given is None else resolve(given, hub=config.hub)
    source = base_source(base, local(config.vae_path), local(config.text_encoder_path), checkpoint if kind == "unet" else None)
    if kind == "lora":  # a UNet that trained as a whole holds them already
        source = with_loras(source, [*_folded(config, of_motion=False), (checkpoint, 1.0)])
    with files.written_whole(target) as out:
        write_base(source, out, "float16", _header(checkpoint, config))
    return [target]


def _motion_modules(checkpoint: Path, config: TrainConfig) -> list[Path]:
    folder, adapter, loras = checkpoint.parent.parent / "export", checkpoint, []
    if kind_of_checkpoint(checkpoint) == "lora":
        loras, adapter = [*_folded(config, of_motion=True), (checkpoint, 1.0)], EMBEDDED / "motion_adapter"
        if config.motion_adapter_id_or_path is None and config.model_id_or_path is not None:
            raise UserError(f"{config.model_id_or_path} brought its own motion modules: merge the LoRA into them by convert/export_*.py")
        if config.motion_adapter_id_or_path is not None:
            adapter = resolve(config.motion_adapter_id_or_path, config.motion_adapter_revision, config.hub)
    raw, tensors, said = merged_adapter(adapter, loras)
    tensors, header = {key: tensor.cast("float16") for key, tensor in tensors.items()}, {**said, **_header(checkpoint, config)}
    folder.mkdir(exist_ok=True)
    written = []
    if config.export in ("diffusers", "all"):
        written.append(folder / "motion-adapter")
        with files.written_whole(written[-1]) as out:
            write_adapter(tensors, raw, out, header)
    if config.export in ("original", "all"):
        written.append(folder / "motion-module.safetensors")
        write_original(tensors, written[-1], header)
    return written


def _folded(config: TrainConfig, of_motion: bool) -> list[tuple[Path, float]]:
    """The LoRAs that were folded into the frozen weights: those of motion modules, or the others."""
    found = [(resolve(path, hub=config.hub), scale) for path, scale in config.loras()]
    return [(path, scale) for path, scale in found if any("motion_modules" in name for name in adapts(path)) == of_motion]


def _header(checkpoint: Path, config: TrainConfig) -> dict[str, str]:
    norms = {"motion_norm": config.motion_norm, "spatial_norm": config.spatial_norm}
    base = public_name(config.model_id_or_path) or "embedded"
    return {"trained_by": "anidiff-jax", "base_model": base, "checkpoint": checkpoint.name, **norms}
