"""The density that a chain of Metropolis-Hastings leaves invariant, for given parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


class DensityRatio(eqx.Module):
    """A density known by its ratios: the form for supports that move with the parameters.

    Where the density is zero its logarithm has no gradient, but an acceptance probability has one, if the density
    grows from zero with the parameters: that of the ratio p(x_new) / p(x).

    Arguments:
        ratio: maps `(params, x_new, x)` to p(x_new) / p(x) >= 0, for any x of positive density; its gradient in params
            must be finite there.

    A boundary that moves through space has a gradient of zero almost everywhere, in this form too: smooth it.

    Source: Arya et al. 2023, section 2 (the chain is differentiated through its acceptance probabilities).
    """

    ratio: Callable[[Any, Array, Array], Array]


class Point(NamedTuple):
    """Where a chain is, the log density there (0 for a `DensityRatio`), and its gradient if asked for."""

    x: Any
    log_prob: Any
    gradient: Any


class Target(eqx.Module):
    """A log density, or a `DensityRatio`, with its parameters."""

    density: Callable[[Any, Array], Array] | DensityRatio
    params: Any
    with_gradient: bool = eqx.field(static=True)

    def at(self, x: Shaped[Array, "*shape"]) -> Point:
        """Evaluates the log density, and its gradient where proposals or couplings need it."""
        if isinstance(self.density, DensityRatio):
            return Point(x, jnp.zeros(()), None)
        if not self.with_gradient:
            return Point(x, self.density(self.params, x), None)
        log_prob, gradient = jax.value_and_grad(self.density, argnums=1)(self.params, x)
        return Point(x, log_prob, gradient)

    def log_ratio(self, new: Point, old: Point) -> Float[Array, ""]:
        """log p(new) - log p(old)."""
        if isinstance(self.density, DensityRatio):
            return jnp.log(self.density.ratio(self.params, new.x, old.x))
        return new.log_prob - old.log_prob
