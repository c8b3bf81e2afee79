"""Where a density is not a number, zero or infinite: counted on draws of a base, and reported, never hidden."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.path import LogDensity, Problem


class Guarded(eqx.Module):
    """A log density whose NaN counts as density zero, so that one bad position cannot spoil a population.

    Whoever guards a density counts its NaN with `look_at`, and reports them.
    """

    log_target: LogDensity

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        value = self.log_target(x)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)


class Support(NamedTuple):
    """Of `num_draws` draws of a base, how many have a density that is NaN (`num_invalid`) or zero (`num_outside`)."""

    num_draws: int
    num_invalid: int
    num_outside: int

    @property
    def log_share(self) -> float:
        """log of the share of the base on which the target is positive.

        Annealing back ends within the target's support, so that its estimate of 1/Z is low by this share.
        """
        return math.log((self.num_draws - self.num_invalid - self.num_outside) / self.num_draws)


def look_at(key: PRNGKeyArray, problem: Problem, *, num_draws: int = 4096) -> Support:
    """Evaluates the target at draws of the base (more of them if it is NaN or zero at some).

    Raises `lehr.errors.InputError` if the log density is +inf anywhere, or finite nowhere.
    """
    counts = _counts(key, problem, num_draws)
    num_invalid, num_infinite, num_outside = (int(count) for count in counts)
    if num_infinite:
        raise InputError(
            f"the log density is +inf at {num_infinite} of {num_draws} draws of the base: an infinite density has no "
            "evidence; look for a division by zero, or the logarithm of zero with a minus sign"
        )
    if num_invalid + num_outside == num_draws:
        what = "NaN" if num_invalid == num_draws else "zero or NaN"
        raise InputError(
            f"the density is {what} at all of {num_draws} draws of the base: check it at a position where it should be "
            "finite, and give a base that covers the target's support"
        )
    if num_invalid + num_outside and num_draws < 65_536:
        # The share of the base that lies in the support enters the upper end of the bracket.
        return look_at(key, problem, num_draws=65_536)
    return Support(num_draws, num_invalid, num_outside)


@eqx.filter_jit
def _counts(key: PRNGKeyArray, problem: Problem, num_draws: int) -> tuple[Array, Array, Array]:
    """How many draws of the base have a density of NaN, infinity and zero."""
    draws = problem.base.sample(key, (num_draws,))
    values = jax.lax.map(problem.log_prob, draws, batch_size=256)
    return jnp.sum(jnp.isnan(values)), jnp.sum(values == jnp.inf), jnp.sum(values == -jnp.inf)
