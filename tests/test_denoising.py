"""The loop with a network of a few numbers against loops written out, and whole videos against diffusers."""

import itertools
from typing import Any

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import MotionAdapter
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

import anidiff_jax
from anidiff_jax.denoising import Program, Turn, denoise, numbers_of, step_of
from anidiff_jax.diffusion import solvers
from anidiff_jax.diffusion.guidance import Guidance, rescaled
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.diffusion.windows import Context, noise_order
from anidiff_jax.errors import UserError
from anidiff_jax.models.layers import Settings
from tests import reference

PROMPT, NEGATIVE = "a red circle moving right on a white background", "a blue star"
SIZES = {"num_frames": 6, "height": 32, "width": 40, "num_inference_steps": 3, "guidance_scale": 7.5}
STEPS = 4


class Toy(nn.Module):
    """In the place of the UNet: knows the place of a frame in its window, the text, and whether it is perturbed."""

    settings: Settings = Settings()

    def __call__(self, x, timesteps, text, free=None):
        frames = x.shape[1]
        text = text.mean(-1)[:, :, 0] if text.ndim == 4 else jnp.repeat(text.mean((1, 2))[:, None], frames, 1)
        place = text + 0.1 * jnp.arange(frames) + timesteps[:, None] / 1000 + (5 if self.settings.perturbed else 0)
        y = jnp.sin(x + place[..., None, None, None]) + 0.1 * x.mean(1, keepdims=True)
        return y if free is None else y * free[0]


def toy(x, timestep, text, perturbed=False):
    """The same on (f, h, w, c), for one text: (tokens, d), or (f, tokens, d). In numpy, since it is asked often."""
    text = text.mean(-1)[:, 0] if text.ndim == 3 else text.mean()
    place = text + 0.1 * np.arange(len(x)) + timestep / 1000 + (5 if perturbed else 0)
    return np.sin(x + place[:, None, None, None]) + 0.1 * x.mean(0)


def loop(x, predict, table):
    """Euler's and ddim's rows written out: a step is a sum of latents and prediction."""
    rows = table.rows
    for i in range(len(rows.timestep)):
        prediction = predict(i, x * rows.scale[i], rows.timestep[i])
        x = rows.matrix[i, 0, 0] * x + rows.matrix[i, 0, 1] * prediction
    return x


@pytest.fixture(scope="module")
def table():
    return solvers.table(NoiseSchedule(), "ddim", STEPS)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal((6, 2, 3, 2), np.float32)


TEXT = np.array([0.3, 1.1], np.float32)[:, None, None] * np.ones((2, 3, 4), np.float32)


def run(program, x, text, table, scale=3.0, guidance=None, **more):
    guidance = guidance or Guidance()
    guided = guidance.rows(len(table.rows.timestep))
    latents, text = jnp.array(x[None]), jnp.array(text[None])
    return np.asarray(denoise(program, {}, {}, latents, text, table, numbers_of(scale, guidance), guided, **more)[0])


def test_guidance_within_its_interval_only(table, noise):
    def expected(guidance, scale):
        def predict(i, x, t):
            empty, prompt = (toy(x, t, text) for text in TEXT)
            if not guidance.start <= i / STEPS < guidance.end:
                return prompt
            led = empty + scale * (prompt - empty)
            led = led + max(guidance.pag_scale - guidance.pag_adaptive_scale * (1000 - t), 0) * (prompt - toy(x, t, TEXT[1], True))
            return led * (guidance.rescale * prompt.std() / led.std() + 1 - guidance.rescale)

        return loop(noise, predict, table)

    program = Program(Toy(), rescale=True, perturbed="any")
    for guidance in (
        Guidance(),
        Guidance(rescale=0.7, start=0.25, end=0.75),
        Guidance(pag_scale=2.0, pag_adaptive_scale=0.003, end=0.9),
        Guidance(rescale=0.2, start=0.5, end=0.5, pag_scale=1.0),
    ):
        for scale in (3.0, 1.5):
            reference.close(run(program, noise, TEXT, table, scale, guidance), expected(guidance, scale), 1e-5)
    assert step_of(program, 1)._cache_size() == 1
    reference.close(run(Program(Toy()), noise, TEXT, table), expected(Guidance(), 3.0), 1e-5)


def test_nothing_is_compiled_for_another_number_of_steps(noise):
    program = Program(Toy(), at_once=7)  # a program of its own
    for steps in (2, 5):
        run(program, noise, TEXT, solvers.table(NoiseSchedule(), "ddim", steps))
    assert step_of(program, 1)._cache_size() == 1


def test_outside_the_interval_the_network_is_asked_once(table, noise, monkeypatch):
    asked = []
    monkeypatch.setattr("anidiff_jax.denoising.step_of", lambda program, videos: lambda *how: asked.append(how[5].shape[1]) or (how[4], 0))
    run(Program(Toy()), noise, TEXT, table, guidance=Guidance(start=0.5))
    assert asked == [1, 1, 2, 2]


def test_each_step_is_told_and_can_be_the_last(table, noise):
    told = []
    run(Program(Toy()), noise, TEXT, table, done=lambda: told.append(1))
    assert len(told) == STEPS

    def stop():
        told.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Program(Toy()), noise, TEXT, table, done=stop)
    assert len(told) == STEPS + 1


def test_text_may_differ_from_frame_to_frame(table, noise):
    text = TEXT[:, None] * np.linspace(0.5, 2, 6, dtype=np.float32)[:, None, None]
    predict = lambda i, x, t: toy(x, t, text[0]) + 3 * (toy(x, t, text[1]) - toy(x, t, text[0]))
    reference.close(run(Program(Toy()), noise, text, table), loop(noise, predict, table), 1e-5)


def averaged(predict, x, text, starts, length):
    """FreeNoise's average (eq. 9), a window after the other, each weighted over all of its frames, the last one too."""
    frames, total, weights = len(x), np.zeros_like(x), np.zeros(len(x))
    for start in starts:
        seen = [(start + i) % frames for i in range(length)]
        prediction = predict(x[seen], text if text.ndim == 2 else text[seen])
        for i, frame in enumerate(seen):
            weight = min(i, length - 1 - i) + 1
            total[frame] += weight * prediction[i]
            weights[frame] += weight
    assert (weights > 0).all()
    return total / weights[:, None, None, None]


@pytest.mark.parametrize("batch", [1, 2, 100])
@pytest.mark.parametrize("context", [Context(4, 2, "static"), Context(4, 1), Context(4, 1, closed_loop=True)])
@pytest.mark.parametrize("each_frame", [False, True])
def test_windows_are_averaged(table, context, batch, each_frame):
    x = np.random.default_rng(1).standard_normal((11, 2, 3, 2), np.float32)
    text = TEXT[:, None] * np.linspace(0.5, 2, 11, dtype=np.float32)[:, None, None] if each_frame else TEXT
    starts = context.starts(11, 4, STEPS)

    def predict(i, x, t):
        empty, prompt = (averaged(lambda x, text: toy(x, t, text), x, text[k], starts[i], 4) for k in (0, 1))
        return empty + 3 * (prompt - empty)

    ours = run(Program(Toy(), window=4, at_once=batch), x, text, table, starts=starts)
    reference.close(ours, loop(x, predict, table), 1e-5)


def test_where_windows_begin():
    assert Context(16, 12, "static").starts(25, 16, 2).tolist() == [[0, 4, 8, 9]] * 2  # diffusers counts the last one's end alone
    assert Context(8, 4).starts(16, 8, 3).tolist() == [[0, 4, 8, 8], [0, 2, 6, 8], [0, 3, 7, 8]]
    assert Context(8, 4, closed_loop=True).starts(14, 8, 2).tolist() == [[0, 4, 8, 12], [2, 6, 10, 0]]
    for frames, overlap, schedule, closed in itertools.product((9, 16, 23), (0, 3, 7), ("uniform", "static"), (False, True)):
        starts = Context(8, overlap, schedule, closed_loop=closed).starts(frames, 8, 9)
        assert starts.min() >= 0
        assert starts.max() <= (frames - 1 if closed else frames - 8)
        for row in starts:
            assert {(start + i) % frames for start in row for i in range(8)} == set(range(frames))


def test_when_there_are_windows():
    assert Context().window(24, 16, 24) == 0
    assert Context().window(25, 16, 24) == 16
    assert Context().window(64, 16, 12) == 12
    assert Context(8).window(8, 16, 24) == 0
    assert Context(8).window(9, 16, 24) == 8
    assert Context(closed_loop=True).window(16, 16, 24) == 16
    assert Context(8, closed_loop=True).window(6, 16, 24) == 6


@pytest.mark.parametrize(("frames", "stride"), [(25, 4), (32, 8), (17, 16)])
def test_noise_is_shuffled_as_in_diffusers(base, adapter, monkeypatch, frames, stride):
    drawn = np.random.default_rng(0)
    orders: list[np.ndarray] = []

    def permuted(_, count):
        orders.append(drawn.permutation(count))
        return orders[-1]

    ours = noise_order("shuffle", frames, 16, stride, permuted)
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.tensor(orders.pop(0)[:n]))
    theirs = type("Theirs", (AnimateDiffFreeNoiseMixin,), {"vae_scale_factor": 1})()
    theirs._free_noise_context_length, theirs._free_noise_context_stride, theirs._free_noise_noise_type = 16, stride, "shuffle_context"
    numbered = torch.arange(frames).reshape(1, 1, -1, 1, 1).float()
    monkeypatch.setattr("diffusers.pipelines.free_noise_utils.randn_tensor", lambda *_, **__: numbered)
    expected = theirs._prepare_latents_free_noise(1, 1, frames, 1, 1, torch.float32, torch.device("cpu"))
    assert ours.tolist() == expected.flatten().tolist()
    assert orders == []
    assert sorted(ours[:16]) == list(range(16))


def test_repeated_noise_repeats():
    """diffusers 0.42 compares the length with a word, draws noise for all frames, and so repeats nothing."""
    assert noise_order("repeat", 7, 3, 1, None).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert noise_order("mirror", 8, 3, 1, None).tolist() == [0, 1, 2, 2, 1, 0, 0, 1]


def test_memory_grows_with_the_latents_only(pipe):
    table = solvers.table(NoiseSchedule(), "ddim", 25)
    params, program = pipe.model.params["unet"], Program(pipe.model.networks.unet, window=16)

    def memory(frames):
        state = jnp.zeros((1, 1, frames, 8, 8, 4))
        starts = Context(16, 8).starts(frames, 16, 25)
        turn = Turn(np.int32(0), jax.tree.map(lambda x: x[0], table.rows), starts[0], np.zeros(2, np.float32))
        text = jnp.zeros((1, 2, 77, 24))
        compiled = step_of(program, 1).lower(params, {}, numbers_of(7.5, Guidance()), turn, state, text, None, None).compile()
        return compiled.memory_analysis().temp_size_in_bytes, state.nbytes

    (short, few), (long, many) = memory(64), memory(512)
    assert long - many <= 1.5 * (short - few)


def test_the_embedded_model_makes_a_long_loop():
    pipe = anidiff_jax.AnimateDiffPipeline.from_pretrained()
    (video,) = pipe("a red circle moving right on a white background", num_frames=64, num_inference_steps=6, closed_loop=True)
    assert video.shape == (64, 64, 64, 3)
    steps = np.abs(np.roll(video, -1, 0) - video).mean((1, 2, 3))
    assert steps[-1] <= steps.mean()


def test_rescaling_is_that_of_diffusers(noise):
    led, prompt = noise[None] * 3 + 1, noise[None, ::-1] * 0.5
    for share in (0.0, 0.3, 1.0):
        expected = rescale_noise_cfg(torch.tensor(led), torch.tensor(prompt.copy()), share)
        reference.close(rescaled(led, prompt, share), expected, 1e-6)


def theirs(base, adapter, latents, kind="AnimateDiffPipeline", prepare=lambda pipe: None, **how):
    pipe = getattr(diffusers, kind).from_pretrained(base, motion_adapter=MotionAdapter.from_pretrained(adapter), **how.pop("loading", {}))
    pipe.scheduler = reference.scheduler("ddim")
    pipe.set_progress_bar_config(disable=True)
    prepare(pipe)
    return pipe(PROMPT, negative_prompt=NEGATIVE, latents=torch.tensor(latents), output_type="np", **SIZES | how).frames


def equal(pipe, latents, expected, **how):
    ours = pipe(PROMPT, NEGATIVE, latents=latents, **SIZES | how)
    assert np.abs(ours - expected).max() <= 2e-3
    return ours


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).standard_normal((1, 4, 6, 8, 10), np.float32)


def test_freeu_equals_diffusers(base, adapter, pipe, latents):
    factors = {"s1": 0.5, "s2": 0.2, "b1": 1.3, "b2": 1.5}
    expected = theirs(base, adapter, latents, prepare=lambda pipe: pipe.enable_freeu(**factors))
    ours = equal(pipe, latents, expected, freeu=tuple(factors.values()))
    assert np.abs(ours - pipe(PROMPT, NEGATIVE, latents=latents, **SIZES)).max() > 0.02


@pytest.mark.parametrize(
    ("layers", "scale", "adaptive"), [("mid_block.*attn1", 7.5, 0.003), ("down_blocks.0.attentions|motion_modules.0.*attn2", 1.0, 0.0)]
)
def test_perturbed_attention_equals_diffusers(base, adapter, pipe, latents, layers, scale, adaptive):
    how = {"pag_scale": 3.0, "pag_adaptive_scale": adaptive, "guidance_scale": scale}
    expected = theirs(base, adapter, latents, "AnimateDiffPAGPipeline", loading={"pag_applied_layers": layers}, **how)
    ours = equal(pipe, latents, expected, pag_layers=layers, **how)
    assert np.abs(ours - pipe(PROMPT, NEGATIVE, latents=latents, **SIZES | {"guidance_scale": scale})).max() > 0.02


def test_a_negative_prompt_for_each(pipe):
    sizes = SIZES | {"height": 32, "width": 40}
    video = lambda prompts, negatives: pipe(prompts, negatives, **sizes)
    both = video(["a star", PROMPT], ["", NEGATIVE])
    np.testing.assert_array_equal(both[1], video(PROMPT, NEGATIVE)[0])
    assert np.abs(both[1] - video(PROMPT, "")[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"negative_prompt": ["one", "two"]}, "2 negative prompts for 1 prompts"),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5 must be between"),
        ({"guidance_start": 0.5, "guidance_end": 0.25}, "guidance_start 0.5 and guidance_end 0.25 must"),
        ({"freeu": (1.0, 2.0)}, "freeu 1.0,2.0 is not four numbers"),
        ({"pag_scale": -1.0}, "pag_scale -1.0 must be"),
        ({"pag_scale": 1.0, "pag_layers": "attn9$"}, "pag_layers='attn9$' matches no self-attention"),
        ({"context_frames": 0}, "context_frames 0 must be"),
        ({"context_frames": 4, "context_overlap": 4}, "context_overlap 4 must be"),
        ({"context_overlap": 30, "num_frames": 40}, "context_overlap 30 must be less than the frames of a window, which are 16"),
        ({"context_schedule": "often"}, "context_schedule='often'"),
        ({"context_batch": 0}, "context_batch 0"),
        ({"free_noise": "pink"}, "free_noise='pink'"),
        ({"pag_layers": "("}, "is not a regular expression"),
    ],
)
def test_mistakes_are_told(pipe, how: dict[str, Any], words):
    with pytest.raises(UserError) as error:
        pipe(PROMPT, **SIZES | how)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
