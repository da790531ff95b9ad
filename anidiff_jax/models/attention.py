"""Scaled dot-product attention, in the form that is fastest for the shape and the device."""

from functools import partial

import jax
import jax.numpy as jnp

CHUNK_ABOVE = 256 * 1024  # logits of one head above which a CPU is faster, and smaller, one head at a time


def attend(q, k, v, kind: str = "auto", causal: bool = False):
    """softmax(q kᵀ / sqrt(d)) v for q (b, s, h, d) and k, v (b, t, h, d) → (b, s, h, d); softmax in float32.

    kind: xla      all heads at once, logits kept for the backward pass
          chunked  one head of one example at a time, logits recomputed in the backward pass: memory of one head
          cudnn    the GPU's fused kernel; float16 and bfloat16 only
          auto     cudnn where it applies, else chunked where the logits are large, else xla
    """
    if kind == "auto" or (kind == "cudnn" and q.shape[-1] > fused_limit()):
        kind = choose(q.shape[1], k.shape[1], q.shape[-1], q.dtype)
    if kind == "cudnn":
        return _fused(q, k, v, causal)
    return _attend(q, k, v, kind == "chunked", causal)


def _fused(q, k, v, causal: bool):
    """cuDNN's kernel. JAX refuses its gradient at odd lengths, such as a text's 77 tokens: those get one more, which nothing looks at."""
    length, odd = q.shape[1], lambda x: x.shape[1] % 2
    if not odd(q) and not odd(k):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    even = lambda x: jnp.pad(x, ((0, 0), (0, odd(x)), (0, 0), (0, 0)))
    lengths = lambda x: jnp.where(x[:, 0, 0, 0] == 0, x.shape[1], x.shape[1])  # a constant, but one that vmap batches as it does x
    attended = jax.nn.dot_product_attention(
        even(q), even(k), even(v), is_causal=causal, query_seq_lengths=lengths(q), key_value_seq_lengths=lengths(k), implementation="cudnn"
    )
    return attended[:, :length]


@partial(jax.jit, static_argnums=(3, 4))  # traced once for each shape, however many layers have that
def _attend(q, k, v, chunked: bool, causal: bool):
    b, s, h, d = q.shape
    merge = lambda x: x.swapaxes(1, 2).reshape(b * h, x.shape[1], d)  # b s h d -> (b h) s d
    one_head = lambda qkv: _attend_head(qkv[0], qkv[1], qkv[2], causal)
    q, k, v = merge(q), merge(k), merge(v)
    y = jax.lax.map(jax.checkpoint(one_head), (q, k, v)) if chunked else one_head((q, k, v))
    return y.reshape(b, h, s, d).swapaxes(1, 2)  # (b h) s d -> b s h d


def choose(queries: int, keys: int, head_dim: int, dtype) -> str:
    """The kind that "auto" stands for. Short sequences, such as the frames of a clip, are one batched product anywhere."""
    fits = head_dim % 8 == 0 and head_dim <= fused_limit() and dtype in (jnp.float16, jnp.bfloat16)
    if fits and queries > 64:
        return "cudnn"
    return "chunked" if queries * keys > CHUNK_ABOVE else "xla"


def fused_limit() -> int:
    """The widest head that cuDNN's kernel takes: 256 on Hopper and later, 128 before, none without an NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return 0
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "0"))
    return 0 if not capability[0].isdigit() else 256 if float(capability) >= 9 else 128


def _attend_head(q, k, v, causal):  # (..., s, d), (..., t, d), (..., t, d)
    precision = "highest" if q.dtype == jnp.float32 else None
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    logits = jnp.einsum("...sd,...td->...st", q, k, precision=precision, preferred_element_type=jnp.float32)
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("...st,...td->...sd", weights, v, precision=precision)
