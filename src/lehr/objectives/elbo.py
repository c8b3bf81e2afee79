"""The evidence lower bound."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr import divergences
from lehr.errors import InputError
from lehr.path import LogDensity, Problem


def log_weights(base: Any, log_target: LogDensity, key: PRNGKeyArray, num_samples: int) -> Float[Array, " num_samples"]:
    """log target(x_i) - log base(x_i) for independent x_i ~ base: annealing without a step."""
    problem, x = Problem(base, log_target), draws(base, key, num_samples)
    return jax.vmap(lambda x: problem.log_prob(x) - problem.log_base(x))(x)


def draws(base: Any, key: PRNGKeyArray, num_samples: int) -> Float[Array, "num_samples dim"]:
    """Independent draws of the base."""
    return jax.vmap(base.sample)(sample_keys(key, num_samples))


def sample_keys(key: PRNGKeyArray, num_samples: int) -> Array:
    """A key for each draw."""
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, but it is {num_samples}")
    return jax.random.split(key, num_samples)


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


def elbo_exact_entropy(
    base: Any,
    log_target: LogDensity,
    key: PRNGKeyArray,
    *,
    num_samples: int = 1,
    entropy: Callable[[Any], Array] = divergences.entropy,
) -> Float[Array, ""]:
    """(1/S) sum_i log target(x_i) + H[base],  x_i ~ base:  the ELBO with its entropy term exact.

    Arguments:
        base: has a reparameterised `sample(key, shape)`.
        log_target: maps a position `(dim,)` to the log unnormalised density, in nats.
        num_samples: S.
        entropy: gives H[base] = -E[log base(x)], in nats; by default of Gaussians, and of what has an `entropy()`.

    **Gradient**: unbiased for the bound, if that of `entropy` is exact. At an exact posterior its variance is *not*
    zero: that of `elbo_stl` is.

    Raises `lehr.errors.InputError` as `elbo`, and for a base whose entropy is not known and not given.

    Source: Roeder, Wu, Duvenaud 2017, equation (2).
    """
    problem = Problem(base, log_target)
    return jnp.mean(jax.vmap(problem.log_prob)(draws(base, key, num_samples))) + entropy(base)


def elbo_exact_kl(
    base: Any,
    log_likelihood: LogDensity,
    prior: Any,
    key: PRNGKeyArray,
    *,
    num_samples: int = 1,
    kl: Callable[[Any, Any], Array] = divergences.kl_divergence,
) -> Float[Array, ""]:
    """(1/S) sum_i log likelihood(x_i) - KL(base || prior),  x_i ~ base:  the ELBO with its divergence exact.

    Arguments:
        base: has a reparameterised `sample(key, shape)`.
        log_likelihood: maps a position `(dim,)` to the log density of the data, in nats.
        prior: a distribution over positions.
        num_samples: S.
        kl: gives KL(base || prior); by default of Gaussians of lehr and FlowJAX. (For NumPyro's:
            `numpyro.distributions.kl_divergence`.)

    **Gradient**: unbiased for the bound; not zero at an exact posterior.

    Raises `lehr.errors.InputError` as `elbo`, and for a divergence that is not known.

    Source: Roeder, Wu, Duvenaud 2017, equation (3); Kingma, Welling 2014, equation (10).
    """
    problem = Problem(base, log_likelihood)
    return jnp.mean(jax.vmap(problem.log_prob)(draws(base, key, num_samples))) - kl(base, prior)
