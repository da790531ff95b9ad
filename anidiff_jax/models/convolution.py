"""Convolution over (n, h, w, c) in the form that is fastest for the shape and the device.

XLA's own convolution is that on GPUs and TPUs. On a CPU it runs slower than XLA's products of matrices, so that wide 3×3
convolutions are better written as such: measured on 2 cores, 1.2 to 1.9 times as fast, with rounding no worse.

A 1×1 convolution is a product anyway, and on a CPU 1.2 to 1.8 times as fast if it is written as one.

A 3×3 convolution of an image that was doubled by its nearest neighbours sees each pixel of the small image several times: it is four
2×2 convolutions of that, with 2.25 times fewer multiplications; on a CPU 1.2 to 2.5 times as fast from 16² on, at 8² about as fast;
on an H100 in bfloat16 1.2 to 1.4 times, but for gradients by the weight, which are slower.

And on a CPU, XLA brings a convolution into the form that its fast code takes only outside of loops. Those that JAX makes for
gradients have another form, and run 15 times slower in the loop over micro-batches; `plain` has gradients in the fast form.

Each form is jitted by itself, so that a network's tracing meets it once for each shape, however many layers have that.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

POSITIONS_AT_ONCE = 1024  # of Winograd's tiles, which are four times the input: so they stay in the cache
POSITIONS_OF_A_BAND = 4096  # larger frames are taken in bands of rows
MOST_POSITIONS = 4 * POSITIONS_OF_A_BAND  # of a frame; where there are more, channels are few, and Winograd loses


def convolve(x, weight, stride: int, padding, precision, fast: bool = True):
    """x (n, h, w, in) and weight (kh, kw, in, out) → (n, h', w', out); padding ((top, bottom), (left, right)) of zeros.

    fast: False takes XLA's own, whatever would be faster.
    """
    if not fast:
        return _xla(x, weight, stride, padding, precision)
    if weight.shape[:2] == (1, 1) and stride == 1:
        return jnp.matmul(x, weight[0, 0], precision=precision)
    same = weight.shape[:2] == (3, 3) and stride == 1 and padding == ((1, 1), (1, 1))
    form = choose(x.shape[1], x.shape[2], weight.shape[2], weight.shape[3], x.dtype) if same else "xla"
    if form != "xla":
        return winograd(x, weight) if form == "winograd" else patches(x, weight)
    return plain(x, weight, stride, padding, precision) if jax.default_backend() == "cpu" else _xla(x, weight, stride, padding, precision)


def convolve_doubled(x, weight, size: tuple[int, int], precision, fast: bool = True):
    """x (n, h, w, in), doubled by its nearest neighbours and cropped to `size`, and weight (3, 3, in, out) → (n, *size, out)."""
    _, h, w, _ = x.shape
    if fast and size == (2 * h, 2 * w) and in_phases(h, w, x.dtype):
        return phases(x, weight, precision)
    return of_doubled(x, weight, size, precision, fast)


def of_doubled(x, weight, size: tuple[int, int], precision, fast: bool = True):
    """The same, the doubled image made first."""
    n, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)
    return convolve(x[:, : size[0], : size[1]], weight, 1, ((1, 1), (1, 1)), precision, fast)


def in_phases(height: int, width: int, dtype) -> bool:
    """Whether a doubled image's convolution is faster as four of the image itself."""
    device = jax.default_backend()
    return height * width >= 64 and (device == "gpu" or (device == "cpu" and dtype == jnp.float32))


def _xla(x, weight, stride: int, padding, precision):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, weight, (stride, stride), padding, dimension_numbers=dimensions, precision=precision)


def choose(height: int, width: int, inputs: int, outputs: int, dtype) -> str:
    """The fastest form of a 3×3 convolution at stride 1 that keeps the size: xla, winograd or patches."""
    positions = height * width
    if jax.default_backend() != "cpu" or dtype != jnp.float32 or min(inputs, outputs) < 256:
        return "xla"
    if positions < 64:
        return "patches"
    return "winograd" if height % 2 == width % 2 == 0 and positions <= MOST_POSITIONS else "xla"


_plain = jax.custom_vjp(_xla, nondiff_argnums=(2, 3, 4))


def _plain_forward(x, weight, stride, padding, precision):
    y = _xla(x.value, weight.value, stride, padding, precision)
    return y, (x.value if weight.perturbed else x.value[:0], weight.value if x.perturbed else weight.value[..., :0])  # empty: not needed


def _plain_backward(stride, padding, precision, kept, dy):
    x, weight = kept
    (n, *_, out), (_, h, w, c), (kh, kw, *_) = dy.shape, x.shape, weight.shape
    dx, dweight = jnp.zeros((n, h, w, c), dy.dtype), jnp.zeros((kh, kw, c, out), dy.dtype)
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return dx, dweight
    spread = jax.lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), (0, 0, stride - 1), (0, 0, stride - 1), (0, 0, 0)))
    (top, bottom), (left, right) = padding
    if weight.size:  # every input position gathers the outputs that it took part in: the kernel turned round
        rows, columns = (kh - 1 - top, h + top - spread.shape[1]), (kw - 1 - left, w + left - spread.shape[2])
        dx = _xla(spread, weight[::-1, ::-1].swapaxes(2, 3), 1, (rows, columns), precision)
    if x.size:  # the outputs are the kernel, the examples the channels
        lhs, rhs = x.transpose(3, 1, 2, 0), spread.transpose(1, 2, 0, 3)  # n h w c -> c h w n; n h w o -> h w n o
        bottom, right = kh - 1 + spread.shape[1] - h - top, kw - 1 + spread.shape[2] - w - left
        dweight = _xla(lhs, rhs, 1, ((top, bottom), (left, right)), precision).transpose(1, 2, 0, 3)  # c kh kw o -> kh kw c o
    return dx, dweight


_plain.defvjp(_plain_forward, _plain_backward, symbolic_zeros=True)
plain = jax.jit(_plain, static_argnums=(2, 3, 4))


@partial(jax.jit, static_argnums=2)
@partial(jax.checkpoint, static_argnums=2)  # for the backward pass the weight is kept, not the four made of it
def phases(x, weight, precision):
    """Of a doubled image: an output sees two pixels of x a side, its own and, even, the one before, or, odd, the next."""
    n, h, w, c = x.shape
    weights = jnp.stack([column for row in _phase_lines(weight, 0) for column in _phase_lines(row, 1)], axis=3)  # 2 2 c 4 o
    y = convolve(x, weights.reshape(2, 2, c, -1), 1, ((1, 1), (1, 1)), precision).reshape(n, h + 1, w + 1, 4, -1)
    phase = lambda i, j: y[:, i : i + h, j : j + w, 2 * i + j]
    rows = [jnp.stack([phase(i, j) for j in range(2)], axis=3) for i in range(2)]  # 2 of (n, h, w, 2, out)
    return jnp.stack(rows, axis=2).reshape(n, 2 * h, 2 * w, -1)  # (n, h, 2, w, 2, out)


def _phase_lines(weight, axis: int):  # of even outputs and of odd ones: the 3 weights that meet 2 pixels
    a, b, c = (jax.lax.slice_in_dim(weight, i, i + 1, axis=axis) for i in range(3))
    return jnp.concatenate([a, b + c], axis), jnp.concatenate([a + b, c], axis)


@jax.jit
def patches(x, weight):
    """One product of every position's 3×3 neighbourhood with the weight."""
    _, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1)  # n h w (3 3 c)
    return jnp.matmul(neighbours, weight.reshape(9 * c, -1), precision="highest")


def _winograd_of_all(x, weight):
    """F(2×2, 3×3) of Lavin & Gray, 2015 (arXiv:1509.09308), with 2.25 times fewer multiplications; h and w even.

    Every 2×2 tile of the output comes from a 4×4 tile of the input. Seen through a transform of additions, the convolution
    of all tiles is a product of (tiles, in) and (in, out) for each of the 16 places in a tile.
    """
    n, h, w, c = x.shape
    weight_tiles = jnp.matmul(jnp.asarray(_WEIGHT), weight.reshape(9, -1), precision="highest").reshape(16, c, -1)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    if h * w > POSITIONS_OF_A_BAND:
        rows = next(r for r in range(max(2, POSITIONS_OF_A_BAND // w // 2 * 2), 0, -2) if h % r == 0)

        def band(i):  # with the row above and the row below
            part = jax.lax.dynamic_slice(x, (i // (h // rows), i % (h // rows) * rows, 0, 0), (1, rows + 2, w + 2, c))
            return _winograd(part, weight_tiles)

        return jax.lax.map(band, jnp.arange(n * h // rows)).reshape(n, h, w, -1)
    frames = max(1, POSITIONS_AT_ONCE // (h * w))
    if frames >= n or n % frames:
        return _winograd(x, weight_tiles)
    return jax.lax.map(lambda part: _winograd(part, weight_tiles), x.reshape(-1, frames, *x.shape[1:])).reshape(n, h, w, -1)


def _winograd_forward(x, weight):
    """Tiles are not kept for the backward pass: they would be four times the input and twice the weights."""
    y = _winograd_of_all(x.value, weight.value)
    return y, (x.value if weight.perturbed else None, weight.value)


def _winograd_backward(kept, dy):
    """The gradient of the input is a convolution too, the kernel turned round; JAX's own of the tiles takes up to 1.4 times as long."""
    x, weight = kept
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros((*dy.shape[:3], weight.shape[2]), dy.dtype), jnp.zeros_like(weight)
    dx = _winograd_of_all(dy, weight[::-1, ::-1].swapaxes(2, 3))
    dweight = jnp.zeros_like(weight) if x is None else jax.vjp(lambda weight: _winograd_of_all(x, weight), weight)[1](dy)[0]
    return dx, dweight


_winograd_either_way = jax.custom_vjp(_winograd_of_all)
_winograd_either_way.defvjp(_winograd_forward, _winograd_backward, symbolic_zeros=True)
winograd = jax.jit(_winograd_either_way)


def _winograd(x, weight_tiles):
    """x (n, h + 2, w + 2, c), padded."""
    n, h, w, c = x.shape[0], x.shape[1] - 2, x.shape[2] - 2, x.shape[3]
    tiles = jnp.stack([column for row in _input_lines(x, 1) for column in _input_lines(row, 2)])  # (16, n, h/2, w/2, c)
    products = jnp.matmul(tiles.reshape(16, -1, c), weight_tiles, precision="highest")
    rows = _output_lines(*products.reshape(4, 4, n, h // 2, w // 2, -1))
    columns = [jnp.stack(_output_lines(*row), axis=3) for row in rows]  # 2 of (n, h/2, w/2, 2, out)
    return jnp.stack(columns, axis=2).reshape(n, h, w, -1)  # (n, h/2, 2, w/2, 2, out)


_WEIGHT_LINES = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_WEIGHT = np.kron(_WEIGHT_LINES, _WEIGHT_LINES)  # G g Gᵀ as one (16, 9) matrix: a product is the fastest way through the weights


def _input_lines(x, axis: int):  # Bᵀ d along one axis
    a, b, c, d = (jax.lax.slice_in_dim(x, i, x.shape[axis] - 3 + i, 2, axis) for i in range(4))
    return a - c, b + c, c - b, b - d


def _output_lines(a, b, c, d):  # Aᵀ m along one axis
    return a + b + c, b - c - d
