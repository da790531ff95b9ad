"""Attention in chunks, and all at once, against PyTorch's: values and gradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from anidiff_jax.models import attention
from anidiff_jax.models.attention import attend, choose


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(("kind", "at_once"), [("xla", 10**9), ("chunked", 10**9), ("chunked", 15 * 9), ("chunked", 1)])
def test_values_and_gradients_are_those_of_torch(kind, at_once, causal, monkeypatch):
    """15 queries: whole heads, five at a time, one by one."""
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", at_once)
    attention._attend.clear_cache()  # the limit is read while tracing
    rng = np.random.default_rng(0)
    shape = lambda length: (2, length, 3, 8)
    q, k, v, dy = (rng.normal(size=shape(n)).astype(np.float32) for n in (15, 15 if causal else 27, 15 if causal else 27, 15))
    theirs = [torch.tensor(x.transpose(0, 2, 1, 3), requires_grad=True) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=causal)
    expected.backward(torch.tensor(dy.transpose(0, 2, 1, 3)))
    ours, back = jax.vjp(lambda q, k, v: attend(q, k, v, kind, causal), *map(jnp.asarray, (q, k, v)))
    bshd = lambda x: x.detach().numpy().transpose(0, 2, 1, 3)
    np.testing.assert_allclose(ours, bshd(expected), rtol=1e-5, atol=1e-6)
    for own, x in zip(back(jnp.asarray(dy)), theirs, strict=True):
        np.testing.assert_allclose(own, bshd(x.grad), rtol=1e-4, atol=1e-6)


def test_chunks_keep_memory_within_their_limit():
    """Of 4096 positions, 512²: sixteen megabytes of logits at a time, not the sixty-four of a head."""
    x = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    compiled = jax.jit(lambda q, k, v: attend(q, k, v, "chunked")).lower(x, x, x).compile()
    assert 16e6 < compiled.memory_analysis().temp_size_in_bytes < 50e6


def test_many_logits_are_taken_in_parts_on_other_devices_too(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 15, 3, 8)), jnp.float32) for _ in range(3))
    expected = attend(q, k, v, "xla")
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE_ELSEWHERE", 5 * 15)
    attention._attend.clear_cache()
    text = str(jax.make_jaxpr(lambda q, k, v: attend(q, k, v, "chunked"))(q, k, v))
    assert "length=3" in text  # of 15 queries, five at a time
    np.testing.assert_allclose(attend(q, k, v, "chunked"), expected, rtol=1e-5, atol=1e-6)
    attention._attend.clear_cache()


def test_cudnn_is_left_where_there_are_too_many_examples(monkeypatch):
    monkeypatch.setattr(attention, "fused_limit", lambda: 256)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for length, kind in ((16, "packed"), (80, "cudnn")):
        assert choose((65_535, length, 8, 40), length, jnp.bfloat16) == kind
        assert choose((65_536, length, 8, 40), length, jnp.bfloat16) not in ("packed", "cudnn")


def test_cudnn_is_left_where_it_cannot_be_had(monkeypatch):
    """In float32, and in heads of a width that its kernel does not know: the kind that would have been chosen, not an error of JAX."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 128, 2, 12)), jnp.float32)
    monkeypatch.setattr(attention, "fused_limit", lambda: 256)
    for dtype, head in (("float32", 8), ("bfloat16", 12)):
        y = x[..., :head].astype(dtype)
        np.testing.assert_array_equal(attend(y, y, y, "cudnn"), attend(y, y, y, "xla"))


@pytest.mark.parametrize(
    ("backend", "capability", "limit"),
    [
        ("cpu", None, 0), ("tpu", None, 0), ("gpu", "gfx942", 0), ("gpu", "7.5", 0), ("gpu", "8.6", 128), ("gpu", "9.0", 256),
        ("gpu", "10.0", 128), ("gpu", "12.0", 128),
    ],
)  # fmt: skip
def test_how_wide_the_heads_of_cudnn_may_be(monkeypatch, backend, capability, limit):
    """Blackwell's kernel has gradients of heads up to 128 only."""
    monkeypatch.setattr(attention.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(attention.jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert attention.fused_limit() == limit
