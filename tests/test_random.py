"""Keys for dropout look random, in each draw and from one draw to another."""

from functools import reduce

import jax
import numpy as np
import pytest

from anidiff_jax.models.layers import chosen
from anidiff_jax.random import purpose, quick

DRAWS = (100, 40, 500)  # keys, rows, columns


def keys(how: str):
    if how == "of neighbouring clips":
        return jax.vmap(lambda i: quick(jax.random.fold_in(purpose(1, "clip"), i)))(np.arange(DRAWS[0]))
    if how == "of neighbouring layers":
        return jax.vmap(lambda i: jax.random.fold_in(quick(jax.random.key(0)), i))(np.arange(DRAWS[0]))
    return jax.random.split(quick(jax.random.key(2)), DRAWS[0])


@pytest.mark.parametrize("how", ["of neighbouring clips", "of neighbouring layers", "of a split"])
def test_quick_keys_look_random(how):
    """Each figure has a normal distribution of deviation 1, were the draws random."""
    numbers = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, DRAWS[1:]))(keys(how)), np.float64)
    z = (numbers - 0.5) * np.sqrt(12)
    assert abs(z.mean()) * np.sqrt(z.size) < 4
    assert abs((z**2).mean() - 1) * np.sqrt(z.size / 0.8) < 4
    for axis in range(3):
        for apart in (1, 2, 3, 8):
            one, other = np.delete(z, np.s_[:apart], axis), np.delete(z, np.s_[-apart:], axis)
            assert abs((one * other).mean()) * np.sqrt(one.size) < 4, (axis, apart)
    deep = np.floor(numbers * 2**23).astype(np.int64)
    for bit in range(23):
        assert abs((deep >> bit & 1).mean() - 0.5) * 2 * np.sqrt(z.size) < 4.5, bit
    assert len(np.unique(jax.random.key_data(keys(how)), axis=0)) == DRAWS[0]


def test_quick_keys_follow_their_key():
    draw = lambda seed: np.asarray(chosen(quick(jax.random.key(seed)), 0.9, (2000,)))
    np.testing.assert_array_equal(draw(3), draw(3))
    assert 0.7 < (draw(3) == draw(4)).mean() < 0.9  # 0.82
    assert draw(3).mean() == pytest.approx(0.9, abs=0.03)


def test_the_order_of_numbers_matters():
    key, data = quick(jax.random.key(0)), jax.random.key_data
    of = lambda *numbers: data(reduce(jax.random.fold_in, numbers, key)).tolist()
    assert len({tuple(of(*numbers)) for numbers in ((1, 2), (2, 1), (1, 1), (2, 2), (1,), (2,), ())}) == 7
    nested = data(jax.vmap(lambda key: jax.random.split(key, 8))(jax.random.split(key, 8))).reshape(64, 2)
    assert len(np.unique(nested, axis=0)) == 64
