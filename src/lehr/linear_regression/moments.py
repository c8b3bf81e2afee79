"""The mean and the covariance of (position, momentum) along the chain of DAIS on a Gaussian path."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


class Moments(NamedTuple):
    """Of position x and momentum u, in units of its scale."""

    x: Any
    u: Any
    xx: Any
    xu: Any
    uu: Any


class Path(NamedTuple):
    """grad log f_b = linear0 + b linear1 - (precision0 + b precision1) x."""

    precision0: Any
    precision1: Any
    linear0: Any
    linear1: Any


def start_at(mean: ArrayLike, covariance: ArrayLike) -> Moments:
    """Of a position of this mean `(d,)` and covariance `(d, d)`, with momentum N(0, I)."""
    mean, covariance = jnp.asarray(mean), jnp.asarray(covariance)
    return Moments(mean, jnp.zeros_like(mean), covariance, jnp.zeros_like(covariance), jnp.eye(len(mean)))


@jax.jit
def propagate(
    start: Moments,
    path: Path,
    noise: Any,
    betas: Float[Array, " num_steps"],
    h: Float[Array, "num_steps d"],
    gammas: Float[Array, " num_steps"],
) -> tuple[Moments, Float[Array, ""], Float[Array, ""]]:
    """The moments after all steps, the sum of E[|u_hat|^2 - |u|^2] / 2, and that of its terms' magnitudes."""

    def step(carry, inputs):
        (x, u, xx, xu, uu), kinetic, moved = carry
        beta, h, gamma = inputs
        half = h[:, None] / 2
        # x_half = x + (h/2) u
        x = x + h / 2 * u
        xx = xx + xu * half.T + half * xu.T + half * uu * half.T
        xu = xu + half * uu
        # u_hat = u + h (r - L x_half + noise)
        pull = h[:, None] * (path.precision0 + beta * path.precision1)
        change = h * (path.linear0 + beta * path.linear1) - pull @ x
        turn = pull @ xu
        grown = pull @ xx @ pull.T - turn - turn.T
        if noise is not None:
            grown = grown + beta**2 * h[:, None] * noise.at(x, xx) * h
        # Rounding leaves an antisymmetric part, which does not follow the chain, and would grow from step to step.
        grown = (grown + grown.T) / 2
        gained = (jnp.sum(change * (2 * u + change)) + jnp.trace(grown)) / 2
        u, uu, xu = u + change, uu + grown, xu - xx @ pull.T
        # x' = x_half + (h/2) u_hat
        x = x + h / 2 * u
        xx = xx + xu * half.T + half * xu.T + half * uu * half.T
        xx = (xx + xx.T) / 2
        xu = xu + half * uu
        # u' = gamma u_hat + sqrt(1 - gamma^2) xi
        refreshed = gamma**2 * uu + (1 - gamma**2) * jnp.eye(len(u))
        return (Moments(x, gamma * u, xx, gamma * xu, refreshed), kinetic + gained, moved + jnp.abs(gained)), None

    return jax.lax.scan(step, (start, jnp.zeros(()), jnp.zeros(())), (betas, h, gammas))[0]


#: Of problems of one dimension each, along the leading axis. (The compiler makes products of what are 1 x 1 matrices.)
propagate_each = jax.jit(jax.vmap(propagate, in_axes=(0, 0, None, None, None, None)))
