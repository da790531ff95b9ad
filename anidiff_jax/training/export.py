"""What came of a run → files for other programs, after training (`--export`)."""

from pathlib import Path

from anidiff_jax.config import TrainConfig
from anidiff_jax.training.checkpoint import kind_of
from anidiff_jax.weights import files
from anidiff_jax.weights.base import EMBEDDED
from anidiff_jax.weights.hub import resolve
from anidiff_jax.weights.merge import merged_adapter, write_adapter, write_original
from anidiff_jax.weights.sources import base_source
from anidiff_jax.weights.write_base import with_loras, write_base


def export(checkpoint: Path, config: TrainConfig) -> list[Path]:
    """Writes <run>/export/…, in float16, as `config.export` says; returns what was written.

    diffusers: motion-adapter/, a LoRA merged into it; or base/, where layers outside of motion modules trained.
    original: motion-module.safetensors, one file for A1111 and ComfyUI; it has no form for other layers.
    """
    folder, kind = checkpoint.parent.parent / "export", kind_of(checkpoint)
    header = {"trained_by": "anidiff-jax", "base_model": config.model_id_or_path or "embedded", "checkpoint": checkpoint.name}
    folder.mkdir(exist_ok=True)
    half = lambda tensors: {key: tensor.cast("float16") for key, tensor in tensors.items()}
    motion = kind == "motion_adapter" or (kind == "lora" and "motion_modules" in config.trainable_modules)
    if not motion:
        target = folder / "base"
        base = EMBEDDED if config.model_id_or_path is None else resolve(config.model_id_or_path, config.model_revision, config.hub)
        source = base_source(base, unet=checkpoint if kind == "unet" else None)
        with files.written_whole(target) as out:
            write_base(with_loras(source, [(checkpoint, 1.0)] if kind == "lora" else []), out, "float16", header)
        return [target]
    adapter, loras = checkpoint, []
    if kind == "lora":
        loras = [(checkpoint, 1.0)]
        adapter = EMBEDDED / "motion_adapter"
        if config.motion_adapter_id_or_path is not None:
            adapter = resolve(config.motion_adapter_id_or_path, config.motion_adapter_revision, config.hub)
    raw, tensors, said = merged_adapter(adapter, loras)
    written = []
    if config.export in ("diffusers", "all"):
        written.append(folder / "motion-adapter")
        with files.written_whole(written[-1]) as out:
            write_adapter(half(tensors), raw, out, {**said, **header})
    if config.export in ("original", "all"):
        written.append(folder / "motion-module.safetensors")
        write_original(half(tensors), written[-1], {**said, **header})
    return written
