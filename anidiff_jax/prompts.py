"""Prompts as people write them: weights of words, texts of any length, and prompts that travel from one text to another over the frames."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from anidiff_jax.errors import UserError

Prompt = str | Mapping[int, str]

EMPHASIS = 1.1  # of a pair of round brackets; square ones divide by it
MARK = re.compile(r"\\[\\()\[\]]|[(\[\])]|:\s*(?P<weight>[-+]?\d*\.?\d+)\s*\)|[^\\()\[\]:]+|\\|:")


NUMBERED = r"(\d+)\s*:\s*(.*)"

# Travel


def travel_of(prompt: Prompt) -> dict[int, str]:
    """Frame → the text from there on; of a plain prompt {0: text}. It travels as a mapping, or as text that looks like one from frame 0 on:

    {0: "a calm sea", 16: "a storm"}, or a line for each: 0: a calm sea ⏎ 16: a storm.
    """
    if isinstance(prompt, str):
        found = _mapping_in(prompt)
        if found is None:
            return {0: prompt}
        prompt = found
    texts: dict[int, str] = {}
    for frame, text in prompt.items():
        if isinstance(frame, bool) or not str(frame).strip().isdecimal() or not isinstance(text, str):
            raise UserError(f'prompt {str(prompt)[:200]} does not say a text for each frame: write {{0: "a calm sea", 16: "a storm"}}')
        texts[int(frame)] = text
    if 0 not in texts:
        raise UserError(f"prompt {str(prompt)[:200]} must begin at frame 0")
    return dict(sorted(texts.items()))


def as_text(travel: Mapping[int, str]) -> str:
    """A prompt in one line, which `travel_of` reads."""
    if list(travel) == [0]:
        return travel[0]
    return "{" + ", ".join(f"{frame}: {json.dumps(text, ensure_ascii=False)}" for frame, text in travel.items()) + "}"


def joined_lines(lines: Iterable[str]) -> list[str]:
    """The prompts in a file's lines: one in each, but lines "0: …", "16: …" one after the other are one that travels."""
    prompts: list[str] = []
    travel: dict[int, str] = {}
    for line in [*lines, "0:"]:
        numbered = re.fullmatch(NUMBERED, line)
        if numbered and travel and (number := int(numbered[1])) != 0:
            if number <= max(travel):
                raise UserError(f"prompt line {line!r} follows one for frame {max(travel)}: the frames of a prompt that travels must rise")
            travel[number] = numbered[2].strip()
            continue
        if travel:
            prompts.append(as_text(travel))
        travel = {0: numbered[2].strip()} if numbered and int(numbered[1]) == 0 else {}
        if not travel:
            prompts.append(line)
    return prompts


def _mapping_in(text: str) -> Mapping[Any, Any] | None:
    """The mapping that a text is, if it looks like one."""
    text = text.strip()
    if re.match(r"\{\s*[\"']?\d+[\"']?\s*:", text):
        import yaml

        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
                raise ValueError("it repeats a part of itself")
            found = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"prompt {text[:200]} cannot be read: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(found, dict):
            raise UserError(f'prompt {text[:200]} cannot be read: write {{0: "a calm sea", 16: "a storm"}}')
        return found
    lines = [re.fullmatch(NUMBERED, line.strip()) for line in text.splitlines() if line.strip()]
    if lines and lines[0] and int(lines[0][1]) == 0 and all(lines):
        frames = [int(line[1]) for line in lines if line]
        if any(later <= earlier for earlier, later in itertools.pairwise(frames)):
            raise UserError(f"prompt {text[:200]!r}: the frames of a prompt that travels must rise; they are {', '.join(map(str, frames))}")
        return {int(line[1]): line[2].strip() for line in lines if line}
    return None


def check_travel(prompt: Prompt, num_frames: int) -> None:
    """A UserError where a prompt that travels cannot be read, or goes on after the video's last frame."""
    between(list(travel_of(prompt)), num_frames, closed_loop=False)


def between(frames: Sequence[int], num_frames: int, closed_loop: bool) -> list[tuple[int, int, float]]:
    """For each frame of the video: between which two of the texts it stands, and how far on the way; at the end back, in a loop."""
    if frames[-1] >= num_frames:
        raise UserError(f"the prompt has a text for frame {frames[-1]}, and the video's {num_frames} frames are 0 to {num_frames - 1}")
    places = []
    for frame in range(num_frames):
        i = max(k for k, begin in enumerate(frames) if begin <= frame)
        last = i == len(frames) - 1
        if last and not closed_loop:
            places.append((i, i, 0.0))
        else:
            begin, end = frames[i], num_frames if last else frames[i + 1]
            places.append((i, 0 if last else i + 1, (frame - begin) / (end - begin)))
    return places


def mixed(a, b, share: float, kind: str) -> np.ndarray:
    """Of text states (tokens, d), from the one to the other, straight or, kind spherical, along the arc between each token's two."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if kind == "spherical":
        lengths = np.linalg.norm(a, axis=-1, keepdims=True) * np.linalg.norm(b, axis=-1, keepdims=True)
        angle = np.arccos(np.clip((a * b).sum(-1, keepdims=True) / np.maximum(lengths, 1e-12), -1, 1))
        sine, apart = np.sin(angle), np.sin(angle) > 1e-3  # else they point the same way, or opposite ways, and no arc is the shortest
        weights = (np.where(apart, np.sin(x * angle) / np.where(apart, sine, 1), x) for x in (1 - share, share))
        return sum(np.float32(weight) * x for weight, x in zip(weights, (a, b), strict=True))
    return a + np.float32(share) * (b - a)


# Weights and length


def weighted(text: str) -> list[tuple[str, float]]:
    r"""Parts of a text with their weights: (word:1.3) by 1.3, (word) by 1.1, [word] by 1 / 1.1, one in the other multiplied.

    \( \) \[ \] are the brackets themselves, and so is one without its other half.
    """
    parts: list[list[Any]] = []  # [text, weight]
    open_at: list[tuple[str, int]] = []  # bracket, and the part that follows it

    def scale(begin: int, factor: float) -> None:
        for part in parts[begin:]:
            part[1] *= factor

    for found in MARK.finditer(text):
        mark = found[0]
        if mark in ("(", "["):
            parts.append([mark, 1.0])  # taken away when its other half comes
            open_at.append((mark, len(parts)))
        elif open_at and open_at[-1][0] == "(" and (mark == ")" or found["weight"]):
            _, begin = open_at.pop()
            parts[begin - 1][0] = ""
            scale(begin, float(found["weight"]) if found["weight"] else EMPHASIS)
        elif open_at and open_at[-1][0] == "[" and mark == "]":
            _, begin = open_at.pop()
            parts[begin - 1][0] = ""
            scale(begin, 1 / EMPHASIS)
        else:
            parts.append([mark[1:] if len(mark) == 2 and mark[0] == "\\" else mark, 1.0])
    merged: list[tuple[str, float]] = []
    for part, weight in parts:
        if part and merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + part, weight)
        elif part:
            merged.append((part, weight))
    return merged or [("", 1.0)]
