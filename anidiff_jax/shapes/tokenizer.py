"""A CLIP tokenizer with a vocabulary of a few hundred entries: letters, and the words of the shapes' captions."""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'!?:"
END = "</w>"


def _bpe(word: str, rank: dict[tuple[str, str], int]) -> list[str]:
    """The pieces into which byte-pair encoding with these merges cuts a word."""
    pieces = [*word[:-1], word[-1] + END]
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            break
        i = pairs.index(best)
        pieces[i : i + 2] = ["".join(best)]
    return pieces


def write_tokenizer(folder: Path, words: Iterable[str], max_length: int = 77) -> int:
    """Writes vocab.json, merges.txt and tokenizer_config.json; every one of `words` becomes one token. Returns the vocabulary's size."""
    rank: dict[tuple[str, str], int] = {}
    for word in dict.fromkeys(words):
        left, *rest = _bpe(word, rank)  # merges of later words rank behind, so they leave earlier words whole
        for piece in rest:
            rank[left, piece] = len(rank)
            left += piece
    pieces = [*LETTERS, *(letter + END for letter in LETTERS), *dict.fromkeys("".join(pair) for pair in rank)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in rank))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {**special, "model_max_length": max_length, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(vocabulary)
