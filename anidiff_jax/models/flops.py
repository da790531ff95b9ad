"""Floating-point operations of a computation, counted from its jaxpr: two for each multiplication of a product or convolution."""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable, *arguments: Any) -> int:
    """Of one call with arguments of these shapes (arrays or jax.ShapeDtypeStruct); nothing is computed.

    What is not a product or a convolution is left out: about one in a hundred. A fast algorithm (`convolution.winograd`) counts
    as what it does, and a GPU's fused attention as nothing: where a network's own operations are meant, count with `Settings(fast=False)`.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        kernel = equation.invars[1].aval.shape
        per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]  # in (of a group) h w
        return 2 * math.prod(equation.outvars[0].aval.shape) * per_output
    inner = (getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns")))
    bodies = [body for body in inner if hasattr(body, "eqns")]
    if name == "cond":
        return max((_of(body) for body in bodies), default=0)
    if name.startswith("custom_"):  # the first is what is computed, the others its derivatives
        bodies = bodies[:1]
    return (params["length"] if name == "scan" else 1) * sum(_of(body) for body in bodies)
