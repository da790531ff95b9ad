"""Every solver against diffusers' live scheduler, step by step, on random predictions and injected noise."""

import itertools
import sys

import jax
import numpy as np
import pytest
import torch

from anidiff_jax.config import SampleConfig
from anidiff_jax.defaults import PRESETS
from anidiff_jax.diffusion import rows, solvers
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.errors import UserError
from tests import reference

SHAPE = (1, 2, 3, 3, 4)
STOCHASTIC = ("euler_a", "dpmpp_sde", "lcm", "ddpm")
SPACINGS = ("leading", "linspace", "trailing")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction")
step = jax.jit(rows.step)


def follow(name, steps, theirs, monkeypatch, eta=0.0, begin=0, **noise):
    """Both step by step; the largest error of each step at most 1e-5 of the largest value.

    diffusers computes with the same sigmas and ᾱ, in float64: at squaredcos_cap_v2's last sigma, 20000, its float32 has errors of 1e-3,
    and euler_a and heun become NaN or noise.
    """
    table = solvers.table(NoiseSchedule(**noise), name, steps, eta, begin)
    theirs.set_timesteps(steps)
    timesteps = theirs.timesteps[begin * theirs.order :]
    for field in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(theirs, field):
            setattr(theirs, field, getattr(theirs, field).double())
    if hasattr(theirs, "set_begin_index"):  # of two equal timesteps at its start, dpmpp_2m_karras would begin at the second, and fail
        theirs.set_begin_index(begin * theirs.order)
    truncated = name == "dpmpp_2m_karras" and noise.get("beta_schedule") == "squaredcos_cap_v2"
    # There diffusers cuts fractions off, and its float32 makes 998.99 of 999.
    np.testing.assert_allclose(table.rows.timestep, timesteps.numpy(), rtol=1e-7, atol=1 if truncated else 0)
    if begin == 0:
        np.testing.assert_allclose(table.start, float(theirs.init_noise_sigma), rtol=1e-6)

    rng = np.random.default_rng(steps)
    draw = lambda: rng.standard_normal(SHAPE, np.float32)
    double = lambda x: torch.tensor(x).double()
    fresh = {}
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", lambda *_, **__: double(fresh["noise"]), raising=False)
    x = draw() * np.float32(table.start)
    y = double(x)
    if begin:  # a given video, and noise
        clean, x = draw(), draw()
        y = theirs.add_noise(double(clean), double(x), timesteps[:1])
        x = table.asked.noised(clean, x)
        reference.close(x, y, 1e-5)
    state = rows.start(table.rows, x[None])[0]
    for i, timestep in enumerate(timesteps):
        row, prediction, fresh["noise"] = jax.tree.map(lambda column, i=i: column[i], table.rows), draw(), draw()
        reference.close(state[0] * row.scale, theirs.scale_model_input(y, timestep), 1e-5)
        how = {"eta": eta, "variance_noise": double(fresh["noise"])} if eta else {}
        y = theirs.step(double(prediction), timestep, y, **how).prev_sample
        state = step(row, state, prediction, fresh["noise"])
        reference.close(state[0], y, 1e-5)
    assert table.draws == (eta > 0 or (name in STOCHASTIC and steps - begin > 1))


@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_steps_equal_diffusers(name, prediction_type, beta_schedule, monkeypatch):
    for timestep_spacing, steps in [*itertools.product(SPACINGS, (1, 2, 7)), ("linspace", 24)]:
        noise = {"prediction_type": prediction_type, "beta_schedule": beta_schedule, "timestep_spacing": timestep_spacing}
        follow(name, steps, reference.scheduler(name, **noise), monkeypatch, **noise)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", [name for name in solvers.SOLVERS if name not in ("pndm", "lms")])
def test_from_a_later_step_on(name, prediction_type, monkeypatch):
    for timestep_spacing, begin in itertools.product(SPACINGS, (1, 3, 6)):
        noise = {"prediction_type": prediction_type, "timestep_spacing": timestep_spacing}
        follow(name, 7, reference.scheduler(name, **noise), monkeypatch, begin=begin, **noise)


def test_lms_from_a_later_step_on():
    """diffusers takes the weights of several slopes though it has one: half of the noise stays. Ours is that of those levels alone."""
    whole, later = (solvers.table(NoiseSchedule(), "lms", 6, begin=begin) for begin in (0, 2))
    assert later.rows.timestep.tolist() == whole.rows.timestep[2:].tolist()
    first = solvers.table(NoiseSchedule(), "euler", 6, begin=2).rows.matrix[0, 0]  # of latents, prediction, noise
    np.testing.assert_allclose(later.rows.matrix[0, 0], [first[0], 0, 0, 0, *first[1:]], rtol=1e-5)


def test_pndm_from_a_later_step_on():
    """diffusers cuts its timesteps after the first one was doubled, and so begins a step too early and leaves its first step half done."""
    whole, later = (solvers.table(NoiseSchedule(), "pndm", 6, begin=begin) for begin in (0, 2))
    assert later.rows.timestep.tolist() == [*whole.rows.timestep[3:5], *whole.rows.timestep[4:]]
    assert len(solvers.table(NoiseSchedule(), "pndm", 6, begin=5).rows.timestep) == 1


@pytest.mark.parametrize("beta_schedule", BETAS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", [name for name in solvers.SOLVERS if name not in ("pndm", "lms", "heun", "lcm")])
def test_zero_snr(name, prediction_type, beta_schedule, monkeypatch):
    for timestep_spacing, steps in itertools.product(SPACINGS, (2, 7)):
        noise = {"prediction_type": prediction_type, "beta_schedule": beta_schedule, "timestep_spacing": timestep_spacing}
        noise["rescale_betas_zero_snr"] = True
        if timestep_spacing != "leading" and prediction_type == "epsilon" and name in ("ddim", "ddpm"):  # diffusers divides by 0
            with pytest.raises(UserError, match="nothing of the video is left at timestep 999"):
                solvers.table(NoiseSchedule(**noise), name, steps)
        else:
            theirs = reference.scheduler(name, **noise)
            if beta_schedule == "squaredcos_cap_v2":  # diffusers' float32 leaves three digits of its first beta, 4e-5
                theirs.alphas_cumprod[:-1] = torch.tensor(NoiseSchedule(**noise).alphas_cumprod()[:-1])
            follow(name, steps, theirs, monkeypatch, **noise)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_zero_snr_with_lcm(prediction_type, monkeypatch):
    noise = {"prediction_type": prediction_type, "rescale_betas_zero_snr": True}
    if prediction_type == "epsilon":
        with pytest.raises(UserError, match="nothing of the video is left at timestep 999"):
            solvers.table(NoiseSchedule(**noise), "lcm", 4)
    else:
        follow("lcm", 4, reference.scheduler("lcm", **noise), monkeypatch, **noise)


@pytest.mark.parametrize("name", ["lms", "heun"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_zero_snr_where_diffusers_has_no_such_option(name, prediction_type, monkeypatch):
    noise = {"prediction_type": prediction_type, "timestep_spacing": "trailing"}
    rescaled = reference.scheduler("euler", rescale_betas_zero_snr=True, **noise)
    theirs = reference.scheduler(name, **noise)
    theirs.alphas_cumprod = rescaled.alphas_cumprod
    follow(name, 7, theirs, monkeypatch, rescale_betas_zero_snr=True, **noise)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "heun"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_clipping(name, prediction_type, monkeypatch):
    noise = {"prediction_type": prediction_type, "clip_sample": True}
    follow(name, 7, reference.scheduler(name, **noise), monkeypatch, **noise)


@pytest.mark.parametrize("name", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_sde", "lms", "unipc"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_clipping_where_diffusers_has_no_such_option(name, prediction_type, monkeypatch):
    """One step ends at the clean latents; and where nothing is beyond ±1, clipping changes nothing."""
    noise = {"prediction_type": prediction_type, "timestep_spacing": "trailing"}
    latents, prediction = np.random.default_rng(0).standard_normal((2, *SHAPE), np.float32)
    end = {}
    for clip in (True, False):
        table = solvers.table(NoiseSchedule(**noise, clip_sample=clip), name, 1)
        row = jax.tree.map(lambda column: column[0], table.rows)
        end[clip] = step(row, rows.start(table.rows, latents[None] * table.start)[0], prediction, latents)[0]
    assert np.abs(end[False]).max() > 2
    reference.close(end[True], np.clip(end[False], -1, 1), 1e-5)
    plain, clipped = (solvers.table(NoiseSchedule(**noise, clip_sample=clip), name, 5) for clip in (False, True))
    states = [rows.start(table.rows, 1e-3 * latents[None])[0] for table in (plain, clipped)]
    for i in range(5):
        states = [
            step(jax.tree.map(lambda column, i=i: column[i], table.rows), state, 1e-3 * prediction, 0 * prediction)
            for table, state in zip((plain, clipped), states, strict=True)
        ]
        reference.close(states[1][0], states[0][0], 1e-5)


@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta(eta, timestep_spacing, monkeypatch):
    for prediction_type in PREDICTIONS:
        noise = {"prediction_type": prediction_type, "timestep_spacing": timestep_spacing}
        follow("ddim", 7, reference.scheduler("ddim", **noise), monkeypatch, eta, **noise)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_where_the_last_step_ends(name, monkeypatch):
    for timestep_spacing in SPACINGS:
        noise = {"set_alpha_to_one": False, "timestep_spacing": timestep_spacing}
        follow(name, 7, reference.scheduler(name, **noise), monkeypatch, **noise)
    ends = [solvers.table(NoiseSchedule(set_alpha_to_one=one), name, 7).rows.matrix[-1] for one in (True, False)]
    assert np.abs(ends[0] - ends[1]).max() > 0.01


def test_other_lengths_of_the_noise(monkeypatch):
    for name in solvers.SOLVERS:
        noise = {"num_train_timesteps": 500, "steps_offset": 3, "beta_start": 0.001, "beta_end": 0.02}
        follow(name, 11, reference.scheduler(name, **noise), monkeypatch, **noise)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_trailing_steps_are_as_many_as_were_asked_for(name):
    """In diffusers 61 steps, and one number in sixteen, become one more, at timestep -1, whose ᾱ is the last one's: pure noise."""
    theirs = reference.scheduler(name, timestep_spacing="trailing")
    for steps in (60, 61, 103, 999):
        ours = solvers.table(NoiseSchedule(timestep_spacing="trailing"), name, steps).rows.timestep
        theirs.set_timesteps(steps)
        assert len(ours) == steps
        assert ours.min() == 0 or steps < 999
        np.testing.assert_array_equal(ours, theirs.timesteps.numpy()[:steps])
    theirs.set_timesteps(61)
    assert (len(theirs.timesteps), theirs.timesteps[-1]) == (62, -1)


def test_a_table_is_a_row_for_each_evaluation():
    counts = {name: len(solvers.table(NoiseSchedule(), name, 10).rows.timestep) for name in solvers.SOLVERS}
    assert counts == dict.fromkeys(solvers.SOLVERS, 10) | {"heun": 19, "pndm": 11}


def test_fresh_noise_follows_from_the_key_and_the_row():
    noise = lambda seed, row: np.asarray(rows.fresh_noise(jax.random.key(seed), row, (64, 64)))
    np.testing.assert_array_equal(noise(1, 2), noise(1, 2))
    assert (noise(1, 2) != noise(1, 3)).all()
    assert (noise(1, 2) != noise(2, 2)).all()
    assert abs(noise(1, 2).std() - 1) < 0.05


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_they_all_arrive(name):
    """A network that knows the answer is led to it, from noise, however it is asked."""
    answer, noise = np.random.default_rng(0).standard_normal((2, *SHAPE))
    for prediction_type in PREDICTIONS:
        schedule = NoiseSchedule(prediction_type=prediction_type)
        table = solvers.table(schedule, name, 20)
        state = rows.start(table.rows, np.float32(noise * table.start)[None])[0]
        alphas = schedule.alphas_cumprod().astype(np.float64)
        for i in range(len(table.rows.timestep)):
            row = jax.tree.map(lambda column, i=i: column[i], table.rows)
            alpha = alphas[int(row.timestep)]
            seen = np.asarray(state[0] * row.scale)
            predicted = (seen - np.sqrt(alpha) * answer) / np.sqrt(1 - alpha)
            if prediction_type == "v_prediction":
                predicted = np.sqrt(alpha) * predicted - np.sqrt(1 - alpha) * answer
            state = step(row, state, np.float32(predicted), np.float32(noise))
        assert np.abs(state[0] - answer).max() < 0.02, (name, prediction_type)


@pytest.mark.parametrize(
    ("words", "name", "steps", "eta", "noise"),
    [
        ("scheduler='magic' is not one of ddim, euler,", "magic", 5, 0, {}),
        ("num_inference_steps=0 must be between 1 and", "euler", 0, 0, {}),
        ("num_inference_steps=1001 must be between 1 and num_train_timesteps=1000", "ddim", 1001, 0, {}),
        ("num_inference_steps=1000 must be at most 999", "unipc", 1000, 0, {"timestep_spacing": "linspace"}),
        ("num_inference_steps=1000 with steps_offset=1 starts at step 1000", "ddim", 1000, 0, {}),
        ("num_inference_steps=51 is too many for scheduler='lcm'", "lcm", 51, 0, {}),
        ("eta=2 must be between 0", "ddim", 5, 2, {}),
        ("eta=0.5 is for scheduler='ddim' alone", "euler", 5, 0.5, {}),
        ("clip_sample is not for scheduler='pndm'", "pndm", 5, 0, {"clip_sample": True}),
        ("nothing of the video is left at timestep 999", "pndm", 5, 0, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("beta_end=0.5 leaves nothing of the video", "euler", 5, 0, {"beta_end": 0.5}),
    ],
)
def test_what_cannot_be_done_is_told(words, name, steps, eta, noise):
    with pytest.raises(UserError) as error:
        solvers.table(NoiseSchedule(**noise), name, steps, eta)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_recipes():
    """What each preset visits."""

    def timesteps(preset):
        recipe = PRESETS[preset]
        schedule = NoiseSchedule(**{key: value for key, value in recipe.items() if key in NoiseSchedule.names()})
        assert recipe.keys() <= set(NoiseSchedule.names()) | {"scheduler", "num_inference_steps", "guidance_scale"}
        return [int(t) for t in solvers.table(schedule, recipe["scheduler"], recipe["num_inference_steps"]).rows.timestep]

    assert timesteps("official")[:3] == [961, 921, 881]
    assert timesteps("diffusers")[:2] + timesteps("diffusers")[-1:] == [999, 957, 0]
    assert timesteps("lcm") == [999, 839, 679, 499, 339, 179]
    assert timesteps("lightning") == [999, 749, 499, 249]
    assert vars(SampleConfig()).items() >= PRESETS["official"].items()  # the defaults are AnimateDiff's own recipe
