"""Adapters: nothing at first, equal merged and unmerged, the same in diffusers and PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from anidiff_jax.errors import UserError
from anidiff_jax.lora import init_lora, linear_layers, merge_lora, scaled
from anidiff_jax.models.layers import Dense, Settings
from anidiff_jax.pipeline import AnimateDiffPipeline
from anidiff_jax.random import quick
from anidiff_jax.weights.base import load_model
from anidiff_jax.weights.loras import load_lora, save_lora
from anidiff_jax.weights.merge import merged_folder, write_merged_adapter
from anidiff_jax.weights.tree import flatten, unflatten
from tests.test_pipeline import NEGATIVE, PROMPT, sample_theirs

SIZES = {"num_frames": 6, "height": 32, "width": 40, "num_inference_steps": 5, "guidance_scale": 7.5}


@pytest.fixture(scope="module")
def model(base, adapter):
    return load_model(base, adapter)


@pytest.fixture(scope="module")
def lora(model):
    """An adapter that has learned something: B is not zero."""
    fresh = init_lora(jax.random.key(0), model.params["unet"], ".*motion_modules.*", 4)
    rng = np.random.default_rng(1)
    return unflatten({k: 0.3 * jnp.asarray(rng.standard_normal(v.shape, np.float32)) for k, v in flatten(fresh).items()})


@pytest.fixture(scope="module")
def apply(model):
    rng = np.random.default_rng(0)
    x, text = rng.standard_normal((1, 3, 8, 8, 4), np.float32), rng.standard_normal((1, 7, 24), np.float32)
    run = jax.jit(lambda params, lora: model.networks.unet.apply({"params": params, "lora": lora}, x, jnp.array([7]), text))
    return lambda params, lora: np.asarray(run(params, lora))


def test_every_linear_of_the_motion_modules_and_nothing_else(model):
    init = model.params["unet"]
    names = linear_layers(init)
    fresh = flatten(init_lora(jax.random.key(0), init, ".*motion_modules.*", 4))
    chosen = {key.split(".lora_")[0] for key in fresh}
    assert chosen == {name for name in names if "motion_modules" in name}
    assert len(chosen) == 7 * 12  # proj_in, proj_out, 2 × 4 of attention, 2 of feed-forward
    with pytest.raises(UserError, match="matches no Linear layer"):
        init_lora(jax.random.key(0), init, "motion", 4)


def test_fresh_adapters_are_drawn_as_peft_draws_them(model):
    fresh = flatten(init_lora(jax.random.key(0), model.params["unet"], ".*motion_modules.*", 64))
    for key, value in fresh.items():
        theirs = torch.nn.Linear(value.shape[0], 64, bias=False)  # reset_lora_parameters: Kaiming, a = √5
        torch.nn.init.kaiming_uniform_(theirs.weight, a=5**0.5)
        of = lambda x: (float(abs(x).max()), float(x.std()))
        np.testing.assert_allclose(of(value), (0, 0) if "lora_B" in key else of(theirs.weight.detach()), rtol=0.1)


def test_a_fresh_adapter_is_the_identity(model, apply):
    params = model.params["unet"]
    fresh = init_lora(jax.random.key(0), params, ".*motion_modules.*", 4)
    np.testing.assert_array_equal(apply(params, fresh), apply(params, jax.tree.map(jnp.zeros_like, fresh)))
    assert np.abs(apply(params, fresh) - apply(params, {})).max() < 1e-6


def test_merged_equals_unmerged(model, apply, lora):
    params = model.params["unet"]
    beside, merged = apply(params, scaled(lora, 2.0)), apply(merge_lora(params, lora, 2.0), {})
    assert np.abs(beside - merged).max() <= 1e-5 * np.abs(beside).max()
    assert np.abs(beside - apply(params, {})).max() > 0.1


def test_dropout_needs_a_key(base, adapter, lora):
    network = load_model(base, adapter, settings=Settings(lora_dropout=0.5))
    x, text = jnp.ones((1, 2, 4, 4, 4)), jnp.ones((1, 3, 24))
    run = jax.jit(
        lambda rngs: network.networks.unet.apply({"params": network.params["unet"], "lora": lora}, x, jnp.array([7]), text, rngs=rngs)
    )
    sampling = run({})
    np.testing.assert_array_equal(sampling, run({}))
    first, second = run({"dropout": quick(jax.random.key(0))}), run({"dropout": quick(jax.random.key(1))})
    assert np.abs(first - sampling).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("share", [0.1, 0.75])
def test_dropout_leaves_out_the_share_that_is_asked_for(share):
    """Of an adapter that is the identity beside a weight of zero; what is kept makes up for the rest."""
    layer, identity = Dense(1000, Settings(lora_dropout=share), use_bias=False), {"weight": jnp.eye(1000)}
    variables = {"params": {"weight": jnp.zeros((1000, 1000))}, "lora": {"lora_A": identity, "lora_B": identity}}
    y = np.asarray(layer.apply(variables, jnp.ones((10, 1000)), rngs={"dropout": quick(jax.random.key(0))}))
    assert abs((y == 0).mean() - share) < 0.02
    np.testing.assert_allclose(y[y != 0], 1 / (1 - share), rtol=1e-5)


@pytest.fixture
def checkpoint(lora, tmp_path):
    (tmp_path / "iter-7").mkdir()
    save_lora(lora, tmp_path / "iter-7", alpha=8, dropout=0.0, base="base")
    return tmp_path / "iter-7"


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).standard_normal((1, 4, 6, 8, 10), np.float32)


def test_a_file_gives_back_what_was_saved(lora, checkpoint):
    back = flatten(load_lora(checkpoint, {}).unet)
    assert back.keys() == flatten(lora).keys()
    for key, value in flatten(scaled(lora, 2.0)).items():
        np.testing.assert_array_equal(value, back[key])


def test_diffusers_loads_the_file_with_the_same_scale(base, adapter, lora, latents, tmp_path):
    """Without proj_in and proj_out: diffusers 0.42 calls them in a way that PEFT's layers do not take, and stops."""
    inner = unflatten({k: v for k, v in flatten(lora).items() if "transformer_blocks" in k})
    save_lora(inner, tmp_path, alpha=8, dropout=0.0, base="base")
    ours = AnimateDiffPipeline.from_pretrained(base, adapter, lora=tmp_path)(PROMPT, NEGATIVE, latents=latents, **SIZES)
    theirs = sample_theirs(base, adapter, latents, lora=tmp_path)
    assert np.abs(ours - theirs).max() <= 2e-3
    assert np.abs(theirs - sample_theirs(base, adapter, latents)).max() > 0.02


def test_the_merged_export_gives_in_diffusers_what_the_lora_gives_here(base, adapter, checkpoint, latents):
    merged = write_merged_adapter(adapter, None, checkpoint)
    assert merged == merged_folder(checkpoint) == checkpoint.with_name("iter-7-merged")
    ours = AnimateDiffPipeline.from_pretrained(base, adapter, lora=checkpoint)(PROMPT, NEGATIVE, latents=latents, **SIZES)
    theirs = sample_theirs(base, merged, latents)
    assert np.abs(ours - theirs).max() <= 2e-3
    assert np.abs(theirs - sample_theirs(base, adapter, latents)).max() > 0.02
    with pytest.raises(UserError, match="replace_if_exists"):
        write_merged_adapter(adapter, None, checkpoint)
    write_merged_adapter(adapter, None, checkpoint, replace=True)


def test_a_lora_for_another_model_is_refused(lora, tmp_path, model):
    (tmp_path / "iter-1").mkdir()
    save_lora({"mid_block": lora["mid_block"], "elsewhere": lora["mid_block"]}, tmp_path / "iter-1", 8, 0.0, "base")
    with pytest.raises(UserError, match="trained on another model"):
        AnimateDiffPipeline(model, None).load_lora(tmp_path / "iter-1")
