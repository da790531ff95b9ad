"""A grid of videos over one or two lists of seeds, prompts or settings: `--grid seed=1,2,3 guidance_scale=4,8`."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from anidiff_jax.arguments import value_of
from anidiff_jax.config import SampleConfig
from anidiff_jax.errors import UserError
from anidiff_jax.video import slug

TEXTS = ("prompt", "negative_prompt", "prompt_head", "prompt_tail", "freeu")  # their values stand between bars, since texts hold commas
SHAPES = ("sample_size", "sample_n_frames")  # which all videos of a grid have in common
IN_A_ROW = 6  # videos of one list, at most; more make a square


@dataclass(frozen=True)
class Axis:
    name: str
    values: tuple[Any, ...]

    def __str__(self):
        """As it would be given."""
        if self.name in TEXTS:
            return f"{self.name}={'|'.join(value.replace('|', chr(92) + '|') for value in self.values)}"
        return f"{self.name}={','.join(map(str, self.values))}"


def axes_of(config: SampleConfig, prompts: Iterable[str]) -> list[Axis]:
    """The axes that `config.grid` gives: of columns, then of rows. `prompt` alone takes the prompts that there are."""
    axes = []
    for given in config.grid:
        name, equals, text = given.partition("=")
        name = name.strip().removeprefix("--")
        if name == "prompt" and not equals:
            if config.eval_human:
                raise UserError("grid prompt needs to know all prompts, and eval_human asks for them: give --grid 'prompt=one|another'")
            axes.append(Axis(name, tuple(prompts)))
            continue
        parts = re.split(r"(?<!\\)\|", text) if name in TEXTS else text.split(",")
        axes.append(Axis(name, tuple(_value(config, name, part.strip().replace(r"\|", "|"), given) for part in parts)))
    if len(axes) > 2:
        raise UserError(f"grid has {len(axes)} lists: give one, or two for columns and rows")
    if len({axis.name for axis in axes}) < len(axes):
        raise UserError(f"grid names {axes[0].name} twice: give one list of it")
    if config.num_videos_per_prompt > 1 and any(axis.name == "seed" for axis in axes):
        raise UserError("grid over seeds and num_videos_per_prompt both say which seeds: give one of them")
    if axes:
        cells(config, axes)  # what does not go together is told now
    return axes


def cells(config: SampleConfig, axes: list[Axis]) -> list[SampleConfig]:
    """The arguments of each video, row after row."""
    columns, rows = axes[0], axes[1:]
    above = [{rows[0].name: value} for value in rows[0].values] if rows else [{}]
    return [config.but(**{columns.name: value}, **other, grid=[]) for other in above for value in columns.values]


def columns_of(axes: list[Axis]) -> int:
    """How many videos stand in a row."""
    count = len(axes[0].values)
    return count if len(axes) == 2 or count <= IN_A_ROW else math.ceil(math.sqrt(count))


def name_of(config: SampleConfig, axes: list[Axis]) -> str:
    """What the grid's files are called: what all of its videos have in common, and what differs."""
    own = [axis.name for axis in axes]
    common = "" if "prompt" in own else slug(config.prompt or "")
    seed = "" if "seed" in own else f"seed{config.seed}"
    return "-".join(filter(None, ["grid", common, *own, seed]))


def label(config: SampleConfig, axes: list[Axis]) -> str:
    """What stands above a video."""
    return "\n".join(_said(axis.name, getattr(config, axis.name)) for axis in axes)


def _said(name: str, value: Any) -> str:
    return value if name == "prompt" else f"{name.replace('_', ' ')} {value if value != '' else 'none'}"


def _value(config: SampleConfig, name: str, text: str, given: str) -> Any:
    """A value as the argument of this name reads it, tried with the others."""
    known = sorted({*TEXTS, *_of_the_call(config)})
    if name in known:
        try:
            kinds = {f.name: f.type for f in fields(SampleConfig)}
            value = text if kinds[name] in (str, str | None) else value_of(SampleConfig, name, text)
            config.but(**{name: value})
        except UserError as error:
            raise UserError(f"grid {given}: {error}") from None
        return value
    what = f"{name} is the same for all videos of a run" if name in {f.name for f in fields(config)} else f"there is no argument {name}"
    raise UserError(f"grid {given}: {what}; give NAME=VALUE,VALUE where NAME is one of {', '.join(known)}")


def _of_the_call(config: SampleConfig) -> set[str]:
    """Arguments that the pipeline takes anew for each video, without loading or another shape."""
    return {name for name in config.sampling() if hasattr(config, name)} - {*SHAPES, "height", "width"}
