"""The noise and its removal against diffusers' DDIM scheduler, step by step."""

import jax
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

from anidiff_jax.diffusion import ddim
from anidiff_jax.diffusion.schedule import NoiseSchedule, add_noise, loss_weight, target
from anidiff_jax.errors import UserError
from tests import reference

CASES = [
    {},
    {"beta_schedule": "scaled_linear", "steps_offset": 0, "clip_sample": True},
    {"prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
]


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_diffusers(case):
    ours, theirs = NoiseSchedule(**case), reference.ddim(**case)
    np.testing.assert_allclose(ours.alphas_cumprod(), theirs.alphas_cumprod.numpy(), rtol=2e-6, atol=1e-9)
    theirs.set_timesteps(25)
    table = ddim.table(ours, 25)
    np.testing.assert_array_equal(table.timestep, theirs.timesteps.numpy())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 3, 3, 4), np.float32)
    y = torch.tensor(x)
    for i, timestep in enumerate(theirs.timesteps):
        prediction = rng.standard_normal(x.shape, np.float32)
        x = ddim.step(ours, jax.tree.map(lambda column, i=i: column[i], table), x, prediction)
        y = theirs.step(torch.tensor(prediction), timestep, y).prev_sample
        np.testing.assert_allclose(x, y.numpy(), rtol=1e-5, atol=1e-5 * np.abs(y.numpy()).max())


def test_the_default_is_the_official_recipe():
    assert list(ddim.table(NoiseSchedule(), 25).timestep)[:3] == [961, 921, 881]
    assert ddim.table(NoiseSchedule(), 25).alpha_next[-1] == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_training_noise_equals_diffusers(kind):
    ours, theirs = NoiseSchedule(prediction_type=kind), reference.ddim(prediction_type=kind)
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 4, 3, 3, 4), np.float32)
    for t in (0, 17, 999):
        a, b, step = torch.tensor(x0), torch.tensor(noise), torch.full((4,), t)
        np.testing.assert_allclose(add_noise(ours, x0, noise, t), theirs.add_noise(a, b, step), rtol=1e-5, atol=1e-6)
        expected = theirs.get_velocity(a, b, step) if kind == "v_prediction" else b
        np.testing.assert_allclose(target(ours, x0, noise, t), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [{"beta_schedule": "cosine"}, {"prediction_type": "sample"}, {"beta_start": 0.5, "beta_end": 0.1}, {"num_train_timesteps": 0}],
)
def test_nonsense_is_refused(case):
    with pytest.raises(UserError, match=next(iter(case))):
        NoiseSchedule(**case)
    with pytest.raises(UserError, match="num_inference_steps"):
        ddim.table(NoiseSchedule(), 1001)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_weights(prediction_type):
    ours = NoiseSchedule(prediction_type=prediction_type)
    steps = torch.tensor([0, 10, 200, 500, 800, 999])
    snr = compute_snr(reference.ddim(prediction_type=prediction_type), steps).numpy()
    weight = lambda *kind: np.asarray(loss_weight(ours, steps.numpy(), *kind))
    velocity = prediction_type == "v_prediction"
    np.testing.assert_allclose(weight("none"), 1, rtol=1e-5)
    np.testing.assert_allclose(weight("none", 5.0), np.minimum(snr, 5) / (snr + 1 if velocity else snr), rtol=1e-4)
    assert (weight("none", 1.0) <= weight("none", 5.0)).all()
    # Between its limits inverse_snr is the squared error of the clean latents, whatever the network predicts.
    middle = (snr > 0.1) & (snr < 10)
    assert middle.sum() >= 2
    np.testing.assert_allclose(weight("inverse_snr")[middle], (1 / (snr + 1) if velocity else 1 / snr)[middle], rtol=1e-4)
    assert weight("inverse_snr").max() <= 10
