"""The validation loss asks every network the same questions, and answers by how noisy they are."""

import jax
import numpy as np
import pytest

from anidiff_jax.config import TrainConfig
from anidiff_jax.data.records import read_records
from anidiff_jax.diffusion.schedule import NoiseSchedule
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.shapes.clips import write_clips
from anidiff_jax.training import setup
from anidiff_jax.training.step import Task
from anidiff_jax.training.validation import Validation, bucket_losses
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


@pytest.mark.parametrize(("most", "clips"), [(2, 2), (32, 3)])
def test_at_most_so_many_clips_are_validated_on(base, adapter, tmp_path, most, clips):
    write_clips(tmp_path, 3, seed=1)
    config = TrainConfig(
        model_id_or_path=str(base), motion_adapter_id_or_path=str(adapter), sample_size="16", sample_n_frames=4, sample_stride=2,
        validation_clips=most, text_dropout_rate=1.0,
    )  # fmt: skip
    model = setup.load(config)
    task = setup.task(config, model)
    pipeline = AnimateDiffPipeline(model, task.schedule)
    validation = Validation(config, read_records(str(tmp_path / "clips.csv"), str(tmp_path)), pipeline, task)
    assert validation.latents.shape == (clips, 4, 4, 4, 4)
    assert len({text.tobytes() for text in validation.text}) == clips  # no caption is left out here
