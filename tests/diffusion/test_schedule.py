"""The noise of training against diffusers'; its removal is test_solvers.py's."""

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

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
def test_schedules_equal_diffusers(case):
    ours, theirs = NoiseSchedule(**case), reference.ddim(**case)
    np.testing.assert_allclose(ours.alphas_cumprod(), theirs.alphas_cumprod.numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_snr_equals_diffusers(beta_schedule):
    case = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": True}
    ours, theirs = NoiseSchedule(**case).alphas_cumprod(), reference.ddim(**case).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-7)
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=5e-5)  # near its end diffusers' rounding shows
    assert ours[-1] == 0
    np.testing.assert_allclose(ours[0], NoiseSchedule(beta_schedule=beta_schedule).alphas_cumprod()[0], rtol=1e-6)


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
    [
        {"beta_schedule": "cosine"}, {"prediction_type": "sample"}, {"beta_start": 0.5, "beta_end": 0.1}, {"num_train_timesteps": 0},
        {"timestep_spacing": "even"}, {"rescale_betas_zero_snr": True, "num_train_timesteps": 1},
    ],
)  # fmt: skip
def test_nonsense_is_refused(case):
    with pytest.raises(UserError, match=next(iter(case))):
        NoiseSchedule(**case)


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
    # inverse_snr is the squared error of the clean latents, whatever the network predicts, but at low noise and, of the noise, at high.
    alike = (snr < 10) & ((snr > 0.1) | velocity)
    assert alike.sum() >= (4 if velocity else 2)
    np.testing.assert_allclose(weight("inverse_snr")[alike], (1 / (snr + 1) if velocity else 1 / snr)[alike], rtol=1e-4)
    np.testing.assert_allclose(weight("inverse_snr")[snr > 10], 0.1 * (snr / (snr + 1) if velocity else 1 + 0 * snr)[snr > 10], rtol=1e-4)
    assert (np.diff(weight("inverse_snr")) > -2e-3).all()  # the noisier, the more
    assert weight("inverse_snr")[-1] == pytest.approx(1 if velocity else 10, rel=0.01)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", [("none",), ("none", 5.0), ("inverse_snr",)])
def test_loss_weights_where_nothing_of_the_clip_is_left(prediction_type, weighting):
    ours = NoiseSchedule(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    assert np.isfinite(loss_weight(ours, np.arange(1000), *weighting)).all()
