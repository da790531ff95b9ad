"""The embedded world: clips from a seed, a tokenizer with its words whole, a model that PyTorch opens too."""

import csv

import numpy as np
import pytest
from diffusers import MotionAdapter, StableDiffusionPipeline

from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.shapes.render import COLORS, DIRECTIONS, SHAPES, Scene, random_scene, render
from anidiff_jax.shapes.tiny_model import WORDS
from anidiff_jax.weights.base import EMBEDDED, EMBEDDED_CLIPS, load_tokenizer


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shapes_move_where_they_should(direction):
    frames = render(Scene("star", "red", "black", 0.5, 0.5, 0.15, direction, 0.02), 8, 64).astype(float).sum(-1) > 100
    rows, columns = np.mgrid[:64, :64]
    tracks = np.array([[columns[f].mean(), rows[f].mean()] for f in frames])
    np.testing.assert_allclose(np.diff(tracks, axis=0), np.tile(np.array(DIRECTIONS[direction]) * 1.28, (7, 1)), atol=0.25)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_whole_and_in_their_colour(shape):
    (frame,) = render(Scene(shape, "blue", "white", 0.5, 0.5, 0.3, None), 1, 128)
    inside = np.abs(frame.astype(int) - COLORS["blue"]).sum(-1) < 10
    assert 0.05 < inside.mean() < 0.35
    assert inside[64, 64]
    assert not inside[:20].any()
    np.testing.assert_allclose(inside[:, ::-1], inside, atol=1)  # symmetric


def test_the_same_seed_gives_the_same_clips(tmp_path):
    a, b = write_clips(tmp_path / "a", 2, seed=4), write_clips(tmp_path / "b", 2, seed=4)
    assert a.read_text() == b.read_text()
    rows = list(csv.DictReader(a.open()))
    assert all((tmp_path / "a" / row["contentUrl"]).exists() for row in rows)
    assert random_scene(np.random.default_rng(1), "right").caption().count("moving right") == 1


def test_every_word_is_one_token():
    tokenizer = load_tokenizer(EMBEDDED / "tokenizer")
    for word in WORDS:
        assert len(tokenizer.tokenize(word)) == 1, word
    assert tokenizer.tokenize("a RED circle, zig") == ["a</w>", "red</w>", "circle</w>", ",</w>", "z", "i", "g</w>"]


def test_what_ships_opens_in_diffusers():
    StableDiffusionPipeline.from_pretrained(EMBEDDED)
    MotionAdapter.from_pretrained(EMBEDDED / "motion_adapter")
    assert sum(p.stat().st_size for p in EMBEDDED.parent.rglob("*") if p.is_file()) < 12e6
    assert len(list(EMBEDDED_CLIPS.glob("*.mp4"))) == 12
