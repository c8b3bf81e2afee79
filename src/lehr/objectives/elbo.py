"""The evidence lower bound."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.path import LogDensity, Problem


def log_weights(base: Any, log_target: LogDensity, key: PRNGKeyArray, num_samples: int) -> Float[Array, " num_samples"]:
    """log target(x_i) - log base(x_i) for independent x_i ~ base: annealing without a step."""
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, but it is {num_samples}")
    problem = Problem(base, log_target)

    def one_sample(key):
        x = base.sample(key)
        return problem.log_prob(x) - problem.log_base(x)

    return jax.vmap(one_sample)(jax.random.split(key, num_samples))


def elbo(base: Any, log_target: LogDensity, key: PRNGKeyArray, *, num_samples: int = 1) -> Float[Array, ""]:
    """(1/S) sum_i [log target(x_i) - log base(x_i)],  x_i ~ base;  its expectation is at most log Z.

    Arguments:
        base: has a reparameterised `sample(key, shape)` and `log_prob(x)`.
        log_target: maps a position `(dim,)` to the log unnormalised density, in nats.
        num_samples: S.

    **Gradient**: unbiased for the bound (full Monte Carlo, reparameterised).

    Raises `lehr.errors.InputError` for fewer than one sample, or shapes that do not fit.

    Source: Kingma, Welling 2014, equation (7).
    """
    return jnp.mean(log_weights(base, log_target, key, num_samples))
