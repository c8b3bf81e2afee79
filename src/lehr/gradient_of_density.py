"""The gradient of a log density as a step of a chain sees it, with a cheap derivative of its own.

Plain reverse mode keeps every intermediate result of grad log f for each step of the chain, and is bound by the traffic
of memory. But the adjoints of g = grad_x log f(x; theta), for a cotangent w, are directional derivatives at t = 0,

    w . dg/dtheta = d/dt grad_theta log f(x + t w; theta),     w . dg/dx = d/dt grad_x log f(x + t w; theta):

one forward-mode pass over one gradient (forward over reverse) gives all of them at once, from x and theta alone.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array

#: the name under which `jax.checkpoint` may keep gradients: all of a step that is worth keeping
GRADIENT = "gradient of a log density"


def grad(log_density: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """As `jax.grad`, with its adjoints in x and in all that `log_density` closes over from one jvp of one gradient.

    **Gradient**: exact, in reverse mode; second derivatives too (`jax.hessian`, a `jax.grad` of a `jax.grad`). Forward
    mode alone raises `TypeError`.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    def gradient(x: Array) -> Array:
        expression, seen = closed(log_density, x)
        return checkpoint_name(_gradient(expression, x, *seen), GRADIENT)

    return gradient


def value_and_grad(log_density: Callable[[Array], Array]) -> Callable[[Array], tuple[Array, Array]]:
    """As `jax.value_and_grad`, and differentiated as `grad`."""

    def value_and_gradient(x: Array) -> tuple[Array, Array]:
        expression, seen = closed(log_density, x)
        value, gradient = cast(tuple[Array, Array], _value_and_gradient(expression, x, *seen))
        return value, checkpoint_name(gradient, GRADIENT)

    return value_and_gradient


def closed(function: Callable[..., Array], *examples: Array) -> tuple[Callable[..., Array], list[Any]]:
    """f(*arguments, *seen) that closes over nothing, and what `function` saw: leaves of pytrees, and tracers.

    Tracers of whole numbers too: a rule for a derivative runs when the trace that it was made in may have ended.
    """
    jaxpr = jax.make_jaxpr(function)(*examples)

    def expression(*inputs: Any) -> Array:
        arguments, seen = inputs[: len(examples)], inputs[len(examples) :]
        return jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, seen))(*arguments)[0]

    return expression, jaxpr.consts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(expression: Callable[..., Array], *inputs: Array) -> Array:
    return jax.grad(expression)(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value_and_gradient(expression: Callable[..., Array], *inputs: Array) -> tuple[Array, Array]:
    return jax.value_and_grad(expression)(*inputs)


def _gradients_along(expression: Callable[..., Array], inputs: tuple, direction: Array) -> tuple[list, list]:
    """grad log f in all float inputs, and its derivative as x moves in `direction`; None for inputs of other types."""
    x, *seen = inputs
    floats = [i for i, leaf in enumerate(inputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    found = jax.jvp(lambda x: jax.grad(expression, argnums=floats)(x, *seen), (x,), (direction,))
    gradients, changes = ({**dict.fromkeys(range(len(inputs))), **dict(zip(floats, each))} for each in found)
    return [*gradients.values()], [*changes.values()]


def _adjoints_of_gradient(expression: Callable[..., Array], inputs: tuple, of_gradient: Array) -> tuple:
    return tuple(_gradients_along(expression, inputs, of_gradient)[1])


def _adjoints(expression: Callable[..., Array], inputs: tuple, cotangents: tuple[Array, Array]) -> tuple:
    of_value, of_gradient = cotangents
    pairs = zip(*_gradients_along(expression, inputs, of_gradient))
    return tuple(None if gradient is None else of_value * gradient + change for gradient, change in pairs)


# Not the functions with the rule again: what they are made of has second derivatives of its own.
_gradient.defvjp(lambda f, *inputs: (jax.grad(f)(*inputs), inputs), _adjoints_of_gradient)
_value_and_gradient.defvjp(lambda f, *inputs: (jax.value_and_grad(f)(*inputs), inputs), _adjoints)
