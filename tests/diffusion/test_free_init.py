"""FreeInit's renoising, and whole videos, against diffusers."""

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline as Theirs
from diffusers import MotionAdapter
from diffusers.pipelines import free_init_utils

from anidiff_jax.diffusion.free_init import FreeInit, renoised
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.errors import UserError
from tests import reference

CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 4, 1), (0, 4, 1, 2, 3)
PROMPT = "a red circle moving right on a white background"


@pytest.fixture
def theirs(monkeypatch):
    """theirs(latents, noise, fresh, **how) → noise, by diffusers, all (1, c, f, h, w)"""
    pipe = free_init_utils.FreeInitMixin()
    pipe.scheduler = reference.ddim()

    def renoise(latents, noise, fresh, **how):
        pipe.enable_free_init(**how)
        pipe._free_init_initial_noise = torch.tensor(noise)
        monkeypatch.setattr(free_init_utils, "randn_tensor", lambda **_: torch.tensor(fresh))
        return pipe._apply_free_init(torch.tensor(latents), 1, 5, torch.device("cpu"), torch.float32, None)[0]

    return renoise


@pytest.mark.parametrize("method", ["butterworth", "gaussian", "ideal"])
@pytest.mark.parametrize("stops", [(0.25, 0.25), (0.5, 0.8), (0.0, 0.5)])
def test_renoising_equals_diffusers(theirs, method, stops):
    latents, noise, fresh = np.random.default_rng(0).standard_normal((3, 1, 2, 8, 6, 4), np.float32)
    order = 3 if method == "butterworth" else 4
    expected = theirs(latents, noise, fresh, method=method, order=order, spatial_stop_frequency=stops[0], temporal_stop_frequency=stops[1])
    last = lambda x: x.transpose(CHANNELS_LAST)[0]
    ours = renoised(NoiseSchedule(), FreeInit(2, method, order, *stops), last(latents), last(noise), last(fresh))
    reference.close(np.asarray(ours)[None].transpose(CHANNELS_FIRST), expected, 1e-5)


def test_the_box_and_the_middle_of_odd_sizes():
    """diffusers has no box, and its filters are half a frequency off the middle where a size is odd; here they are symmetric."""
    box = FreeInit(2, "box", spatial_stop=0.5, temporal_stop=0.25).low_pass(9, 8, 5)
    inside = lambda n, stop: np.array([min(k, n - k) * 2 / n <= stop for k in range(n)])
    np.testing.assert_array_equal(box, np.einsum("t,y,x->tyx", inside(9, 0.25), inside(8, 0.5), inside(5, 0.5)))
    for kind in ("butterworth", "gaussian", "ideal", "box"):
        passed = FreeInit(2, kind).low_pass(7, 5, 9)
        assert passed[0, 0, 0] == passed.max() == 1
        np.testing.assert_allclose(passed[1:], passed[:0:-1])


@pytest.mark.parametrize("fast", [False, True])
def test_videos_equal_diffusers(base, adapter, pipe, monkeypatch, fast):
    latents, fresh = np.random.default_rng(0).standard_normal((2, 1, 4, 6, 8, 10), np.float32)
    monkeypatch.setattr(free_init_utils, "randn_tensor", lambda **_: torch.tensor(fresh))
    sizes = {"num_frames": 6, "height": 32, "width": 40, "num_inference_steps": 4, "guidance_scale": 7.5}
    other = Theirs.from_pretrained(base, motion_adapter=MotionAdapter.from_pretrained(adapter))
    other.scheduler = reference.ddim()
    other.set_progress_bar_config(disable=True)
    other.enable_free_init(num_iters=2, use_fast_sampling=fast)
    expected = other(PROMPT, latents=torch.tensor(latents), output_type="np", **sizes).frames
    monkeypatch.setattr(
        "anidiff_jax.sampling.renoised",
        lambda schedule, how, x, noise, _: renoised(schedule, how, x, noise, fresh.transpose(CHANNELS_LAST)[0]),
    )
    ours = pipe(PROMPT, latents=latents, free_init_iterations=2, free_init_fast=fast, **sizes)
    assert np.abs(ours - expected).max() <= 2e-3


def test_steps_and_mistakes():
    assert [FreeInit(3, fast=True).steps(i, 25) for i in range(3)] == [8, 16, 25]
    assert [FreeInit(3).steps(i, 25) for i in range(3)] == [25, 25, 25]
    mistakes = [
        ({"iterations": -1}, "free_init_iterations -1"),
        ({"filter": "sharp"}, "free_init_filter=.sharp."),
        ({"temporal_stop": 2}, "free_init_temporal_stop 2"),
    ]
    for how, words in mistakes:
        with pytest.raises(UserError, match=words):
            FreeInit(**how)
