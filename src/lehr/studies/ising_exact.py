"""The energy of the Ising model on a finite torus, exactly: Kaufman's formula and its derivatives."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def log_partition(beta: Any, m: int, n: int) -> Any:
    """log Z of the m x n torus with J = 1, exactly; in float64, and differentiable.

    With cosh g_l = cosh 2b coth 2b - cos(pi l / n), and g_0 = 2b + log tanh b, which changes its sign,

        2 Z = (2 sinh 2b)^(mn/2) sum_{l odd, l even} [prod_l 2 cosh(m g_l / 2) + prod_l 2 sinh(m g_l / 2)].

    Source: Kaufman 1949.
    """

    def products(angles: np.ndarray, first: list[Any]) -> Any:
        others = jnp.arccosh(jnp.cosh(2 * beta) / jnp.tanh(2 * beta) - jnp.cos(angles))
        x = m / 2 * jnp.concatenate([jnp.asarray(first), others])
        # A product of cosh, and beside it one of tanh: smooth where g_0 = 0.
        return jnp.sum(jnp.logaddexp(x, -x)) + jnp.log1p(jnp.prod(jnp.tanh(x)))

    odd = products(np.pi * np.arange(1, 2 * n, 2) / n, [])
    even = products(np.pi * np.arange(2, 2 * n, 2) / n, [2 * beta + jnp.log(jnp.tanh(beta))])
    return m * n / 2 * jnp.log(2 * jnp.sinh(2 * beta)) + jnp.logaddexp(odd, even) - np.log(2.0)


@partial(jax.jit, static_argnums=(1, 2))
def _cumulants(beta: Any, m: int, n: int) -> tuple[Any, Any, Any]:
    first = jax.grad(lambda b: log_partition(b, m, n))
    second = jax.grad(first)
    return -first(beta), second(beta), -jax.grad(second)(beta)


def exact_moments(beta: float, m: int, n: int) -> tuple[float, float, float]:
    """Mean, variance and third central moment of the energy: derivatives of log Z, in turn of sign."""
    with jax.enable_x64(True):
        mean, variance, third = map(float, _cumulants(jnp.asarray(beta, jnp.float64), m, n))
    return mean, variance, third


def exact_heat(temperature: float, side: int) -> tuple[float, float]:
    """C = Var E / T^2, and dC/dT = k_3 / T^4 - 2 Var E / T^3, because d Var E / d beta = -k_3."""
    _, variance, third = exact_moments(1 / temperature, side, side)
    return variance / temperature**2, third / temperature**4 - 2 * variance / temperature**3


def maximum(side: int) -> dict[str, float]:
    """Where the specific heat is largest, by bisection of its derivative."""
    low, high = 1.8, 3.5
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_heat(middle, side)[1] > 0 else (low, middle)
    return {"temperature": low, "specific_heat": exact_heat(low, side)[0]}
