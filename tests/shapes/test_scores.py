"""Scores against rendered clips whose truth is known, and against videos that must score badly."""

from dataclasses import replace

import numpy as np
import pytest

from anidiff_jax.scores import motion_degree, temporal_flicker
from anidiff_jax.shapes.evaluate import table
from anidiff_jax.shapes.render import DIRECTIONS, Scene, random_scene, render
from anidiff_jax.shapes.scores import read, scores


def clip(scene: Scene, noise: float = 0.0) -> np.ndarray:
    """The middle 8 frames of 24, as a model would sample them."""
    video = render(scene, 8, 64) / 255
    return np.clip(video + noise * np.random.default_rng(0).standard_normal(video.shape), 0, 1)


def test_truth_scores_full_marks():
    asked = [replace(scene, velocity=scene.velocity) for scene in (random_scene(np.random.default_rng(i)) for i in range(60))]
    right = table([clip(scene, 0.02) for scene in asked], asked)["right"]
    moving = np.mean([any(s.velocity) or s.growth != 0 for s in asked])
    assert right.pop("coherent") == pytest.approx(moving, abs=0.02)
    assert min(right.values()) >= 0.98, right


@pytest.mark.parametrize("motion", [*DIRECTIONS, "growing", "shrinking", "still"])
def test_motions_are_read(motion):
    found = [read(clip(random_scene(np.random.default_rng(i), motion))).motion for i in range(10)]
    assert found.count(motion) >= 9, found


@pytest.mark.parametrize("motion", ["still", "circling", "bouncing"])
def test_what_is_not_straight_motion_is_not_coherent(motion):
    found = [read(clip(random_scene(np.random.default_rng(i), motion))).coherent for i in range(10)]
    assert sum(found) <= 3


ARROW = Scene("arrow", "red", "gray", "right", velocity=(0.03, 0.0))


def test_each_wrong_answer_is_seen():
    video = clip(ARROW)
    wrong = {
        "color": replace(ARROW, color="blue"),
        "background": replace(ARROW, background="white"),
        "thing": replace(ARROW, thing="fish"),
        "front": replace(ARROW, front="left"),
    }
    for name, asked in wrong.items():
        assert scores(video, ARROW)[name]
        assert not scores(video, asked)[name], name


def test_the_wrong_way_is_wrong_and_a_frozen_video_does_not_move():
    backwards = scores(clip(ARROW)[::-1], ARROW)
    assert backwards["coherent"]
    assert not backwards["asked direction"]
    assert not backwards["along its front"]
    frozen = scores(np.repeat(clip(ARROW)[:1], 8, 0), ARROW)
    assert not any(frozen[name] for name in ("coherent", "asked direction", "along its front"))
    assert frozen["identity"]


def test_jumps_changes_and_flicker_are_seen():
    video = clip(ARROW)
    assert not scores(video[[3, 0, 5, 2, 7, 1, 6, 4]], ARROW)["coherent"]
    other = clip(replace(ARROW, color="blue"))
    assert not scores(np.concatenate([video[:4], other[4:]]), ARROW)["identity"]
    other = clip(replace(ARROW, thing="star", front=None))
    assert not scores(np.concatenate([video[:4], other[4:]]), ARROW)["identity"]
    pulsing = np.stack([clip(replace(ARROW, size=0.13 if i % 2 else 0.22))[i] for i in range(8)])
    assert not scores(pulsing, ARROW)["coherent"]
    assert not scores(pulsing, ARROW)["identity"]


@pytest.mark.parametrize("video", [np.ones((8, 64, 64, 3)), np.zeros((8, 64, 64, 3)), np.random.default_rng(0).random((8, 64, 64, 3))])
def test_blanks_and_noise_score_nothing(video):
    answers = scores(video, ARROW)
    assert not any(answers[name] for name in ("coherent", "identity", "asked direction", "thing"))


def test_general_scores():
    video = clip(ARROW)
    frozen = np.repeat(video[:1], 8, 0)
    noise = np.random.default_rng(0).random(video.shape)
    assert temporal_flicker(frozen) == 1
    assert motion_degree(frozen) == 0
    assert 0.9 < temporal_flicker(video) < 1
    assert motion_degree(video) > 0.05
    assert temporal_flicker(noise) == pytest.approx(2 / 3, abs=0.01)
    slower = clip(replace(ARROW, velocity=(0.01, 0.0)))
    assert motion_degree(slower) < motion_degree(video) < motion_degree(noise)
    assert temporal_flicker(video[:1]) == 1
    assert motion_degree(video[:1]) == 0
