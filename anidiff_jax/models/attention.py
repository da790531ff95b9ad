"""Scaled dot-product attention, in the form that is fastest for the shape and the device."""

from functools import partial

import jax
import jax.numpy as jnp

CHUNK_ABOVE = 256 * 1024  # logits of one head above which a CPU is faster, and smaller, one head at a time
MOST_LOGITS = 512 * 1024 * 1024  # of all heads, below which another device takes them at once; vmap shows one clip of several
PACKED_LENGTH, MOST_EXAMPLES = 128, 65_535  # heads times length, one tile of cuDNN's kernel, whose grid has no place for more examples
LOGITS_AT_ONCE = 4 * 1024 * 1024  # of a head on a CPU: so they stay in the cache
LOGITS_AT_ONCE_ELSEWHERE = 64 * 1024 * 1024  # a quarter of a gigabyte: images beyond 700² in the VAE


def attend(q, k, v, kind: str = "auto", causal: bool = False):
    """softmax(q kᵀ / sqrt(d)) v for q (b, s, h, d) and k, v (b, t, h, d) → (b, s, h, d); softmax in float32.

    kind: xla      all heads at once, logits kept for the backward pass
          chunked  one head of one example at a time, of many logits some of its queries; they are recomputed in the backward pass
          cudnn    the GPU's fused kernel; float16 and bfloat16 only
          packed   that kernel for short sequences, without gradients: an example's heads in one row, where each sees its own
          auto     cudnn or packed where they apply, else chunked where the logits are large, else xla
    """
    if kind == "auto" or (kind == "cudnn" and not _fits(q.shape, q.dtype)):
        kind = choose(q.shape, k.shape[1], q.dtype)
    if kind == "packed":
        return _packed(q, k, v, causal)
    if kind == "cudnn":
        return _fused(q, k, v, causal)
    return _attend(q, k, v, kind == "chunked", causal)


def _fused(q, k, v, causal: bool):
    """cuDNN's kernel; at odd lengths, such as a text's 77 tokens, gradients are those of the other kinds: JAX refuses the kernel's."""
    odd = q.shape[1] % 2 or k.shape[1] % 2
    return _fused_at_odd_lengths(q, k, v, causal) if odd else _cudnn(q, k, v, causal)


def _cudnn(q, k, v, causal: bool):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


_fused_at_odd_lengths = jax.custom_vjp(_cudnn, nondiff_argnums=(3,))


def _backward_of_others(causal, qkv, dy):
    return jax.vjp(lambda q, k, v: attend(q, k, v, _by_size(q.shape, k.shape[1]), causal), *qkv)[1](dy)


_fused_at_odd_lengths.defvjp(lambda q, k, v, causal: (_cudnn(q, k, v, causal), (q, k, v)), _backward_of_others)


def _packed_row(q, k, v, causal: bool):
    """The kernel works on 64 or 128 queries at a time. Sixteen frames of eight heads are 128, and lie in memory as it wants them."""
    row = lambda x: x.reshape(x.shape[0], -1, 1, x.shape[-1])  # b s h d -> b (s h) 1 d
    place = lambda x: jnp.divmod(jnp.arange(x.shape[1] * x.shape[2]), x.shape[2])
    (frame, head), (other_frame, other_head) = place(q), place(k)
    seen = head[:, None] == other_head
    if causal:
        seen &= frame[:, None] >= other_frame
    return jax.nn.dot_product_attention(row(q), row(k), row(v), mask=seen[None, None], implementation="cudnn").reshape(q.shape)


# Where there are gradients it is as fast as XLA's products or slower, and would compute one by the mask: there, those are taken.
_packed = jax.custom_vjp(_packed_row, nondiff_argnums=(3,))
_packed.defvjp(lambda q, k, v, causal: jax.vjp(lambda q, k, v: attend(q, k, v, "xla", causal), q, k, v), lambda causal, pull, dy: pull(dy))


@partial(jax.jit, static_argnums=(3, 4))  # traced once for each shape, however many layers have that
def _attend(q, k, v, chunked: bool, causal: bool):
    b, s, h, d = q.shape
    merge = lambda x: x.swapaxes(1, 2).reshape(b * h, x.shape[1], d)  # b s h d -> (b h) s d
    if chunked:
        turned = lambda x: x.transpose(0, 2, 3, 1).reshape(b * h, d, x.shape[1])  # b t h d -> (b h) d t
        y = jax.lax.map(lambda head: _attend_in_chunks(head[0], head[1], head[2], causal), (merge(q), turned(k), turned(v)))
    else:
        y = _attend_head(merge(q), merge(k), merge(v), causal)
    return y.reshape(b, h, s, d).swapaxes(1, 2)  # (b h) s d -> b s h d


def _attend_in_chunks(q, k, v, causal: bool):
    """q (s, d), k and v (d, t): as many queries at a time as divide s and have no more logits than LOGITS_AT_ONCE.

    k and v lie so because their gradients are then products that a CPU does three times as fast.
    """
    (s, d), t = q.shape, k.shape[1]
    least = min(s, -(-s * t // (LOGITS_AT_ONCE if jax.default_backend() == "cpu" else LOGITS_AT_ONCE_ELSEWHERE)))
    chunks = next(n for n in range(least, s + 1) if s % n == 0)
    some = jax.checkpoint(lambda first, q: _attend_head(q, k, v, causal, first, "dt"))
    if chunks == 1:
        return some(0, q)
    return jax.lax.map(lambda chunk: some(*chunk), (jnp.arange(0, s, s // chunks), q.reshape(chunks, -1, d))).reshape(s, d)


def choose(shape: tuple[int, ...], keys: int, dtype) -> str:
    """The kind that "auto" stands for, of queries of this shape, (b, s, h, d)."""
    _, queries, heads, _ = shape
    fits = _fits(shape, dtype)
    if fits and queries > 64:
        return "cudnn"
    if fits and max(queries, keys) * heads <= PACKED_LENGTH and heads % 2 == 0:
        return "packed"
    return _by_size(shape, keys)


def _fits(shape: tuple[int, ...], dtype) -> bool:
    """Whether cuDNN's kernel takes such queries, (b, s, h, d)."""
    examples, _, _, head_dim = shape
    return head_dim % 8 == 0 and head_dim <= fused_limit() and examples <= MOST_EXAMPLES and dtype in (jnp.float16, jnp.bfloat16)


def _by_size(shape: tuple[int, ...], keys: int) -> str:
    """Short sequences, such as the frames of a clip, are one batched product anywhere."""
    examples, queries, heads, _ = shape
    many = jax.default_backend() == "cpu" or examples * heads * queries * keys > MOST_LOGITS
    return "chunked" if many and queries * keys > CHUNK_ABOVE else "xla"


def fused_limit() -> int:
    """The widest head that cuDNN's kernel takes, with gradients: 256 on Hopper, 128 on other GPUs from Ampere on, none before those.

    Blackwell's takes wider heads forward only, which JAX does not check.
    """
    if jax.default_backend() != "gpu":
        return 0
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    generation = float(capability) if capability[:1].isdigit() else 0
    return 256 if 9 <= generation < 10 else 128 if generation >= 8 else 0


def _attend_head(q, k, v, causal: bool, first=0, keys: str = "td"):
    """q (..., s, d), of all queries those from `first` on; k, v (..., t, d), or (..., d, t) as `keys` says."""
    precision = "highest" if q.dtype == jnp.float32 else None
    scale = q.shape[-1] ** -0.5
    if exact := q.dtype == jnp.float32:  # else the scale would be rounded, and then the queries again
        q = q * scale
    logits = jnp.einsum(f"...sd,...{keys}->...st", q, k, precision=precision, preferred_element_type=jnp.float32)
    logits = logits if exact else logits * scale
    if causal:
        logits = jnp.where(first + jnp.arange(logits.shape[-2])[:, None] >= jnp.arange(logits.shape[-1]), logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum(f"...st,...{keys}->...sd", weights, v, precision=precision)
