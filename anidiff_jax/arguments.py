"""Command lines, JSON and YAML files → settings; `--help` and docs/arguments.md from the same words."""

import difflib
import itertools
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from anidiff_jax.config import SampleConfig, TrainConfig
from anidiff_jax.defaults import EMBEDDED_DEFAULTS, PRESETS
from anidiff_jax.errors import UserError, read_text

log = logging.getLogger(__name__)

Config = TypeVar("Config", TrainConfig, SampleConfig)

# Headings of the help, each with the argument that comes first under it.
SECTIONS = {
    "model_id_or_path": "models",
    "sample_size": "clips and videos",
    "num_train_timesteps": "noise",
    "seed": "running",
    "trainable_modules": "what trains",
    "csv_path": "data",
    "batch_size": "updates",
    "gradient_checkpointing": "memory and devices",
    "output_dir": "validation and checkpoints",
    "use_tensorboard": "logs and hubs",
    "clip_skip": "prompts",
    "init_video": "from a video or a picture",
    "guidance_rescale": "guidance",
    "context_frames": "long videos",
    "free_init_iterations": "FreeInit",
    "ckpt_dir": "what is sampled",
    "num_videos_per_prompt": "what is written",
}


def parse(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Command line → config. A JSON or YAML file may come first; what follows it on the command line wins.

    Raises UserError for a value or an argument that does not exist; `--ignore_args_error true` makes the latter a warning.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".json", ".yaml", ".yml")) and not words[0].startswith("-"):
        words = _words_of_file(Path(words[0]).expanduser(), words[1:]) + words[1:]
    words = _words_of_run(words)
    if kind is SampleConfig:
        words = _words_of_video(words) + words
    namespace, rest = _read(kind, words)
    known = {f.name for f in fields(kind) if f.init}
    named = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    given = {name.removeprefix("no_") if name not in known else name for name in named} & known
    if "lora_dropout_p" in named:
        given.add("lora_dropout")
    values = vars(namespace)
    if rest:
        messages = [_unknown(word, known) for word in rest if word.startswith("-")] or [_unknown(rest[0], known)]
        if not values["ignore_args_error"]:
            raise UserError(messages[0])
        for message in messages:
            log.warning("%s; ignored", message)
    recipe = PRESETS[values["preset"]] if values["preset"] is not None else {}
    implied = EMBEDDED_DEFAULTS | recipe if values["model_id_or_path"] is None else recipe
    values.update({name: value for name, value in implied.items() if name not in given and name in values})
    config = kind(**{name: value for name, value in values.items() if name in known})
    object.__setattr__(config, "given", frozenset(given))
    return config


def value_of(kind: type[Config], name: str, text: str) -> Any:
    """One argument's value as the command line reads it, not yet checked with the others: `but` does that."""
    return getattr(_read(kind, [f"--{name}={text}"])[0], name)


def _read(kind: type[Config], words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """(all values, words that are no arguments)"""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):  # argparse would print a page
            raise UserError(f"{message} (see --help)")

    groups = [_as_group(title, members) for title, members in sections(kind).items()]
    parser = Parser(groups, allow_abbrev=False, usage="%(prog)s [settings.yaml | settings.json] [--name value …]", description=kind.__doc__)  # type: ignore[arg-type]
    return parser.parse_known_args(words)


def sections(kind: type) -> dict[str, list[Field]]:
    """Heading → the arguments under it."""
    found: dict[str, list[Field]] = {}
    for f in fields(kind):
        if f.name in SECTIONS:
            title = SECTIONS[f.name]
        if f.init:
            found.setdefault(title, []).append(f)
    return found


def _as_group(title: str, members: list[Field]) -> type:
    """The same arguments as a dataclass of their own, the form in which HfArgumentParser takes a group."""
    copies = [(f.name, f.type, field(default=f.default, default_factory=f.default_factory, metadata={**f.metadata})) for f in members]
    group = make_dataclass("Group", copies)
    group._argument_group_name = title  # type: ignore[attr-defined]
    return group


def _unknown(word: str, known: set[str]) -> str:
    name = word.lstrip("-").split("=")[0]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"unknown argument {word.split('=')[0]}" + (f": did you mean --{near[0]}?" if near else " (see --help)")


def _words_of_run(words: list[str]) -> list[str]:
    """The words; where a run is gone on with, behind its own arguments, which they may change. `latest` becomes what it is now."""
    given = _given(words)
    where = given.get("__resume_from_checkpoint")
    if where is None:
        return words
    from anidiff_jax.training.runs import find_checkpoint

    checkpoint = find_checkpoint(where, given.get("__output_dir", TrainConfig.output_dir))
    found = ["--resume_from_checkpoint", str(checkpoint)]
    return [*_words_of_file(checkpoint / "train_config.json", words), *words, *found]


def _words_of_video(words: list[str]) -> list[str]:
    """Where a video is made again, the arguments that it was made with, but for those that are given anew."""
    given = _given(words)
    where = given.get("__from_json")
    if where is None:
        return []
    from anidiff_jax.outputs import arguments_in, settings_of

    anew = _names(words)
    anew |= {"prompt"} if "validation_prompts_path" in anew else set()
    anew |= {"init_video", "init_image"} if anew & {"init_video", "init_image"} else set()
    anew |= {"prediction_type"} if "model_id_or_path" in anew else set()  # it was the other model's own
    anew |= PRESETS.get(given.get("__preset", ""), {}).keys()
    record = settings_of(where)
    record["grid"] = [axis for axis in record.get("grid") or [] if axis.partition("=")[0] not in anew]
    if "model_id_or_path" not in record and not anew & {"model_id_or_path", "ckpt_dir"}:
        raise UserError(f"{where} does not say which model made it, as samples of training do not: give --model_id_or_path, or --ckpt_dir")
    return _as_words({name: value for name, value in arguments_in(record).items() if name not in anew})


def _names(words: list[str]) -> set[str]:
    """The arguments that are given."""
    names = {name.removeprefix("__") for name in _given(words)}
    return names | {name.removeprefix("no_") for name in names}


def _given(words: list[str]) -> dict[str, str]:
    """{"__name": what follows it}; argparse takes either spelling, and so do we."""
    pairs = [*itertools.pairwise([*words, ""]), *(word.split("=", 1) for word in words if "=" in word)]
    return {name.replace("-", "_"): value for name, value in pairs if name.startswith("--")}


def _words_of_file(path: Path, others: list[str]) -> list[str]:
    """A config file as the words of a command line, but for what is among the `others`; of a run's own, what was given then."""
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    text = read_text(path)
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except Exception as error:  # json's and yaml's own kinds
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must hold names and values at its top level")
    if "made_by" in values and "prompt" in values:
        raise UserError(f"{path} says how a video was made: give it to sample.py as --from_json {path}")
    given = values.pop("given", values)
    return _as_words({name: value for name, value in values.items() if name in given and name not in _names(others)})


def _as_words(values: Mapping[str, Any]) -> list[str]:
    """Names and values as the words of a command line; a list as the same name again and again."""
    written = {True: "true", False: "false"}
    pairs = [(k, v) for k, given in values.items() for v in (given if isinstance(given, list) else [given]) if v is not None]
    return [f"--{k}={written[v] if isinstance(v, bool) else v}" for k, v in pairs]


def as_markdown() -> str:
    """docs/arguments.md: python -m anidiff_jax.arguments > docs/arguments.md"""
    lines = [
        "# Arguments",
        "",
        "Give them as `--name value`; booleans also as a bare `--name`. A JSON or YAML file with names and values may come first;",
        "what follows it wins. Names and defaults are those of ModelScope SWIFT's AnimateDiff scripts, as far as it has them;",
        "[differences.md](differences.md) says where ours mean something else. With no `--model_id_or_path`, the embedded tiny model",
        "is taken, and these defaults change with it:",
        ", ".join(f"`{k} {v}`" for k, v in EMBEDDED_DEFAULTS.items()) + ".",
    ]
    both = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(SampleConfig)}
    for script, kind in (("train.py", TrainConfig), ("sample.py", SampleConfig)):
        for title, members in sections(kind).items():
            of_both = members[0].name in both
            if of_both and kind is SampleConfig:
                continue
            lines += ["", f"## {title} ({'both' if of_both else script})", "", "| argument | default | meaning |", "|---|---|---|"]
            for f in members:
                nothing = f.default in (None, "", MISSING)
                default = "none" if nothing else str(f.default).lower() if isinstance(f.default, bool) else f.default
                kind_of_value = next((t for t in (f.type, *get_args(f.type)) if get_origin(t) is Literal), None)  # Literal | None too
                choices = get_args(kind_of_value) if kind_of_value else f.metadata.get("choices", ())
                meaning = f.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
                lines.append(f"| `{f.name}` | {default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(as_markdown(), end="")
