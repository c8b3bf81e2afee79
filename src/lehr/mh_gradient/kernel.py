"""The kernel of Metropolis-Hastings: its target and proposal, and what one step of it was."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lehr.mh_gradient.proposals import AbstractProposal
from lehr.mh_gradient.target import Point, Target


class Kernel(NamedTuple):
    """What a step needs: the target, and the proposal."""

    target: Target
    proposal: AbstractProposal

    def log_ratio(self, new: Point, old: Point) -> Float[Array, ""]:
        """log of [p(new) q(new, old)] / [p(old) q(old, new)]."""
        return self.target.log_ratio(new, old) + self.proposal.log_ratio(new, old)


def choose(condition: Bool[Array, ""], a: Any, b: Any) -> Any:
    """a if the condition holds, else b; exactly."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def at_same_place(x: Array, y: Array) -> Bool[Array, ""]:
    """Whether two positions of finite numbers are equal."""
    # For floats the largest difference takes less time than a loop over flags.
    return jnp.max(jnp.abs(x - y)) == 0 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.all(x == y)


class Move(NamedTuple):
    """A step of Metropolis-Hastings: from `old`, `new` was proposed with `noise`; accepted if log u < log_ratio.

    Of the two the chain is at `after`, and by the other decision it would be `otherwise`.
    """

    old: Point
    new: Point
    after: Point
    otherwise: Point
    accepted: Any
    log_ratio: Any
    log_uniform: Any
    noise: Any

    @property
    def forbidden(self) -> Array:
        """Whether the density is 0 at what was proposed."""
        return self.new.log_prob == -jnp.inf
