"""The report: what it asks, what it writes. A stand-in for the pipeline draws what each prompt says, or something else."""

import json
from dataclasses import replace

import numpy as np
from PIL import Image

from anidiff_jax.shapes.evaluate import as_markdown, evaluate, prompts, write
from anidiff_jax.shapes.render import COLORS, DIRECTIONS, HELD_OUT_WORDINGS, held_out, render


def painter(asked, change=lambda scene: scene):
    """A pipeline that renders the scene behind the prompt; what has no motion moves down."""
    scenes = {prompt: scene for scene, prompt in asked}

    def sample(prompt, seed, num_frames):
        scene = change(scenes[prompt])
        velocity = tuple(0.03 * x for x in DIRECTIONS[scene.front or "down"])
        return render(replace(scene, x=0.5, y=0.5, velocity=velocity, growth=0.0), num_frames, 64)[None] / 255

    return sample


def test_prompts_are_worded_and_combined_as_training_never_does():
    asked = prompts(40)
    assert np.mean([held_out(scene) for scene, _ in asked]) == 0.5
    assert asked == prompts(40)
    starts = {wording.split("{")[0] for wording in HELD_OUT_WORDINGS}
    assert all(any(prompt.startswith(start) for start in starts) for _, prompt in asked)
    assert {scene.thing for scene, _ in prompts(20, things=["star"])} == {"star"}


def test_a_good_painter_gets_full_marks_and_files(tmp_path):
    asked = prompts(12)
    videos, result = evaluate(painter(asked), asked, num_frames=8)
    assert set(result["right"].values()) == {1.0}
    assert result["videos"] == 12
    assert sum(result["motions"].values()) == 12
    write(tmp_path, result, videos, [prompt for _, prompt in asked])
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    assert "| color | 100 % | 12 |" in (tmp_path / "scores.md").read_text()
    assert Image.open(tmp_path / "grid.gif").n_frames == 8
    assert Image.open(tmp_path / "sheet.png").size[1] > 12 * 64


def test_a_painter_of_the_wrong_colour_that_stands_still_is_seen():
    asked = prompts(6)
    other = dict(zip(COLORS, [*list(COLORS)[1:], next(iter(COLORS))], strict=True))
    draw = painter(asked, lambda scene: replace(scene, color=other[scene.color]))
    still = lambda prompt, seed, num_frames: np.repeat(draw(prompt, seed, num_frames)[:, :1], num_frames, axis=1)
    _, result = evaluate(still, asked, num_frames=8)
    assert result["right"]["color"] == result["right"]["coherent"] == result["right"]["along its front"] == 0
    assert result["motions"] == {"still": 6}
    assert result["motion_degree"] == 0
    assert "| seen: still | 100 % | 6 |" in as_markdown(result)
