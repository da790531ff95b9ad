"""The trained weights that ship: they draw what is asked, things move, and PyTorch diffusers draws the same frames."""

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline as Theirs
from diffusers import DDIMScheduler, MotionAdapter

from anidiff_jax import AnimateDiffPipeline
from anidiff_jax.shapes.evaluate import evaluate, prompts
from anidiff_jax.shapes.render import FRONTS
from anidiff_jax.weights.base import EMBEDDED

PROMPT = "a red arrow pointing left on a gray background"


@pytest.fixture(scope="module")
def pipe():
    return AnimateDiffPipeline.from_pretrained()


def test_stills_show_what_was_asked():
    image_model = AnimateDiffPipeline.from_pretrained(EMBEDDED)
    asked = prompts(24)
    _, result = evaluate(image_model, asked, num_frames=1, height=64, width=64, num_inference_steps=10, guidance_scale=5.0)
    assert result["right"]["color"] >= 0.9, result  # a sixth, were it chance
    assert result["right"]["background"] >= 0.9, result  # a fifth
    assert result["right"]["thing"] >= 0.8, result  # a seventh
    assert result["right"]["front"] >= 0.65, result  # a quarter or a half


def test_videos_move(pipe):
    """Smoother than the image model's frames, which know nothing of each other, and not frozen; things go where they look."""
    asked = prompts(10, things=tuple(FRONTS))
    _, result = evaluate(pipe, asked, num_inference_steps=10)
    _, alone = evaluate(AnimateDiffPipeline.from_pretrained(EMBEDDED), asked, num_frames=8, height=64, width=64, num_inference_steps=10)
    assert result["temporal_flicker"] > alone["temporal_flicker"] + 0.02, (result, alone)
    assert result["motion_degree"] > 0.08, result
    assert result["right"]["color"] >= 0.9, result
    assert result["right"]["background"] == 1, result
    assert result["right"]["along its front"] >= 0.6 > 0.4 > alone["right"]["along its front"], (result, alone)
    assert result["right"]["coherent"] >= 0.6 > 0.1 >= alone["right"]["coherent"], (result, alone)


def test_frames_equal_diffusers(pipe):
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 16, 16), np.float32)
    ours = pipe(PROMPT, num_inference_steps=4, latents=latents)
    theirs = Theirs.from_pretrained(
        EMBEDDED, motion_adapter=MotionAdapter.from_pretrained(EMBEDDED / "motion_adapter"), torch_dtype=torch.float32
    )
    theirs.scheduler = DDIMScheduler.from_pretrained(EMBEDDED / "scheduler")
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPT,
        num_frames=8,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=torch.tensor(latents),
        output_type="np",
    ).frames
    assert expected.std() > 0.02
    assert np.abs(ours - expected).max() <= 2e-3
