"""The forms of a wide 3×3 convolution on a CPU equal PyTorch's, forwards and backwards."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from anidiff_jax.models.convolution import choose, convolve, convolve_doubled
from anidiff_jax.models.flops import count_flops

SAME = ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("frames", "height", "width", "form"),
    [(3, 5, 7, "patches"), (2, 8, 10, "winograd"), (8, 32, 16, "winograd"), (2, 66, 64, "winograd"), (3, 9, 12, "xla")],
)
def test_every_form_equals_torch(frames, height, width, form):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((frames, height, width, 256), np.float32), rng.standard_normal((3, 3, 256, 260), np.float32)
    upstream = rng.standard_normal((frames, height, width, 260), np.float32)
    assert choose(height, width, 256, 260, jnp.float32) == form

    def loss(x, weight):
        y = convolve(x, weight, 1, SAME, "highest")
        return (y * upstream).sum(), y

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, weight)
    theirs = [torch.tensor(a, requires_grad=True) for a in (x.transpose(0, 3, 1, 2).copy(), weight.transpose(3, 2, 0, 1).copy())]
    y = torch.nn.functional.conv2d(*theirs, padding=1)
    (y * torch.tensor(upstream.transpose(0, 3, 1, 2))).sum().backward()
    expected = [y.detach().permute(0, 2, 3, 1), theirs[0].grad.permute(0, 2, 3, 1), theirs[1].grad.permute(2, 3, 1, 0)]
    for a, b in zip([ours, *gradients], expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=5e-6 * float(b.abs().max()))


NONE = ((0, 0), (0, 0))
BELOW = ((0, 1), (0, 1))  # the VAE's
WIDE = ((2, 2), (2, 2))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [((7, 9), 3, 1, SAME), ((8, 9), 3, 2, SAME), ((9, 8), 3, 2, BELOW), ((5, 6), 1, 1, NONE), ((6, 5), 5, 3, WIDE)],
)
def test_gradients_of_the_plain_form_equal_torch(size, kernel, stride, padding):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, *size, 5), np.float32), rng.standard_normal((kernel, kernel, 5, 6), np.float32)
    (top, bottom), (left, right) = padding
    theirs = [torch.tensor(a, requires_grad=True) for a in (x.transpose(0, 3, 1, 2).copy(), weight.transpose(3, 2, 0, 1).copy())]
    y = torch.nn.functional.conv2d(torch.nn.functional.pad(theirs[0], (left, right, top, bottom)), theirs[1], stride=stride)
    upstream = rng.standard_normal(y.shape, np.float32)
    (y * torch.tensor(upstream)).sum().backward()

    loss = lambda x, weight: (convolve(x, weight, stride, padding, "highest") * upstream.transpose(0, 2, 3, 1)).sum()
    dx, dweight = jax.jit(jax.grad(loss, (0, 1)))(x, weight)
    expected = theirs[0].grad.permute(0, 2, 3, 1).numpy(), theirs[1].grad.permute(2, 3, 1, 0).numpy()
    for ours, reference in ((dx, expected[0]), (dweight, expected[1])):
        np.testing.assert_allclose(ours, reference, atol=5e-6 * np.abs(reference).max())
    for again in (loss, jax.checkpoint(loss)):  # alone, and recomputed
        np.testing.assert_array_equal(jax.jit(jax.grad(again))(x, weight), dx)
        np.testing.assert_array_equal(jax.jit(jax.grad(again, 1))(x, weight), dweight)


def test_no_convolution_of_the_backward_pass_is_slow_in_a_loop():
    """XLA's fast code for CPUs takes one form only, and inside of loops nothing brings the others into it."""

    def gradients(x, weight):
        step = jax.grad(lambda x, weight: jnp.square(convolve(x, weight, 1, SAME, "highest")).sum(), (0, 1))
        add = lambda _, total: jax.tree.map(jnp.add, total, step(x, weight))
        return jax.lax.fori_loop(0, jax.lax.optimization_barrier(jnp.int32(2)), add, (x, weight))

    program = jax.jit(gradients).lower(jnp.ones((4, 8, 8, 8)), jnp.ones((3, 3, 8, 8))).compile().as_text()
    forms = re.findall(r"dim_labels=([^, ]+)", program)
    assert len(forms) >= 2
    assert set(forms) == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    ("size", "doubled_to", "multiplied"),
    [((8, 9), (16, 18), 16 * 9 * 10), ((8, 9), (15, 18), 36 * 8 * 9 * 15 / 16), ((3, 5), (6, 10), 36 * 3 * 5)],
)
def test_a_convolution_of_a_doubled_image_equals_torch(size, doubled_to, multiplied):
    """And has 2.25 times fewer multiplications, but for the edges, where the image is not cropped and not tiny."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, *size, 6), np.float32), rng.standard_normal((3, 3, 6, 10), np.float32)
    theirs = [torch.tensor(a, requires_grad=True) for a in (x.transpose(0, 3, 1, 2).copy(), weight.transpose(3, 2, 0, 1).copy())]
    doubled = torch.nn.functional.interpolate(theirs[0], scale_factor=2.0, mode="nearest")[..., : doubled_to[0], : doubled_to[1]]
    y = torch.nn.functional.conv2d(doubled, theirs[1], padding=1)
    upstream = rng.standard_normal(y.shape, np.float32)
    (y * torch.tensor(upstream)).sum().backward()

    ours = jax.jit(lambda x, weight: convolve_doubled(x, weight, doubled_to, "highest"))
    loss = lambda x, weight: (ours(x, weight) * upstream.transpose(0, 2, 3, 1)).sum()
    found = [ours(x, weight), *jax.jit(jax.grad(loss, (0, 1)))(x, weight)]
    expected = [y.detach().permute(0, 2, 3, 1), theirs[0].grad.permute(0, 2, 3, 1), theirs[1].grad.permute(2, 3, 1, 0)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=5e-6 * float(b.abs().max()))
    assert count_flops(ours, x, weight) == 2 * 3 * 6 * 10 * multiplied
    kept = {leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda x: ours(x, weight), x)[1])}
    assert weight.shape in kept
    assert not any(shape[-1] == 4 * 10 for shape in kept)  # the weights of the four convolutions are made again


def test_narrow_or_not_float32_stays_with_xla():
    assert choose(16, 16, 96, 256, jnp.float32) == "xla"
    assert choose(16, 16, 256, 256, jnp.bfloat16) == "xla"
