"""Floating-point operations of a program, counted in its jaxpr.

Matrix products and convolutions are counted, a multiply and an add as two; norms, activations and softmax are not, as
is usual for model FLOPs (Chowdhery et al. 2022, PaLM, appendix B). Loops count as often as they run, which XLA's own
analysis does not do.
"""

import math
from typing import Any, cast

from jax.extend import core

_Closed: Any = cast(Any, core).ClosedJaxpr  # not among the exported names of every version


def count_flops(jaxpr: Any) -> float:
    """Returns the FLOPs of one run of a program, a jaxpr or closed jaxpr, on all devices together.

    The body of a ``scan`` counts as often as it runs, that of a ``while`` once, and of the branches of a ``cond`` the
    most expensive one.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, _Closed) else jaxpr
    return sum(map(_equation_flops, inner.eqns))


def _equation_flops(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # The gradient to a kernel is a convolution whose kernel is an image; the product still holds.
        kernel, features = _shape(equation.invars[1]), params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) / kernel[features]
    inner = [count_flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _shape(variable: Any) -> tuple[int, ...]:
    """Returns the shape of a variable of a jaxpr, which is an array."""
    return variable.aval.shape


def _jaxprs(value: object) -> list[Any]:
    values = value if isinstance(value, tuple | list) else (value,)
    return [each for each in values if isinstance(each, core.Jaxpr | _Closed)]
