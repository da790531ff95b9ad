"""The update: equal to PyTorch's, and the same however many devices and micro-batches share the work."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import get_scheduler

from anidiff_jax.config import TrainConfig
from anidiff_jax.diffusion.schedule import NoiseSchedule, loss_weight
from anidiff_jax.models.layers import Settings
from anidiff_jax.parallel import data_parallel, replicate, split_batch
from anidiff_jax.training import setup
from anidiff_jax.training.state import TrainState, learning_rate, make_optimizer
from anidiff_jax.training.step import Task, denoising_loss, draw_timestep, encode_clips, make_update, rounded
from anidiff_jax.weights.tree import flatten
from tests.reference import close

CLIPS = 8


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (CLIPS, 3, 16, 16, 3), np.uint8),
        "ids": rng.integers(0, 100, (CLIPS, 77)).astype(np.int32),
        "index": np.arange(40, 40 + CLIPS, dtype=np.uint32),
    }


@pytest.fixture(scope="module")
def load(base, adapter):
    def load(kind, **changes):
        settings = {"sample_size": 16, "sample_n_frames": 3, "lora_rank": 4, "learning_rate": 1e-3, **changes}
        config = TrainConfig(model_id_or_path=str(base), motion_adapter_id_or_path=str(adapter), sft_type=kind, **settings)
        model = setup.load(config)
        trained, frozen = setup.split_params(config, model)
        return config, Task(model.networks, NoiseSchedule(), 7, 4.0 if kind == "lora" else None), trained, frozen

    return load


def keep_gradient(optimizer):
    """`optimizer`, with the gradient that it was last given as the first part of its state."""
    kept = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, state, params=None: (g, g))
    return optax.chain(kept, optimizer)


def run(task, config, trained, frozen, batch, devices, micro_batches):
    """(gradient of the first update, change of the parameters after three, the state, the last metrics)"""
    optimizer = keep_gradient(make_optimizer(config, 10))
    update = data_parallel(make_update(task, optimizer), jax.local_devices()[:devices])
    state = TrainState.create(jax.tree.map(jnp.array, trained), optimizer)
    if devices == jax.local_device_count():
        state, frozen = replicate(state), replicate(frozen)
    for i in range(3):
        again = {**batch, "index": batch["index"] + np.uint32(100 * i)}
        state, metrics = update(state, frozen, split_batch(again, micro_batches, devices))
        if i == 0:
            gradient = {k: np.asarray(v, np.float64) for k, v in flatten(state.opt_state[0]).items()}
    after, before = flatten(state.params), flatten(trained)
    return gradient, np.concatenate([np.ravel(np.asarray(after[k], np.float64) - before[k]) for k in before]), state, metrics


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_four_devices_do_what_one_does(load, batch, kind):
    """For lora with dropout on: what is drawn for a clip follows the clip, not the device."""
    changes = {"lora_dropout": 0.3, "trainable_modules": "mid_block.*motion_modules.*"} if kind == "lora" else {}
    config, task, trained, frozen = load(kind, **changes)
    assert (task.networks.unet.settings.lora_dropout == 0.3) == (kind == "lora")
    rng = np.random.default_rng(2)
    trained = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), trained)  # no gradient is zero
    one, change_one, _, metrics_one = run(task, config, trained, frozen, batch, 1, 4)
    four, change_four, state, metrics_four = run(task, config, trained, frozen, batch, 4, 2)
    for key, gradient in one.items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, key
        assert np.linalg.norm(four[key] - gradient) <= 1e-5 * norm, key
    assert float(metrics_four["loss"]) == pytest.approx(float(metrics_one["loss"]), rel=1e-5)
    assert np.linalg.norm(change_four - change_one) <= 1e-3 * np.linalg.norm(change_one)
    assert int(state.step) == 3
    for leaf in jax.tree.leaves(state):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 4
        assert all((shard == shards[0]).all() for shard in shards)


def test_latents_are_drawn_from_the_posterior(load, batch, base):
    _, task, _, frozen = load("full")
    pixels, key = batch["pixels"][0], jax.random.key(5)
    ours = jax.jit(lambda pixels, keys: encode_clips(task, frozen, pixels, keys))(batch["pixels"][:2], jax.random.split(key))[0]
    key = jax.random.split(key)[0]
    vae = AutoencoderKL.from_pretrained(base / "vae")
    with torch.no_grad():
        posterior = vae.encode(torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    mean, std = (x.permute(0, 2, 3, 1).numpy() for x in (posterior.mean, posterior.std))
    close(ours, 0.18215 * (mean + std * np.asarray(jax.random.normal(key, mean.shape))))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_adapters_of_half_precision_have_float32_masters(load, batch, dtype):
    config, task, trained, frozen = load("lora", lora_dtype=dtype, trainable_modules="mid_block.*attn1.to_q", learning_rate=1e-6)
    assert setup.lora_dtype(config) == {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    task = replace(task, lora_dtype=setup.lora_dtype(config))
    _, change, state, metrics = run(task, config, trained, frozen, batch, 1, 1)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(change).all()
    assert np.abs(change).max() > 0  # a step of 1e-6 would be lost in half precision


def test_rounding_leaves_the_gradient_alone():
    """A fresh adapter's gradients are smaller than float16's least number."""
    x = jnp.float32([1 + 2**-11 + 2**-20, -3e-9, 0.0])
    for dtype in ("float16", "bfloat16", "float32"):
        np.testing.assert_array_equal(rounded(x, dtype), x.astype(dtype).astype(np.float32))
        np.testing.assert_array_equal(jax.grad(lambda x, dtype=dtype: 1e-9 * rounded(x, dtype).sum())(x), np.full(3, 1e-9, np.float32))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(load, bad):
    config, task, trained, frozen = load("lora", trainable_modules="mid_block.*attn1.to_q")
    task = replace(task, ema_decay=0.9)
    optimizer = make_optimizer(config, 10)
    update = data_parallel(make_update(task, optimizer), jax.local_devices()[:1])
    rng, vae = np.random.default_rng(0), task.networks.vae.config
    side = 16 // vae.factor
    clip = {"mean": rng.normal(size=(1, 3, side, side, vae.latent_channels)).astype(np.float16), "index": np.arange(1, dtype=np.uint32)}
    clip |= {"std": np.zeros_like(clip["mean"])}
    clip |= {"text": rng.normal(size=(1, 77, task.networks.unet.config.cross_attention_dim)).astype(np.float16)}
    broken = {**clip, "mean": np.where(np.arange(side)[:, None] == 0, np.float16(bad), clip["mean"])}
    leaves = lambda state: [np.array(x) for x in jax.tree.leaves(state)]
    state = TrainState.create(jax.tree.map(jnp.array, trained), optimizer, ema=True)
    state, metrics = update(state, frozen, split_batch(clip, 1, 1))
    assert np.isfinite(metrics["grad_norm"])
    before = leaves(state)
    state, metrics = update(state, frozen, split_batch(broken, 1, 1))
    assert not np.isfinite(metrics["grad_norm"])
    assert int(state.step) == 2
    for old, new in zip(before, leaves(state), strict=True):
        assert (new == old + 1).all() if new.dtype == np.int32 else (new == old).all()
    state, metrics = update(state, frozen, split_batch(clip, 1, 1))
    assert np.isfinite(metrics["grad_norm"])
    assert all(np.isfinite(x).all() for x in leaves(state))
    assert any((new != old).any() for old, new in zip(before, leaves(state), strict=True) if new.dtype != np.int32)


@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"])
def test_learning_rates_are_those_of_transformers(kind):
    config = TrainConfig(lr_scheduler_type=kind, learning_rate=3e-4, warmup_ratio=0.11)
    rate = jax.vmap(learning_rate(config, 37))(jnp.arange(37))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=int(np.ceil(0.11 * 37)), num_training_steps=37)
    theirs = []
    for _ in range(37):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rate, theirs, rtol=1e-5, atol=1e-10)
    assert learning_rate(config, 1)(0) == pytest.approx(3e-4)  # a run of one update learns


def first_step(config, gradient):
    """(AdamW's first moment, the change of a parameter that is 2) after one update with this gradient."""
    optimizer = make_optimizer(config, 10)
    params = {"x": jnp.full(4, 2.0)}
    changes, state = optimizer.update({"x": jnp.full(4, gradient)}, optimizer.init(params), params)
    return np.asarray(optax.tree.get(state, "mu")["x"]), np.asarray(changes["x"])


@pytest.mark.parametrize("limit", [0.5, 3.0, 100.0])
def test_gradients_are_scaled_down_to_the_norm(limit):
    moment, _ = first_step(TrainConfig(max_grad_norm=limit), 10.0)
    assert np.linalg.norm(moment) == pytest.approx(0.1 * min(limit, 20.0))


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.3])
def test_weights_decay(decay):
    _, change = first_step(TrainConfig(weight_decay=decay, learning_rate=1e-3, lr_scheduler_type="constant"), 0.0)
    np.testing.assert_allclose(change, -1e-3 * decay * 2, rtol=1e-5)


def test_the_learning_rate_that_is_not_given():
    assert learning_rate(TrainConfig(lr_scheduler_type="constant"), 10)(0) == pytest.approx(1e-4)


def test_the_moving_average(load, batch):
    """Follows what trains: after each update ema = decay · ema + (1 - decay) · params, the first ones followed more closely."""
    config, task, trained, frozen = load("lora", trainable_modules="mid_block.*attn1.to_q")
    optimizer = make_optimizer(config, 10)
    update = data_parallel(make_update(replace(task, ema_decay=0.3), optimizer), jax.local_devices()[:1])
    state = TrainState.create(jax.tree.map(jnp.array, trained), optimizer, ema=True)
    expected = {k: np.asarray(v) for k, v in flatten(trained).items()}
    for i in range(4):
        state, _ = update(state, frozen, split_batch({**batch, "index": batch["index"] + np.uint32(100 * i)}, 1, 1))
        decay = min(0.3, (1 + i) / (10 + i))
        expected = {k: decay * v + (1 - decay) * np.asarray(flatten(state.params)[k]) for k, v in expected.items()}
    assert decay == 0.3
    for name, value in flatten(state.best).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-7)
        if ".lora_B." in name:  # it lags
            assert np.abs(value - flatten(state.params)[name]).max() > 1e-6


def test_offset_noise(load):
    """Shifts each channel of each frame, and nothing else."""
    _, task, trained, frozen = load("lora", trainable_modules="mid_block.*attn1.to_q", lora_dropout=0.0)
    captured = []
    networks = replace(task.networks, unet=Recorder(task.networks.unet, captured))
    latents, text = np.zeros((1, 3, 4, 4, 4), np.float32), np.zeros((1, 77, 24), np.float32)
    key = jax.random.key(0)[None]
    for offset in (0.0, 0.5):
        denoising_loss(trained, frozen, replace(task, networks=networks, noise_offset=offset), latents, text, key)
    plain, shifted = captured  # the latents are zero: what the network sees is the noise times a constant
    difference = np.asarray(shifted - plain)
    assert np.abs(difference).max() > 0.01
    np.testing.assert_allclose(difference, np.broadcast_to(difference[:, :, :1, :1], difference.shape), atol=1e-5)
    assert len(np.unique(difference.round(5))) == 3 * 4


class Toy:
    """A network of one number: it answers with what it is shown, multiplied by it."""

    settings = Settings()

    def apply(self, variables, sample, timesteps, text):
        return sample * variables["params"]["x"]


def toy(**changes):
    """(task, what trains, frozen, batch of latents) whose update compiles in no time."""
    vae = SimpleNamespace(config=SimpleNamespace(shift_factor=0.0, scaling_factor=1.0))
    task = Task(SimpleNamespace(unet=Toy(), vae=vae, text_encoder=None), **{"schedule": NoiseSchedule(), "seed": 7, **changes})
    clips = {name: np.full((1, 1, CLIPS, 2, 2, 2, 4), 0.5, np.float32) for name in ("mean", "std")}
    index = np.arange(CLIPS, dtype=np.uint32)[None, None]
    return task, {"x": jnp.float32(0.5)}, {"unet": {}}, {**clips, "text": np.zeros((1, 1, CLIPS, 1, 1), np.float32), "index": index}


def test_noise_follows_from_the_seed():
    def loss(**changes):
        task, trained, frozen, batch = toy(**changes)
        optimizer = make_optimizer(TrainConfig(), 10)
        update = data_parallel(make_update(task, optimizer), jax.local_devices()[:1])
        return float(update(TrainState.create(jax.tree.map(jnp.array, trained), optimizer), frozen, batch)[1]["loss"])

    assert loss() == loss()
    assert loss(seed=8) != loss()


@pytest.mark.parametrize("kind", [{"loss_weighting": "inverse_snr"}, {"snr_gamma": 1.0}])
def test_a_clip_counts_by_its_noise(kind):
    _, trained, frozen, _ = toy()
    clip, text = np.full((1, 2, 2, 2, 4), 0.5, np.float32), np.zeros((1, 1, 1))
    weights = []
    for seed in range(8):
        keys = jax.random.key(seed)[None]
        plain, weighted = (float(denoising_loss(trained, frozen, toy(**k)[0], clip, text, keys)) for k in ({}, kind))
        step = jax.random.randint(jax.random.split(keys[0], 3)[0], (), 0, 1000)
        weights.append(weighted / plain)
        expected = loss_weight(NoiseSchedule(), step, kind.get("loss_weighting", "none"), kind.get("snr_gamma"))
        assert weights[-1] == pytest.approx(float(expected), rel=1e-4)
    assert max(weights) > 1.5 * min(weights)


def test_timesteps_are_drawn_from_all_that_there_are():
    shown = []
    task, trained, frozen, _ = toy(schedule=NoiseSchedule(num_train_timesteps=3))
    task.networks.unet = Recorder(task.networks.unet, [], shown)
    latents, text = np.zeros((64, 1, 1, 1, 4), np.float32), np.zeros((64, 1, 1), np.float32)
    denoising_loss(trained, frozen, task, latents, text, jax.random.split(jax.random.key(0), 64))
    assert set(np.asarray(shown[0]).tolist()) == {0, 1, 2}
    denoising_loss(trained, frozen, replace(task, timesteps=(1, 3)), latents, text, jax.random.split(jax.random.key(0), 64))
    assert set(np.asarray(shown[1]).tolist()) == {1, 2}


def test_steps_from_one_on_may_be_drawn_more_often():
    task, *_ = toy(schedule=NoiseSchedule(num_train_timesteps=10))
    task = replace(task, timesteps=(2, 10), timestep_bias=(7, 4.0))
    drawn = np.asarray(jax.vmap(lambda key: draw_timestep(task, key))(jax.random.split(jax.random.key(0), 17_000)))
    shares = np.bincount(drawn, minlength=11) / len(drawn)
    np.testing.assert_allclose(shares, np.array([0, 0, 1, 1, 1, 1, 1, 4, 4, 4, 0]) / 17, atol=0.01)


class Recorder:
    """A network that keeps what it is shown."""

    def __init__(self, network, captured, timesteps=None):
        self.settings, self.captured, self.timesteps = network.settings, captured, [] if timesteps is None else timesteps

    def apply(self, variables, sample, timesteps, text):
        self.captured.append(sample)
        self.timesteps.append(timesteps)
        return sample
