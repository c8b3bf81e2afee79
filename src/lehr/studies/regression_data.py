"""Log likelihoods of one observation, for targets that are sums over data."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lehr.numerics import bernoulli_log_prob


def per_datum(theta: Float[Array, " d"], datum: Any) -> Float[Array, ""]:
    """log N(y; x . theta, 1)."""
    x, y = datum
    return -((y - x @ theta) ** 2) / 2 - math.log(2 * math.pi) / 2


def per_label(theta: Float[Array, " d"], datum: Any) -> Float[Array, ""]:
    """log Bernoulli(y; sigmoid(x . theta))."""
    x, y = datum
    return jnp.sum(bernoulli_log_prob(x @ theta, y))
