"""Norms as diffusers, the original AnimateDiff and its v1 take them, and the strength of the motion modules, against PyTorch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNetMotionModel

from anidiff_jax.models.layers import Settings, gelu, group_norm
from anidiff_jax.weights.base import load_model
from anidiff_jax.weights.kinds import recognise
from anidiff_jax.weights.merge import merged_adapter, write_adapter, write_original
from anidiff_jax.weights.sources import motion_source
from anidiff_jax.weights.tree import flatten, is_motion, unflatten
from tests import reference

FRAMES = 3


class PerFrame(torch.nn.Module):
    """A group norm over (b, c, f, h, w) that takes each frame's statistics alone, as the original's motion modules do."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        b, c, f, h, w = x.shape
        y = self.norm(x.transpose(1, 2).reshape(b * f, c, h, w))
        return y.reshape(b, f, c, h, w).transpose(1, 2)


class Joint(torch.nn.Module):
    """A group norm over ((b f), c, h, w) that takes all frames' statistics together, as v1's inflated norms do."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        n, c, h, w = x.shape
        y = self.norm(x.reshape(n // FRAMES, FRAMES, c, h, w).transpose(1, 2))
        return y.transpose(1, 2).reshape(n, c, h, w)


def theirs(base_unet, adapter, motion_norm, spatial_norm):
    unet = UNetMotionModel.from_unet2d(base_unet, adapter).eval()
    for name, module in list(unet.named_modules()):
        if motion_norm == "per_frame" and re.search(r"motion_modules\.\d+$", name):
            module.norm = PerFrame(module.norm)
        if spatial_norm == "joint" and ".resnets." in name and hasattr(module, "norm1"):
            module.norm1, module.norm2 = Joint(module.norm1), Joint(module.norm2)
    if spatial_norm == "joint":
        unet.conv_norm_out = Joint(unet.conv_norm_out)
    return unet


@pytest.mark.parametrize("motion_norm", ["joint", "per_frame"])
@pytest.mark.parametrize("spatial_norm", ["joint", "per_frame"])
def test_norms(base, adapter, motion_norm, spatial_norm):
    model = load_model(base, adapter, settings=Settings(motion_norm=motion_norm, spatial_norm=spatial_norm))
    x = np.random.default_rng(0).standard_normal((2, FRAMES, 6, 4, 4), np.float32)
    x += np.arange(FRAMES, dtype=np.float32)[None, :, None, None, None]  # frames unlike each other, so that the statistics differ
    text = np.random.default_rng(1).standard_normal((2, 5, 24), np.float32)
    ours = jax.jit(lambda p: model.networks.unet.apply({"params": p}, x, np.array([7, 7]), text))(model.params["unet"])
    network = theirs(reference.unet(), reference.adapter(), motion_norm, spatial_norm)
    with torch.inference_mode():
        states = torch.tensor(text).repeat_interleave(FRAMES, 0)
        want = network(torch.tensor(x).permute(0, 4, 1, 2, 3), 7, states).sample.permute(0, 2, 3, 4, 1)
    reference.close(ours, want)


def test_what_a_file_was_trained_with_is_told_to_who_computes_otherwise(base, adapter, tmp_path, caplog):
    raw, tensors, _ = motion_source(adapter)
    trained = {"joint": {"motion_norm": "joint", "spatial_norm": "per_frame"}, "own": {"motion_norm": "per_frame"}, "unsaid": {}}
    for name, header in trained.items():
        (tmp_path / name).mkdir()
        write_adapter(tensors, raw, tmp_path / name, header)
        write_original(tensors, tmp_path / f"{name}.safetensors", header)
    said = lambda path, **norms: (caplog.clear(), load_model(base, path, settings=Settings(**norms)), caplog.text)[-1]
    with caplog.at_level("INFO"):
        assert "--motion_norm per_frame computes them so" in said(tmp_path / "own")
        assert "--motion_norm joint" in said(tmp_path / "joint", motion_norm="per_frame")
        assert "norm" not in said(tmp_path / "joint") + said(tmp_path / "own", motion_norm="per_frame")
    norms = {path.name: recognise(path).norms for path in tmp_path.iterdir()}
    assert norms == {
        **trained, "unsaid.safetensors": {"motion_norm": "per_frame"},
        **{f"{name}.safetensors": trained[name] for name in ("joint", "own")},
    }  # fmt: skip
    assert merged_adapter(tmp_path / "own", [])[2]["motion_norm"] == "per_frame"


def test_strength(base, adapter):
    """At zero the image model, at one the modules as they are, and between and beyond in proportion within one module."""
    x = np.random.default_rng(0).standard_normal((1, FRAMES, 6, 4, 4), np.float32)
    text = np.random.default_rng(1).standard_normal((1, 5, 24), np.float32)

    def run(scale, motion=adapter, out=1.0):
        """out: factor of the layers that motion modules end with, which makes what they add so many times as large."""
        model = load_model(base, motion, settings=Settings(motion_scale=scale))
        ends = lambda key: is_motion(key) and ".proj_out." in key
        params = unflatten({k: v * out if ends(k) else v for k, v in flatten(model.params["unet"]).items()})
        return np.asarray(jax.jit(lambda p: model.networks.unet.apply({"params": p}, x, np.array([7]), text))(params))

    np.testing.assert_allclose(run(0.0), run(1.0, None), rtol=1e-5, atol=1e-5)
    for scale in (0.5, 2.0):
        np.testing.assert_allclose(run(scale), run(1.0, out=scale), rtol=1e-4, atol=1e-4)
        assert np.abs(run(scale) - run(1.0)).max() > 0.01


@pytest.mark.parametrize("case", ["far from zero", "a corner unlike the rest", "frames unlike each other"])
def test_group_norm_loses_no_digits(case):
    """Against float64, where sums of squares would lose them."""
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 6, 16)).astype(np.float32)
    if case == "far from zero":
        x += 300
    elif case == "a corner unlike the rest":
        x[..., 0, 0, :] = 100
    else:
        x += 100 * np.arange(3, dtype=np.float32)[:, None, None, None]
    for axes in ((-3, -2), (-4, -3, -2)):
        wide = x.astype(np.float64).reshape(*x.shape[:-1], 4, 4)
        over = (*(axis - 1 for axis in axes), -1)
        expected = (wide - wide.mean(over, keepdims=True)) / np.sqrt(wide.var(over, keepdims=True) + 1e-5)
        ours = group_norm(jnp.asarray(x), jnp.ones(16), jnp.zeros(16), 4, 1e-5, axes)
        np.testing.assert_allclose(ours, expected.reshape(x.shape), atol=1e-4 if case == "far from zero" else 2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_that_of_torch(dtype):
    x = np.linspace(-9, 9, 4001, dtype=np.float32)
    theirs = torch.nn.functional.gelu(torch.tensor(x).to(getattr(torch, dtype))).float()
    ours = np.asarray(gelu(jnp.asarray(x, dtype)), np.float32)
    np.testing.assert_allclose(ours, theirs, rtol=0 if dtype == "float32" else 2**-7, atol=2e-6)
