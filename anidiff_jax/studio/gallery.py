"""What was made, as it lies on disk: the newest first, each with the settings that make it again."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anidiff_jax.config import SampleConfig
from anidiff_jax.errors import UserError
from anidiff_jax.outputs import SUFFIXES, arguments_in
from anidiff_jax.studio.asked import MORE
from anidiff_jax.studio.settings import LORAS
from anidiff_jax.video import save_webp, to_uint8

THUMBNAIL = 160  # pixels of a thumbnail's longer side
SHOWN = (".mp4", ".gif", ".webp")  # what a browser plays, the best first
# Arguments that the page has fields of their own for.
OWN_FIELDS = {"prompt", "negative_prompt", "model_id_or_path", "motion_adapter_id_or_path", "lora", "sample_n_frames", "sample_size",
                    "scheduler", "num_inference_steps", "guidance_scale", "seed", "closed_loop", "fps", "output_format"}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A video: what to show of it, all of its files, and its record."""

    shown: Path
    files: list[Path]
    record: dict[str, Any]

    @property
    def thumbnail(self) -> Path:
        """A small moving picture; of what the studio did not make, the video itself."""
        small = _thumbnail_of(self.files[-1])
        return small if small.is_file() else self.shown

    @property
    def caption(self) -> str:
        prompt = " ".join(self.record["prompt"].split())
        return f"{prompt[:60]}{'…' * (len(prompt) > 60)} · seed {self.record['seed']}"


def entries(folder: Path, most: int = 48) -> list[Entry]:
    """The newest videos of a folder, newest first; what cannot be read is passed over."""
    found: list[Entry] = []
    for path in sorted(folder.glob("*.json"), key=_time, reverse=True):
        if entry := entry_of(path):
            found.append(entry)
        if len(found) == most:
            break
    return found


def entry_of(record: Path) -> Entry | None:
    """The video beside a record; None where there is none that can be shown."""
    try:
        read = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(read, dict) or not isinstance(read.get("prompt"), str) or "seed" not in read:
        return None
    stem = record.with_suffix("")
    files: list[Path] = []
    for path in (Path(f"{stem}{suffix}") for suffix in dict.fromkeys([*SUFFIXES.values(), ".png"])):
        files += [path] if path.is_file() else sorted(path.glob("*.png"))  # the frames lie in a folder
    shown = next((path for suffix in SHOWN for path in files if path.name == f"{stem.name}{suffix}"), None)
    return Entry(shown, [*files, record], read) if shown else None


def write_thumbnail(frames, record: Path, fps: float) -> None:
    """Of (f, h, w, 3) frames in [0, 1], in a folder beside the record."""
    frames = to_uint8(frames)
    share = min(1.0, THUMBNAIL / max(frames.shape[1:3]))
    size = tuple(max(1, round(side * share)) for side in frames.shape[2:0:-1])
    small = np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])
    save_webp(small, _thumbnail_of(record), fps, quality=80, replace=True)


def _thumbnail_of(record: Path) -> Path:
    return record.parent / "thumbnails" / f"{record.stem}.webp"


def fields_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's fields must say to make a video again. UserError where it was made in a way that the page has no fields for."""
    said = arguments_in(record)
    config = SampleConfig()
    taken = {*OWN_FIELDS, *MORE, "sample_stride", "output_path", "dtype"}  # dtype: the studio's own
    elsewhere = [name for name, value in said.items() if name not in taken and value not in (getattr(config, name), None, [])]
    elsewhere += ["grid"] if record.get("grid") else []
    if elsewhere:
        raise UserError(f"this video was made with {', '.join(elsewhere)}, which these fields do not say: use sample.py --from_json")
    loras = [given if ":" in given else f"{given}:1.0" for given in said.get("lora") or []]
    if len(loras) > LORAS:
        raise UserError(f"this video was made with {len(loras)} LoRAs, and the page takes {LORAS}: use sample.py --from_json")
    result = {name: said.get(name, getattr(config, name)) for name in OWN_FIELDS - {"lora", "sample_size", "output_format"}}
    height, _, width = str(said.get("sample_size", "256")).partition("x")
    result |= {
        "height": int(height),
        "width": int(width or height),
        "output_format": [k for k in said.get("output_format", []) if k != "mp4"],
    }
    for i in range(LORAS):
        path, _, scale = loras[i].rpartition(":") if i < len(loras) else ("", "", "1")
        result |= {f"lora_{i + 1}": path or None, f"lora_scale_{i + 1}": float(scale)}
    return result | {"more": more_of(said)}


def more_of(said: Mapping[str, Any]) -> str:
    """Arguments that have no field of their own and are not what they are by default, as one would write them."""
    own = None if said.get("model_id_or_path") else said.get("prediction_type")  # the embedded model's
    plain = {f.name: f.default for f in fields(SampleConfig)} | {"prediction_type": own or "epsilon"}
    others = {name: said[name] for name in MORE if name in said and said[name] != plain[name] and said[name] is not None}
    written = {True: "true", False: "false"}
    words = {name: written[value] if isinstance(value, bool) else str(value) for name, value in others.items()}
    return " ".join(shlex.quote(f"--{name}={word}") for name, word in words.items())


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
