"""Attention in chunks, and all at once, against PyTorch's: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from anidiff_jax.models import attention
from anidiff_jax.models.attention import attend


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
