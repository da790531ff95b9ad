"""What only a GPU computes, as far as it can be seen without one: that its programs come about, and what its fused kernel is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from anidiff_jax.models import attention
from anidiff_jax.models.config import fresh_motion_config, unet_config
from anidiff_jax.models.init import shapes
from anidiff_jax.models.layers import Settings
from anidiff_jax.models.unet import UNet
from anidiff_jax.random import quick
from anidiff_jax.weights.tree import unflatten

RAW = {
    "attention_head_dim": 4, "block_out_channels": (32, 64), "cross_attention_dim": 24, "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "layers_per_block": 1, "norm_num_groups": 8, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """Our code and JAX's take this machine for one with a Hopper GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "fused_limit", lambda: 256)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda least: float(least) <= 9.0)


@pytest.fixture
def kernel(monkeypatch):
    """JAX's own attention in the kernel's place, which has gradients at even lengths only, and none with a mask; gives the lengths that it
    saw."""
    real, seen = jax.nn.dot_product_attention, []

    def fused(q, k, v, *, implementation, is_causal=False, mask=None):
        assert implementation == "cudnn"
        seen.append((q.shape[1], k.shape[1]))
        of = jax.custom_vjp(lambda *qkv: real(*qkv, is_causal=is_causal, mask=mask, implementation="xla"))

        def backward(qkv, dy):
            assert q.shape[1] % 2 == k.shape[1] % 2 == 0
            assert mask is None
            return jax.vjp(lambda *qkv: real(*qkv, is_causal=is_causal, mask=mask, implementation="xla"), *qkv)[1](dy)

        of.defvjp(lambda *qkv: (of(*qkv), qkv), backward)
        return of(q, k, v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    monkeypatch.setattr(attention, "_fits", lambda shape, dtype: True)  # this one takes float32 too
    return seen


@pytest.mark.parametrize(
    ("queries", "keys", "kind", "causal"),
    [
        (6, 4, "cudnn", False), (6, 5, "cudnn", False), (7, 4, "cudnn", False), (7, 7, "cudnn", False), (7, 7, "cudnn", True),
        (6, 6, "packed", False), (7, 5, "packed", False), (6, 6, "packed", True),
    ],
)  # fmt: skip
def test_lengths_that_the_fused_kernel_does_not_take(kernel, queries, keys, kind, causal):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 4, 8), np.float32)) for n in (queries, keys, keys))
    outer = jnp.asarray(rng.standard_normal(q.shape, np.float32))

    def of(kind):
        loss = lambda q, k, v: (outer * attention.attend(q, k, v, kind, causal)).sum()
        each = jax.vmap(lambda *qkv: attention.attend(*(x[None] for x in qkv), kind, causal)[0])(q, k, v)
        return attention.attend(q, k, v, kind, causal), each, jax.grad(loss, (0, 1, 2))(q, k, v)

    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-6), of(kind), of("xla"))
    heads = 4 if kind == "packed" else 1
    assert set(kernel) == {(queries * heads, keys * heads)}


@pytest.mark.parametrize(("height", "width"), [(24, 16), (22, 14)])
@pytest.mark.parametrize("clips", [1, 2])
def test_an_update_becomes_a_program_for_a_gpu(gpu, height, width, clips):
    """bfloat16, the fused kernel, checkpointing, dropout. JAX refuses the kernel's gradient at odd lengths: 77 tokens, 11 × 7 positions."""
    network = UNet(
        unet_config(RAW, fresh_motion_config(RAW, heads=4, max_frames=8)), Settings(dtype="bfloat16", remat=True, lora_dropout=0.1)
    )
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), shapes(network))
    layer = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
    lora = unflatten({f"{layer}.lora_{x}.weight": jax.ShapeDtypeStruct(s, "float32") for x, s in (("A", (32, 2)), ("B", (2, 32)))})

    def loss(lora, params, x, text, keys):
        ask = lambda x, text, key: network.apply(
            {"params": params, "lora": lora}, x[None], jnp.array([5]), text[None], rngs={"dropout": quick(key)}
        )
        return jax.vmap(ask)(x, text, keys).mean()

    given = [jax.ShapeDtypeStruct((clips, *shape), "float32") for shape in ((8, height, width, 4), (77, 24))]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), clips))
    program = jax.jit(jax.grad(loss)).trace(lora, params, *given, keys).lower(lowering_platforms=("cuda",)).as_text()
    # Spatial attentions behind the adapter: two at the upper level, four deeper, where 22 × 14 leaves an odd number of positions.
    assert program.count("__cudnn$fmhaSoftmaxBackward") == (6 if height == 24 else 2)
    assert "BiasSoftmax" not in program  # attention over time has the gradients of XLA's products
