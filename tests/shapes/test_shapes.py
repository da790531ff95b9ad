"""The embedded world: clips from a seed, a tokenizer with its words whole, a model that PyTorch opens too."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from diffusers import MotionAdapter, StableDiffusionPipeline

from anidiff_jax.shapes.clips import scenes, write_clips
from anidiff_jax.shapes.render import (
    COLORS,
    DIRECTIONS,
    FRONTS,
    HELD_OUT_WORDINGS,
    PLACED,
    THINGS,
    WORDINGS,
    Scene,
    held_out,
    random_scene,
    render,
)
from anidiff_jax.shapes.tiny_model import WORDS
from anidiff_jax.weights.base import EMBEDDED, EMBEDDED_CLIPS, load_tokenizer


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_things_move_where_they_should(direction):
    velocity = tuple(0.02 * x for x in DIRECTIONS[direction])
    frames = render(Scene("star", "red", "black", size=0.15, velocity=velocity), 8, 64).astype(float).sum(-1) > 150
    rows, columns = np.mgrid[:64, :64]
    tracks = np.array([[columns[f].mean(), rows[f].mean()] for f in frames])
    np.testing.assert_allclose(np.diff(tracks, axis=0), np.tile(np.array(DIRECTIONS[direction]) * 1.28, (7, 1)), atol=0.25)


@pytest.mark.parametrize("thing", THINGS)
def test_things_are_whole_and_in_their_colour(thing):
    (frame,) = render(Scene(thing, "blue", "white", FRONTS.get(thing, (None,))[0], size=0.3), 1, 128)
    inside = np.abs(frame.astype(int) - COLORS["blue"]).sum(-1) < 10
    assert 0.05 < inside.mean() < 0.35
    assert inside[64, 64]
    assert not inside[:20].any()
    mirrored = inside[:, ::-1] if thing not in FRONTS else inside[::-1]
    assert thing == "car" or (inside != mirrored).mean() < 0.01


@pytest.mark.parametrize("thing", FRONTS)
def test_fronts_are_mirror_images(thing):
    draw = lambda front: render(Scene(thing, "red", "gray", front, size=0.3), 1, 64)[0]
    np.testing.assert_array_equal(draw("left"), draw("right")[:, ::-1])
    if "up" in FRONTS[thing]:
        np.testing.assert_array_equal(draw("up"), draw("down")[::-1])
        np.testing.assert_allclose(draw("down"), draw("right").transpose(1, 0, 2), atol=1)


def test_zooming_in_is_an_ever_smaller_crop():
    scene = Scene("square", "red", "teal gradient", x=0.4, y=0.45, size=0.1, zoom=np.log(2) / 4)
    frames = render(scene, 9, 64).astype(float)  # from half to twice the size
    middle = frames[4][16:48, 16:48]
    smaller = frames[8].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(smaller - middle).mean() < 1  # but for the samples on the edge
    assert np.abs(frames[7] - frames[4]).mean() > 5


def test_the_same_seed_gives_the_same_clips(tmp_path):
    a, b = write_clips(tmp_path / "a", 2, seed=4), write_clips(tmp_path / "b", 2, seed=4)
    assert a.read_text() == b.read_text()
    rows = list(csv.DictReader(a.open()))
    assert all((tmp_path / "a" / row["contentUrl"]).exists() for row in rows)


def test_evaluation_asks_what_training_never_shows():
    take = lambda unseen: [scene for _, (scene, _) in zip(range(200), scenes(0, unseen=unseen), strict=False)]
    combination = lambda s: (s.thing, s.color, s.background)
    assert not {*map(combination, take(True))} & {*map(combination, take(False))}
    assert 0.05 < np.mean([held_out(random_scene(np.random.default_rng(i))) for i in range(400)]) < 0.2
    assert {s.thing for s in take(True)} == {*THINGS}
    assert not {*WORDINGS} & {*HELD_OUT_WORDINGS}


def test_captions_say_what_a_still_shows():
    scene = Scene("arrow", "orange", "teal gradient", "up")
    assert scene.caption() == "an orange arrow pointing up on a teal gradient background"
    moving = [random_scene(np.random.default_rng(i), "right") for i in range(50)]
    assert all(s.front or not {*s.caption(i).split()} & {*DIRECTIONS} for i, s in enumerate(moving))


def test_captions_may_say_where_a_thing_is():
    scene = Scene("circle", "red", "black", x=0.2, y=0.8)
    assert scene.caption() == "a red circle on a black background"
    assert replace(scene, told=True).caption() == "down left: a red circle on a black background"
    assert replace(scene, told=True, y=0.5).caption() == "left: a red circle on a black background"
    assert replace(scene, told=True, x=0.5, y=0.5).caption() == scene.caption()
    placed = [random_scene(np.random.default_rng(i), PLACED) for i in range(200)]
    assert 0.5 < np.mean([scene.told for scene in placed]) < 0.9
    assert {scene.place for scene in placed} == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)}
    assert np.ptp(render(placed[0], 2, 16), axis=0).max() == 0  # nothing moves


def test_clips_of_some_things(tmp_path):
    rows = csv.DictReader(write_clips(tmp_path, 4, things=("fish", "car"), frames=2).open())
    assert all(row["contentUrl"].endswith(("fish.mp4", "car.mp4")) for row in rows)


def test_every_word_is_one_token():
    tokenizer = load_tokenizer(EMBEDDED / "tokenizer")
    for word in WORDS:
        assert len(tokenizer.tokenize(word)) == 1, word
    assert tokenizer.tokenize("a RED circle, zig") == ["a</w>", "red</w>", "circle</w>", ",</w>", "z", "i", "g</w>"]


def test_what_ships_opens_in_diffusers():
    StableDiffusionPipeline.from_pretrained(EMBEDDED)
    MotionAdapter.from_pretrained(EMBEDDED / "motion_adapter")
    assert sum(p.stat().st_size for p in EMBEDDED.parent.rglob("*") if p.is_file()) < 13e6
    assert len(list(EMBEDDED_CLIPS.glob("*.mp4"))) == 12
