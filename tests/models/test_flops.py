"""Operations are counted as they are by hand, and as they are known for the real model."""

import jax
import jax.numpy as jnp
import pytest

from anidiff_jax.models import attention
from anidiff_jax.models.config import fresh_motion_config, unet_config
from anidiff_jax.models.flops import count_flops
from anidiff_jax.models.init import shapes
from anidiff_jax.models.layers import Settings
from anidiff_jax.models.unet import UNet
from anidiff_jax.weights.tree import merge, split

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


def test_by_hand():
    assert count_flops(jnp.matmul, array(3, 4), array(4, 5)) == 2 * 3 * 4 * 5
    assert count_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), array(7, 3, 4), array(7, 4, 5)) == 7 * 2 * 3 * 4 * 5
    convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count_flops(convolve, array(2, 8, 8, 3), array(3, 3, 3, 5)) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert count_flops(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=6)[0], array(4, 4)) == 6 * 2 * 4**3
    assert count_flops(jax.jit(lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a)), array(4, 4)) == 2 * 4**3
    assert count_flops(jax.checkpoint(lambda a: a @ a), array(4, 4)) == 2 * 4**3
    assert count_flops(jax.grad(lambda a, b: (a @ b).sum()), array(3, 4), array(4, 5)) == 2 * 2 * 3 * 4 * 5  # and the forward pass


def forward_and_training(config, heads, latents):
    """(FLOP of a forward pass, function of a pattern: of an update of the parameters that hold it, as a multiple)"""
    unet = UNet(unet_config(config, fresh_motion_config(config, heads=heads, max_frames=32)), Settings(fast=False))
    params, inputs = shapes(unet), (latents, array(1), array(1, 77, config["cross_attention_dim"]))
    forward = count_flops(lambda p, *inputs: unet.apply({"params": p}, *inputs), params, *inputs)

    def training(pattern):
        trained, frozen = split(params, lambda key: pattern in key and not key.endswith(".pe"))
        loss = lambda trained, frozen, *inputs: unet.apply({"params": merge(frozen, trained)}, *inputs).sum()
        return count_flops(jax.grad(loss), trained, frozen, *inputs) / forward

    return forward, training


def test_stable_diffusion_with_motion_modules():
    """16 frames at 256²: 4.11 TFLOP, less 1 % as the text's keys and values are made once, not for every frame."""
    assert forward_and_training(SD15, 8, array(1, 16, 32, 32, 4))[0] == pytest.approx(0.99 * 4.11e12, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_what_is_counted_does_not_depend_on_the_device(monkeypatch, backend, dtype):
    """Not on its fast forms either: Winograd's, those of doubled images, the fused attention, which shows no operations at all."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(attention, "fused_limit", lambda: 256 if backend == "gpu" else 0)
    config = fresh_motion_config(SD15, heads=8, max_frames=32)

    def count(**settings):
        unet = UNet(unet_config(SD15, config), Settings(dtype=dtype, **settings))
        ask = lambda p, *inputs: unet.apply({"params": p}, *inputs)
        return count_flops(ask, shapes(unet), array(1, 16, 32, 32, 4), array(1), array(1, 77, 768))

    assert count(fast=False) == pytest.approx(0.99 * 4.11e12, rel=0.01)
    if dtype == "float32":
        assert count() < 0.98 * count(fast=False)


def test_no_backward_pass_below_what_trains():
    small = {**SD15, "block_out_channels": [32, 64], "cross_attention_dim": 24, "layers_per_block": 1}
    small |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    _, training = forward_and_training(small, 2, array(1, 8, 16, 16, 4))
    last, motion, everything = training("up_blocks.1.motion_modules.1"), training("motion_modules"), training("")
    assert last < 1.3
    assert 2.0 < motion < 2.6
    assert 2.8 < everything < 3.1
