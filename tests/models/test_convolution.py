"""The forms of a wide 3×3 convolution on a CPU equal PyTorch's, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from anidiff_jax.models.convolution import choose, convolve

SAME = ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("frames", "height", "width", "form"), [(3, 5, 7, "patches"), (2, 8, 10, "winograd"), (8, 32, 16, "winograd"), (3, 9, 12, "xla")]
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


def test_narrow_or_not_float32_stays_with_xla():
    assert choose(16, 16, 96, 256, jnp.float32) == "xla"
    assert choose(16, 16, 256, 256, jnp.bfloat16) == "xla"
