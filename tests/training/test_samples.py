"""The videos of a run are made as its arguments say."""

import json

import numpy as np

from anidiff_jax.arguments import parse
from anidiff_jax.config import TrainConfig
from anidiff_jax.training.samples import save_samples


def test_the_arguments_of_validation_videos(tmp_path):
    words = "--sample_size 16x24 --sample_n_frames 3 --num_inference_steps 7 --guidance_scale 2.5 --seed 9 --scheduler euler"
    calls = []

    def pipeline(prompt, **settings):
        calls.append({"prompt": prompt, **settings})
        return np.random.default_rng(0).random((1, 3, 16, 24, 3), np.float32)

    save_samples(pipeline, ["a star", "a circle"], parse(TrainConfig, words.split()), tmp_path)
    settings = {"num_frames": 3, "height": 16, "width": 24, "num_inference_steps": 7, "guidance_scale": 2.5, "seed": 9}
    settings |= {"scheduler": "euler", "eta": 0.0}
    assert calls == [{"prompt": "a star", **settings}, {"prompt": "a circle", **settings}]
    assert {path.name for path in tmp_path.glob("*.gif")} == {"a-star-seed9.gif", "a-circle-seed9.gif"}
    assert json.loads((tmp_path / "scores.json").read_text()).items() >= settings.items()
