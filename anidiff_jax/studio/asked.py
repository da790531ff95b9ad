"""What a page's fields say → the arguments of sample.py, which are checked as it checks them."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from anidiff_jax.arguments import parse
from anidiff_jax.config import SampleConfig
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.errors import UserError
from anidiff_jax.options import Options
from anidiff_jax.prompts import check_travel
from anidiff_jax.studio.library import Library
from anidiff_jax.studio.settings import LORAS, Settings

PLAIN = ("prompt", "negative_prompt", "sample_n_frames", "scheduler", "num_inference_steps", "guidance_scale", "seed", "closed_loop", "fps")
WHOLE = ("sample_n_frames", "num_inference_steps", "seed", "height", "width")
LONGEST = 20_000  # characters of a text
# Arguments without a field of their own, which the field "more" takes: none that names a file, is a regular expression (one can take for
# ever), or makes a job larger than its frames and steps say.
ELSEWHERE = ("init_video", "init_image", "mask_video", "init_stride", "strength", "pag_layers", "context_batch", "context_overlap",
             "num_train_timesteps")  # fmt: skip
MORE = tuple(
    name
    for name in (*(f.name for f in fields(Options)), *NoiseSchedule.names(), "eta", "motion_norm", "spatial_norm", "motion_scale",
                 "gif_dither", "gif_loop", "mp4_crf", "webp_quality")
    if name not in (*PLAIN, *ELSEWHERE)
)  # fmt: skip


def config_of(asked: Mapping[str, Any], settings: Settings, library: Library) -> SampleConfig:
    """The arguments that fields say. UserError, in a line, for what cannot be made, is not allowed, or is too much for this studio."""
    asked = {**asked, **{name: _whole(asked[name], name) for name in WHOLE}}
    for name in ("prompt", "negative_prompt", "more"):
        check_length(asked[name], name)
    if not str(asked["prompt"] or "").strip():
        raise UserError("there is no prompt: say what the video should show")
    written = {True: "true", False: "false"}
    words = [f"--{name}={written[value] if isinstance(value := asked[name], bool) else value}" for name in PLAIN]
    words += [f"--sample_size={asked['height']}x{asked['width']}", f"--output_path={settings.output_path}"]
    for name, what in (("model_id_or_path", "model"), ("motion_adapter_id_or_path", "motion adapter")):
        if (path := library.permitted(asked[name], what)) is not None:
            words.append(f"--{name}={path}")
    for i in range(1, LORAS + 1):
        if (path := library.permitted(asked[f"lora_{i}"], "LoRA")) is not None:
            words.append(f"--lora={path}:{float(asked[f'lora_scale_{i}'])}")
    words += [f"--output_format={kind}" for kind in dict.fromkeys(["mp4", *(asked["output_format"] or [])])]
    config = parse(SampleConfig, [*words, *_more(asked["more"] or "")])
    check_limits(config, settings)
    check_travel(config.prompt or "", config.sample_n_frames)
    return config


def check_length(text: str | None, name: str) -> None:
    if len(str(text or "")) > LONGEST:
        raise UserError(f"{name.replace('_', ' ')} is longer than {LONGEST} characters: make it shorter")


def check_limits(config: SampleConfig, settings: Settings) -> None:
    """A UserError for a video that is too much for this studio."""
    for what, value, most in (
        ("frames", config.sample_n_frames, settings.max_frames),
        ("height", config.height, settings.max_side),
        ("width", config.width, settings.max_side),
        ("steps", config.num_inference_steps * max(1, config.free_init_iterations), settings.max_steps),
    ):
        if value > most:
            raise UserError(f"{what} {value} is more than this studio makes ({most}): take less, or start it with another limit")


def _more(text: str) -> list[str]:
    """The words of the field "more", each of which names an argument that may be given there."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"more settings {text!r} cannot be read: {error}") from None
    if words and not words[0].startswith("--"):
        raise UserError(f"more settings {text!r} must be arguments of sample.py, as --freeu 0.9,0.2,1.2,1.4 --pag_scale 3")
    for word in words:
        name = word[2:].split("=")[0].replace("-", "_").removeprefix("no_")
        if re.match("--|-[A-Za-z]", word) and name not in MORE:
            raise UserError(f"more settings: {word.split('=')[0]} has no place here; {', '.join(MORE[:6])} and others have")
    return words


def _whole(value: Any, name: str) -> int:
    try:
        if value is None or int(value) != float(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} {value} must be a whole number") from None
