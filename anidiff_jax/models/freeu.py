"""FreeU (Si et al., 2023, arXiv:2309.11497): in the first two up blocks more of what comes from below, less of the skips' lowest waves."""

import jax.numpy as jnp

STAGES = 2  # up blocks that it acts in


def freeu(x, skip, stage: int, factors):
    """x, skip (…, h, w, c) before they are joined in the up block `stage`; factors (4,): s1, s2, b1, b2."""
    half = x.shape[-1] // 2
    x = x.at[..., :half].multiply(factors[STAGES + stage].astype(x.dtype))
    skip32 = skip.astype(jnp.float32)
    return x, (skip32 + (factors[stage] - 1) * lowest_waves(skip32)).astype(skip.dtype)


def lowest_waves(x):
    """Of x (…, h, w, c), per channel: the mean and the first negative frequency along both axes, the waves that the paper's code scales."""
    by_height, by_width = _projection(x.shape[-3]), _projection(x.shape[-2])
    along = lambda p, q: jnp.einsum("hi,wj,...ijc->...hwc", p, q, x, precision="highest")
    return along(by_height.real, by_width.real) - along(by_height.imag, by_width.imag)


def _projection(n: int):
    """(n, n) complex: onto exp(2πi k y / n) for k = 0 and -1."""
    k, apart = -jnp.arange(min(2, n)), jnp.arange(n)[:, None] - jnp.arange(n)
    return jnp.exp(2j * jnp.pi / n * k[:, None, None] * apart).sum(0) / n
