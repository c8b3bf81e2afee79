"""Where an alternative is born: the opposite of a decision, with the weight that makes the gradient unbiased.

A decision is taken (A = 1) with probability alpha(theta). For any number c the flip to the opposite one with weight

    w = -c grad alpha / alpha   if taken,       (1 - c) grad alpha / (1 - alpha)   if not

is unbiased: E[w (F_flipped - F)] = alpha (-c grad alpha / alpha) (F_0 - F_1) + (1 - c) grad alpha (F_1 - F_0), which is
grad alpha (F_1 - F_0) = grad E[F]. With a logit r of which alpha is a function, grad alpha = alpha'(r) grad r: an
alternative carries the number in front of grad r, and its gradient can wait.

Rather than r it is the log ratio of the *flip* that is differentiated: r if not taken, and -r, that of the way back, if
taken. So the numbers of flips are not negative, and their ends, where the chain is and where it would be, are all that
is kept of a decision.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

#: which c: alpha ("measure-valued"), 0 ("right"), 1 ("left"), or the one of 0 and 1 with w >= 0 ("single-sided")
Weights = Literal["measure-valued", "right", "left", "single-sided"]
WEIGHTS = ("measure-valued", "right", "left", "single-sided")

#: by what alternatives are kept: |w|'s number times the distance to the alternative, the number alone, the number times
#: |grad r|, or all alike
Strength = Literal["distance", "acceptance", "gradient", "uniform"]
STRENGTHS = ("distance", "acceptance", "gradient", "uniform")

#: what a weight is the gradient of: the log ratio of a flip, log q of a fresh proposal, a log scale (1 + dimension)
FLIP, SCORE, SCALE = 0, -1, 1


class Ends(NamedTuple):
    """A decision of Metropolis-Hastings, as what its weight is the gradient of; positions in the form that is kept.

    Of a flip: where the chain is, and where it would be. Of a birth of the proposal's parameters, where it was, and
    what was proposed.
    """

    low: Any
    #: of an involutive proposal the noise that leads there from `low`
    high: Any
    #: what the weight is the gradient of; None where all births are flips
    tag: Any = None


class Birth(NamedTuple):
    """An alternative, and the decision it is born of: its weight is `coefficient` times grad log_factor of that."""

    #: None where it follows from the move, or from that and the decision
    point: Any
    decision: Any
    coefficient: Any
    strength: Any


def flip_coefficient(weights: Weights, taken: Array, alpha: Array, slope: Array, rises: Array | None) -> Array:
    """w over the gradient of the flip's log ratio, for a decision of probability alpha, slope = d alpha / d r.

    (Or over that of any other function of theta, with the derivative of alpha in that.) `rises`: whether r does.
    """
    if weights == "measure-valued":
        return slope
    # Taken with alpha = 0, or not with alpha = 1, are not met; their quotients must not be NaN.
    if_rejected = jnp.where(taken, 0.0, slope / jnp.where(taken, 1.0, 1 - alpha))
    if_accepted = jnp.where(taken, slope / jnp.where(taken, alpha, 1.0), 0.0)
    if weights == "right":
        return if_rejected
    if weights == "left":
        return if_accepted
    assert rises is not None
    return jnp.where(rises, if_rejected, if_accepted)
