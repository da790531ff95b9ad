"""Files of weights: what they are, and other forms of them. The scripts of convert/ do it, each in a process of its own."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

from anidiff_jax.errors import UserError
from anidiff_jax.video import free_name
from anidiff_jax.weights import kinds
from anidiff_jax.weights.hub import resolve
from anidiff_jax.weights.kinds import recognise

SCRIPTS = Path(__file__).parent.parent.parent / "convert"
# What a kind of weights can be exported as: name → (script, further words, suffix of what is written: "" is a folder).
TARGETS: dict[str, dict[str, tuple[str, list[str], str]]] = {
    kinds.MOTION: {
        "diffusers": ("export_motion_adapter", ["--format", "diffusers"], ""),
        "original (A1111, ComfyUI)": ("export_motion_adapter", ["--format", "original"], ".safetensors"),
    },
    kinds.LORA: {
        "diffusers": ("export_lora", ["--format", "diffusers"], ".safetensors"),
        "original (motion LoRA)": ("export_lora", ["--format", "original"], ".safetensors"),
        "kohya (A1111, ComfyUI)": ("export_lora", ["--format", "kohya"], ".safetensors"),
    },
    kinds.BASE: {"diffusers": ("export_base", [], "")},
}
LIMIT = 1800  # seconds


def describe(path: str) -> tuple[str, list[str]]:
    """(what lies there, in lines; the names of what it can become)."""
    local = resolve(path)
    said = _run("inspect_weights", [str(local)])
    found = recognise(local)
    return textwrap.dedent(said.partition("\n")[2]), list(TARGETS.get(found.kind, {})) if found.supported else []


def export(path: str, target: str, dtype: str | None, folder: Path, base: str | None = None, adapter: str | None = None) -> Path:
    """Writes it as the target into the folder, under a name of its own → the file, or a zip of the folder."""
    local = resolve(path)
    found = recognise(local)
    kind = found.kind
    if target not in TARGETS.get(kind, {}):
        raise UserError(f"a {kind} becomes {' or '.join(TARGETS.get(kind, {})) or 'nothing else'} here, not {target}")
    script, words, suffix = TARGETS[kind][target]
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{Path(path).stem if local.is_file() else Path(path).name}-{target.split()[0]}"
    output = folder / f"{free_name(folder, stem, [suffix, '.zip'])}{suffix}"
    words = ["--input", str(local), *words, "--output", str(output), *(["--dtype", dtype] if dtype else [])]
    if script == "export_lora":
        words += [] if dtype else ["--dtype", _dtype_of(found)]
        words += ["--model_id_or_path", base] if base else []
        words += ["--motion_adapter_id_or_path", adapter] if adapter else []
    _run(script, words)
    if suffix:
        return output
    part = shutil.make_archive(str(folder / f".{output.name}"), "zip", folder, output.name)
    return Path(part).replace(folder / f"{output.name}.zip")


def _dtype_of(found: kinds.Kind) -> str:
    """The type that most tensors have, of those that files are written in."""
    counts = Counter(tensor.dtype for tensor in found.tensors.values() if tensor.dtype in ("float32", "float16", "bfloat16"))
    return counts.most_common(1)[0][0] if counts else "float32"


def _run(script: str, words: list[str]) -> str:
    """What a script of convert/ prints; UserError with its own line where it ends otherwise. It leaves the GPU to the videos."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    except subprocess.TimeoutExpired:
        raise UserError(f"{script} took more than {LIMIT // 60} minutes and was ended") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(said.removeprefix("error: "))
    return done.stdout.strip()
