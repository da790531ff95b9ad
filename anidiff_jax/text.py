"""Prompts → text states: tokens in chunks of the text encoder's length, weighted, and mixed from frame to frame where a prompt travels."""

import threading
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from anidiff_jax.models.clip import CLIPTextModel
from anidiff_jax.options import Options
from anidiff_jax.prompts import Prompt, between, mixed, travel_of, weighted
from anidiff_jax.weights.tree import Tree

TOKENIZER_LOCK = threading.Lock()  # fast tokenizers do not like two threads; the loader has several


@partial(jax.jit, static_argnums=(0, 4))
def encode_text(network: CLIPTextModel, params: Tree, ids, lora: Tree | None = None, skip: int = 0):
    """ids (b, tokens) → text states (b, tokens, d), of the last layer but `skip`."""
    return network.apply({"params": params, "lora": lora or {}}, ids, skip)


def text_states(
    network: CLIPTextModel,
    params: Tree,
    lora: Tree,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    negatives: Sequence[str] | None,
    num_frames: int,
    asked: Options,
) -> list[np.ndarray]:
    """For each prompt, text states (n, tokens, d), of one that travels (n, f, tokens, d); n is 2 with the negative one first, else 1.

    As many tokens as the longest text of a video needs, in chunks of the text encoder's length. clip_skip is for prompts only, as in
    diffusers.
    """
    tokens = cache(partial(tokens_of, tokenizer, network.config.max_length))

    @cache
    def states(text: str, count: int, skip: int = 0) -> np.ndarray:
        (ids, weights), empty = tokens(text), tokens("")[0]
        rows = np.concatenate([ids, np.repeat(empty, count - len(ids), axis=0)])
        encoded = [np.asarray(encode_text(network, params, row[None], lora, skip), np.float32)[0] for row in rows]
        return np.concatenate([*map(emphasised, encoded, weights), *encoded[len(weights) :]])

    made = []
    for i, prompt in enumerate(prompts):
        travel = whole_texts(prompt, asked)
        count = max(len(tokens(text)[0]) for text in [*travel.values(), *([negatives[i]] if negatives else [])])
        keys = [states(text, count, asked.clip_skip) for text in travel.values()]
        positive = keys[0]
        if len(keys) > 1:
            places = between(list(travel), num_frames, asked.closed_loop)
            positive = np.stack([mixed(keys[a], keys[b], share, asked.prompt_interpolation) for a, b, share in places])
        negative = [np.broadcast_to(states(negatives[i], count), positive.shape)] if negatives else []
        made.append(np.stack([*negative, positive]))
    return made


def whole_texts(prompt: Prompt, asked: Options) -> dict[int, str]:
    """Frame → the text from there on, with what stands before and after every prompt."""
    return {frame: ", ".join(filter(None, (asked.prompt_head, text, asked.prompt_tail))) for frame, text in travel_of(prompt).items()}


def tokens_of(tokenizer: Any, length: int, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a text, and their weights, (chunks, length) each."""
    with TOKENIZER_LOCK:
        parts = [(list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]), weight) for part, weight in weighted(text)]
    return chunks(parts, length, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def chunks(parts: Sequence[tuple[list[int], float]], length: int, begin: int, end: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of parts, with weights → ids (chunks, length) int32, each between begin and end, and weights (chunks, length).

    A text encoder sees `length` tokens at once, 77 for CLIP: what is longer goes through it in several chunks.
    """
    ids = [token for part, _ in parts for token in part]
    weights = [weight for part, weight in parts for _ in part]
    own = length - 2
    rows, factors = [], []
    for at in range(0, max(len(ids), 1), own):
        row, factor = ids[at : at + own], weights[at : at + own]
        rows.append([begin, *row, end] + [pad] * (own - len(row)))
        factors.append([1.0, *factor, 1.0] + [1.0] * (own - len(row)))
    return np.array(rows, np.int32), np.array(factors, np.float32)


def emphasised(states: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A chunk's states (tokens, d) times weights (tokens,); then brought back to the mean that they had, as A1111 does it.

    Where weights turn the mean round, or leave next to nothing of it, bringing it back would tear the states apart: they stay.
    """
    if (weights == 1).all():
        return states
    moved = states * weights[:, None]
    before, after = float(states.mean()), float(moved.mean())
    return moved * np.float32(before / after) if 0.1 < abs(before / (after or 1e-12)) < 10 and before * after > 0 else moved
