"""What sampling leaves: a video in each format that is asked for, its settings in every file and in a JSON beside; and those read back."""

import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from PIL import Image

from anidiff_jax.config import SampleConfig
from anidiff_jax.errors import UserError, read_text
from anidiff_jax.sheets import contact_sheet, grid_gif, grid_png, side_by_side
from anidiff_jax.video import (
    ASCII,
    EXIF_IFD,
    USER_COMMENT,
    free_name,
    save_frames,
    save_gif,
    save_mp4,
    save_webp,
    slug,
    written_aside,
)

log = logging.getLogger(__name__)

SUFFIXES = {"gif": ".gif", "mp4": ".mp4", "webp": ".webp", "png": "-frames", "sheet": "-sheet.png"}
RENAMED = {"num_frames": "sample_n_frames", "stride": "sample_stride"}  # what a record calls them → the arguments
# Arguments of a run of sample.py that are not part of what a video is.
OF_THE_RUN = {"validation_prompts_path", "eval_human", "num_videos_per_prompt", "output_path", "from_json", "replace_if_exists",
              "ignore_args_error", "verbose"}  # fmt: skip
FROM_THE_BASE = ("model_id_or_path", "model_revision", "hub")
# Weights of which a record holds the hash → what they are, and the arguments that say where they come from.
WEIGHTS = {
    "unet": ("the UNet", (*FROM_THE_BASE, "ckpt_dir")),
    "motion_modules": ("the motion modules", ("motion_adapter_id_or_path", "motion_adapter_revision", "ckpt_dir", *FROM_THE_BASE)),
    "vae": ("the VAE", ("vae_path", *FROM_THE_BASE)),
    "text_encoder": ("the text encoder", ("text_encoder_path", *FROM_THE_BASE)),
    "lora": ("LoRA ", ("lora", "ckpt_dir", "hub")),
}


def prepare(config: SampleConfig) -> Path:
    """The folder for what is made. What cannot be written is known before anything is computed."""
    folder = Path(config.output_path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"output_path {folder} may not be written into: give another folder")
    if "mp4" in config.formats:
        _ffmpeg()
    return folder


def record_of(config: SampleConfig, pipeline) -> dict[str, Any]:
    """All that a video follows from: prompt, seed and settings, the models with their weights' hashes, and what computes it."""
    import jax

    from anidiff_jax import __version__

    fresh_only = {"motion_num_attention_heads", "motion_max_seq_length"} - config.given  # else the adapter's own, which is not these
    others = {f.name: getattr(config, f.name) for f in fields(config) if f.init and f.name not in OF_THE_RUN | fresh_only}
    for name in ("sample_size", *RENAMED.values()):
        del others[name]
    return {
        "prompt": config.prompt,
        "negative_prompt": config.negative_prompt,
        **config.sampling(),
        "stride": config.sample_stride,
        **others,
        **asdict(pipeline.schedule),
        "dtype": pipeline.dtype,
        "hashes": pipeline.hashes,
        **({"inputs": inputs} if (inputs := inputs_of(config)) else {}),
        "made_by": f"anidiff-jax {__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}",
    }


def inputs_of(config: SampleConfig) -> dict[str, str]:
    """Hashes of the files that a video starts from."""
    given = {name: getattr(config, name) for name in ("init_video", "init_image", "mask_video")}
    if not any(given.values()):
        return {}
    from anidiff_jax.inits import hash_of

    return {name: hash_of(path) for name, path in given.items() if path is not None}


def arguments_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of sample.py that a record holds."""
    names = {f.name for f in fields(SampleConfig) if f.init} - OF_THE_RUN
    found = {RENAMED.get(name, name): value for name, value in record.items()}
    if "height" in found and "width" in found:
        found["sample_size"] = f"{found['height']}x{found['width']}"
    return {name: value for name, value in found.items() if name in names}


def save_video(frames, config: SampleConfig, record: Mapping[str, Any]) -> list[Path]:
    """Writes (f, h, w, 3) frames in every format that is asked for, and the record beside; returns the videos' paths."""
    write: dict[str, Callable[[Path], None]] = {
        "gif": lambda path: save_gif(frames, path, config.fps, record, dither=config.gif_dither, plays=config.gif_loop),
        "mp4": lambda path: save_mp4(frames, path, config.fps, record, crf=config.mp4_crf),
        "webp": lambda path: save_webp(frames, path, config.fps, record, quality=config.webp_quality, plays=config.gif_loop),
        "png": lambda path: save_frames(frames, path, record),
        "sheet": lambda path: contact_sheet([frames], [record["prompt"]], path, settings=record, replace=False),
    }
    name = f"{slug(record['prompt'])}-seed{record['seed']}"
    return _save(config, name, record, {SUFFIXES[kind]: write[kind] for kind in config.formats})


def save_grid(videos, labels: Sequence[str], columns: int | None, name: str, config: SampleConfig, record: Mapping[str, Any]) -> list[Path]:
    """Writes videos of one shape side by side, moving as a GIF (and an MP4 where that is asked for) and still as a PNG, and the record
    beside; returns the paths."""
    how = {"dither": config.gif_dither, "plays": config.gif_loop}
    write: dict[str, Callable[[Path], None]] = {
        ".gif": lambda path: grid_gif(videos, path, config.fps, columns, labels, record, replace=False, **how),
        ".png": lambda path: grid_png(videos, path, columns, labels, record, replace=False),
    }
    if "mp4" in config.formats:
        write[".mp4"] = lambda path: save_mp4(side_by_side(videos, columns, labels), path, config.fps, record, crf=config.mp4_crf)
    return _save(config, name, record, write)


def _save(config: SampleConfig, name: str, record: Mapping[str, Any], write: Mapping[str, Callable[[Path], None]]) -> list[Path]:
    """Files of one name that is still free. The JSON comes first: it takes the name, in case that another process wants it too."""
    folder, suffixes = Path(config.output_path).expanduser(), [".json", *write]
    while True:
        free = free_name(folder, name, suffixes)
        beside = folder / f"{free}.json"
        try:
            with written_aside(beside) as part:
                part.write_text(json.dumps(dict(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            break
        except FileExistsError:  # since we looked
            continue
    written: list[Path] = []
    try:
        for suffix, writer in write.items():
            writer(folder / f"{free}{suffix}")
            written.append(folder / f"{free}{suffix}")
    except BaseException:
        if not written:
            beside.unlink(missing_ok=True)
        raise
    return written


def settings_of(path: str | Path) -> dict[str, Any]:
    """The record of a video: out of its GIF, MP4, WebP, PNG frame or folder of frames, or the JSON beside it."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "0000.png" if (path / "0000.png").is_file() else path
    if not path.is_file():
        raise UserError(f"{path} is no file: give a video that sample.py made, or the JSON beside it")
    text = read_text(path) if path.suffix == ".json" else _text_in_picture(path)
    if text is None:
        text = _text_in_mp4(path)
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or "seed" not in record:
        raise UserError(f"{path} holds no settings of a video of sample.py: give one that it made, or the JSON beside it")
    return record


def _text_in_picture(path: Path) -> str | None:
    """The comment in a GIF, WebP or PNG; "" where there is none, None where the file is no picture."""
    try:
        with Image.open(path) as image:
            if image.format == "GIF":
                return image.info.get("comment", b"").decode(errors="replace")
            if image.format == "PNG":
                return str(image.info.get("Comment", ""))
            comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
            return comment.removeprefix(ASCII).decode(errors="replace") if isinstance(comment, bytes) else str(comment)
    except (OSError, SyntaxError, ValueError):  # Pillow's kinds for what it does not know, and for damage
        return None


def _text_in_mp4(path: Path) -> str:
    """The comment in a video, in the form of ffmpeg's ffmetadata: name=value, with a backslash before what would end the value."""
    done = subprocess.run([_ffmpeg(), "-v", "error", "-f", "mov", "-i", str(path), "-f", "ffmetadata", "-"], capture_output=True)
    found = re.search(r"^comment=((?:[^\\\n]|\\.)*)", done.stdout.decode(errors="replace"), re.MULTILINE | re.DOTALL)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else ""


def _ffmpeg() -> str:
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        return get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(f"mp4 needs ffmpeg, which is not here ({str(error).splitlines()[0]}): install it, or take another format") from None


def check_models(config: SampleConfig, record: Mapping[str, Any]) -> None:
    """A UserError where the video of `config.from_json` would be made with other weights than it was; `record` is that of this run.

    Where an argument given besides says that weights come from elsewhere, other ones are meant, and only a warning.
    """
    where, before = config.from_json, settings_of(config.from_json or "")
    then, now, arguments = before.get("hashes"), record["hashes"], arguments_in(before)
    if not isinstance(then, dict):
        log.warning("%s holds no hashes of weights: whether these are the same is not known", where)
        return
    for key in {**now, **then}:
        if then.get(key) == now.get(key) or (key not in WEIGHTS and not key.startswith("lora_")):
            continue
        what, sources = WEIGHTS["lora" if key.startswith("lora_") else key]
        number = key.removeprefix("lora_") if key.startswith("lora_") else ""
        message = f"{where} was made with other weights of {what}{number}: {then.get(key, 'none')} then, {now.get(key, 'none')} now"
        if all((getattr(config, name) or None) == (arguments.get(name) or None) for name in sources):
            raise UserError(f"{message}; say with --{sources[0]} where those of then are")
        log.warning("%s, as the arguments say: the video will be another", message)
    for name, then_hash in (before.get("inputs") or {}).items():
        if record.get("inputs", {}).get(name) not in (None, then_hash) and getattr(config, name) == arguments.get(name):
            raise UserError(f"{where} was made from another {name}: what {getattr(config, name)} was then; say with --{name} where that is")
    if before.get("made_by") != record["made_by"]:
        log.warning("%s was made by %s, this is %s: last digits may differ", where, before.get("made_by"), record["made_by"])
