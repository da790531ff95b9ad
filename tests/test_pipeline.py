"""The whole pipeline against diffusers' AnimateDiffPipeline: same folder, same latents, guidance on."""

import itertools
import sys

import jax
import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline as Theirs
from diffusers import MotionAdapter

import anidiff_jax
from anidiff_jax.diffusion import rows, solvers
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.diffusion.solvers import table as solvers_table
from anidiff_jax.errors import UserError
from anidiff_jax.random import purpose
from tests import reference

PROMPT, NEGATIVE = "a red circle moving right on a white background", "a blue star"


def sample_theirs(base, adapter, latents, steps=5, guidance=7.5, lora=None, scheduler="ddim", eta=0.0, **noise):
    pipe = Theirs.from_pretrained(base, motion_adapter=MotionAdapter.from_pretrained(adapter))
    pipe.scheduler = reference.scheduler(scheduler, **noise)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    _, _, frames, h, w = latents.shape
    return pipe(
        PROMPT, negative_prompt=NEGATIVE, num_frames=frames, height=4 * h, width=4 * w, num_inference_steps=steps,
        guidance_scale=guidance, latents=torch.tensor(latents), output_type="np", decode_chunk_size=4, eta=eta,
    ).frames  # fmt: skip


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).standard_normal((1, 4, 6, 8, 10), np.float32)


@pytest.fixture(scope="module")
def video(pipe, latents):
    return pipe(PROMPT, NEGATIVE, num_frames=6, height=32, width=40, num_inference_steps=5, guidance_scale=7.5, latents=latents)


def test_frames_equal_diffusers(base, adapter, latents, video):
    expected = sample_theirs(base, adapter, latents)
    assert video.shape == (1, 6, 32, 40, 3)
    assert video.dtype == np.float32
    assert expected.std() > 0.02
    assert np.abs(video - expected).max() <= 2e-3


@pytest.mark.parametrize(
    "noise",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01, "steps_offset": 0},
        {"prediction_type": "v_prediction", "clip_sample": True},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
    ],
)
def test_noise_arguments_mean_what_they_mean_in_diffusers(base, adapter, latents, video, noise):
    pipe = anidiff_jax.AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, **noise)
    ours = pipe(PROMPT, NEGATIVE, num_frames=6, height=32, width=40, num_inference_steps=5, guidance_scale=7.5, latents=latents)
    assert np.abs(ours - sample_theirs(base, adapter, latents, **noise)).max() <= 2e-3
    assert np.abs(ours - video).max() > 0.02


FEW = ("dpmpp_2m", "lcm", "heun")  # several steps remembered, fresh noise, several evaluations a step; the others take minutes


@pytest.mark.parametrize("scheduler", [name if name in FEW else pytest.param(name, marks=pytest.mark.soak) for name in solvers.SOLVERS])
def test_solvers_equal_diffusers(base, adapter, pipe, latents, scheduler, monkeypatch):
    """diffusers is given the noise that we draw."""
    noise, eta = {"timestep_spacing": "trailing"}, 0.5 if scheduler == "ddim" else 0.0
    drawn = itertools.count()

    def draw(shape, **_):
        ours = rows.fresh_noise(purpose(9, "solver"), next(drawn), (1, *(shape[i] for i in (2, 3, 4, 1))))  # as b f h w c
        return torch.tensor(np.asarray(ours).transpose(0, 4, 1, 2, 3))

    module = sys.modules[type(reference.scheduler(scheduler)).__module__]
    monkeypatch.setattr(module, "randn_tensor", draw, raising=False)
    expected = sample_theirs(base, adapter, latents, scheduler=scheduler, eta=eta, **noise)
    spaced = anidiff_jax.AnimateDiffPipeline(pipe.model, NoiseSchedule(**noise))
    sizes = {"num_frames": 6, "height": 32, "width": 40, "num_inference_steps": 5}
    ours = spaced(PROMPT, NEGATIVE, **sizes, guidance_scale=7.5, latents=latents, scheduler=scheduler, eta=eta, seed=9)
    assert next(drawn) >= (4 if scheduler in ("ddim", "euler_a", "dpmpp_sde", "lcm", "ddpm") else 0)
    assert expected.std() > 0.02
    assert np.abs(ours - expected).max() <= 2e-3


def test_fresh_noise_depends_on_the_seed_only(pipe):
    sizes = {"num_frames": 6, "height": 32, "width": 40, "num_inference_steps": 5, "scheduler": "lcm"}
    latents = np.ones((2, 4, 6, 8, 10), np.float32)
    video = lambda prompts, seed: pipe(prompts, seed=seed, latents=latents[: len(prompts)], **sizes)
    listed = video(["a blue star", PROMPT], 3)
    np.testing.assert_array_equal(listed[1], video([PROMPT], 3)[0])
    assert np.abs(video([PROMPT], 4)[0] - listed[1]).max() > 0.01


def test_recipes(base, adapter, latents, monkeypatch):
    calls = []
    monkeypatch.setattr("anidiff_jax.sampling.solvers.table", lambda *how: calls.append(how) or solvers_table(NoiseSchedule(), "ddim", 1))
    monkeypatch.setattr("anidiff_jax.sampling.denoise", lambda *how: how[3])
    load = lambda **how: anidiff_jax.AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, **how)
    sizes = {"num_frames": 6, "height": 32, "width": 40, "latents": latents}
    pipe = load(preset="lightning")
    pipe(PROMPT, **sizes)
    assert calls.pop() == (NoiseSchedule(timestep_spacing="trailing"), "euler", 4, 0.0, 0)
    assert pipe.defaults["guidance_scale"] == 1.0
    pipe(PROMPT, **sizes, scheduler="heun", num_inference_steps=3)
    assert calls.pop()[1:] == ("heun", 3, 0.0, 0)
    load(preset="lcm", scheduler="unipc", beta_schedule="scaled_linear")(PROMPT, **sizes)
    assert calls.pop() == (NoiseSchedule(beta_schedule="scaled_linear"), "unipc", 6, 0.0, 0)
    for how, words in (({"preset": "fast"}, "preset='fast' is not one of official"), ({"scheduler": "magic"}, "scheduler='magic' is not")):
        with pytest.raises(UserError, match=words):
            load(**how)


def test_a_video_depends_on_its_prompt_and_seed_only(pipe):
    sizes = {"num_frames": 4, "height": 32, "width": 32, "num_inference_steps": 2}
    alone = pipe(PROMPT, seed=3, **sizes)
    listed = pipe(["a blue star", PROMPT], seed=3, **sizes)
    np.testing.assert_array_equal(listed[1], alone[0])
    assert np.abs(listed[0] - alone[0]).max() > 1e-3
    assert np.abs(pipe(PROMPT, seed=4, **sizes) - alone).max() > 1e-2


def test_what_is_not_finite_is_told(pipe, monkeypatch, caplog):
    values = np.where(np.arange(jax.local_device_count()) == 0, 0.5, np.nan)  # one on each device, the last again and again
    monkeypatch.setattr("anidiff_jax.pipeline.sample", lambda *how: values[:, None, None, None, None])
    pipe([PROMPT, "a blue star"], num_frames=1, height=32, width=32)
    assert "not finite, shown black, are in the video of 'a blue star'" in caplog.text


def test_tokens_are_those_of_the_tokenizer(pipe, caplog):
    prompts = ["a red circle", "", "a blue star, " * 40]
    expected = pipe.model.tokenizer(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    np.testing.assert_array_equal(pipe.tokenize(prompts), expected)
    assert "text is cut after 77 tokens" in caplog.text


def test_no_guidance_is_guidance_of_one(pipe):
    sizes = {"num_frames": 4, "height": 32, "width": 32, "num_inference_steps": 2}
    skipped = pipe(PROMPT, guidance_scale=1.0, **sizes)
    assert np.abs(skipped - pipe(PROMPT, guidance_scale=1.0 + 1e-6, **sizes)).max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 30}, "height 30 is not a positive multiple of 4"),
        ({"num_frames": 25, "context_frames": 25}, "context_frames 25 are more than the motion modules know (24"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"latents": np.zeros((1, 4, 3, 8, 8), np.float32)}, "latents have shape"),
        ({"scheduler": "magic"}, "scheduler='magic'"),
        ({"seed": 2**32}, "seed 4294967296 is not one of 0 to 4294967295"),
        ({"seed": [-1]}, "seed -1 is not"),
    ],
)
def test_mistakes_are_told(pipe, arguments, words):
    with pytest.raises(UserError) as error:
        pipe(PROMPT, **{"height": 32, "width": 32, **arguments})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_embedded_model_needs_no_argument():
    pipe = anidiff_jax.AnimateDiffPipeline.from_pretrained()
    assert pipe(PROMPT, num_frames=3, num_inference_steps=2).shape == (1, 3, 64, 64, 3)
