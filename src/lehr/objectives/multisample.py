"""Importance weighted bounds."""

from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray

from lehr.objectives.elbo import log_weights
from lehr.path import LogDensity
from lehr.weighted import log_mean_exp


def iwae(base: Any, log_target: LogDensity, key: PRNGKeyArray, *, num_samples: int) -> Float[Array, ""]:
    """log (1/S) sum_i target(x_i) / base(x_i),  x_i ~ base;  its expectation rises to log Z with S.

    Arguments:
        base: has a reparameterised `sample(key, shape)` and `log_prob(x)`.
        log_target: maps a position `(dim,)` to the log unnormalised density, in nats.
        num_samples: S; S = 1 is the ELBO.

    **Gradient**: unbiased for the bound (reparameterised).

    Raises `lehr.errors.InputError` for fewer than one sample, or shapes that do not fit.

    Source: Burda, Grosse, Salakhutdinov 2016, equation (8).
    """
    return log_mean_exp(log_weights(base, log_target, key, num_samples))
