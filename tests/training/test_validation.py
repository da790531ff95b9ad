"""The validation loss asks every network the same questions, and answers by how noisy they are."""

import jax
import numpy as np

from anidiff_jax.config import TrainConfig
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.training import setup
from anidiff_jax.training.step import Task
from anidiff_jax.training.validation import bucket_losses
from anidiff_jax.weights.tree import merge


def test_bucket_losses(base, adapter):
    config = TrainConfig(
        model_id_or_path=str(base), motion_adapter_id_or_path=str(adapter), sft_type="full", sample_size=16, sample_n_frames=3
    )
    model = setup.load(config)
    trained, frozen = setup.split_params(config, model)
    task = Task(model.networks, NoiseSchedule(), 7, loss_weighting="inverse_snr")
    rng = np.random.default_rng(0)
    latents, text = rng.standard_normal((2, 3, 4, 4, 4), np.float32), rng.standard_normal((2, 77, 24), np.float32)
    found = bucket_losses(task, trained, frozen, latents, text, buckets=2)
    assert found == bucket_losses(task, trained, frozen, latents, text, buckets=2)

    predict = jax.jit(lambda x, t, text: model.networks.unet.apply({"params": merge(frozen["unet"], trained)}, x, t, text))
    for loss, step in zip(found, (250, 750), strict=True):
        errors = []
        for i in range(2):
            noise = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(0), i), latents[i].shape))
            alpha = NoiseSchedule().alphas_cumprod()[step]
            noisy = np.sqrt(alpha) * latents[i] + np.sqrt(1 - alpha) * noise
            errors.append(np.square(np.asarray(predict(noisy[None], np.array([step]), text[i : i + 1]))[0] - noise).mean())
        np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-4)
    other = jax.tree.map(lambda x: x * 1.1, trained)
    assert not np.allclose(bucket_losses(task, other, frozen, latents, text, buckets=2), found, rtol=1e-4)
