"""A chain, and beside it a few alternatives that are born, kept or dropped by a coin, and end when they meet it.

An alternative is a chain that took one decision otherwise. It carries a number kappa, its weight over the gradient of
that decision's log odds; with Y the alternative and X the chain, sum_i kappa_i (f(Y_i) - f(X_i)) grad log_odds_k is
what the decision at step k adds to the gradient. So the scan needs no derivative at all: it emits these numbers
with the step of birth, and one pass over the births gives the gradient in any number of parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lehr.chunked_scan import scan_with_noise
from lehr.mh_gradient.couplings import choose
from lehr.mh_gradient.sampler import Gradient, Rule
from lehr.mh_gradient.target import Point


class Alternatives(NamedTuple):
    """Of a few slots: each holds a living alternative, if it has a strength. (One slot has no axis: code for an axis
    of one would be slow.)
    """

    point: Point
    #: where f is of two positions: its last one, and whether it is apart from the chain now (if not, it was before)
    previous: Any
    apart: Any
    birth: Any
    kappa: Any
    strength: Any


class Lives(NamedTuple):
    """For diagnostics: of each step and slot its weight, and the age at which an alternative met the chain, or 0."""

    kappa: Float[Array, " *slots"]
    met_after: Any
    born: Array


class Trace(NamedTuple):
    """What each step of a chain leaves for the gradient: its decision, and what the alternatives after it add."""

    low: Array
    high: Array
    #: None if all births are flips
    tag: Any
    #: by slot: the step of birth, and kappa (f(Y) - f(X))
    birth: Int[Array, " *slots"]
    contribution: Float[Array, "*slots m"]
    #: whether it was accepted, and the position after the step, where the gradient needs them
    accepted: Any
    after: Any
    lives: Any


class Run(NamedTuple):
    """The mean of f after burn-in, the share of accepted proposals, and with alternatives their trace."""

    mean: Any
    #: NaN, if a log ratio was no number
    acceptance: Any
    bad_start: Any
    trace: Any
    #: age of the oldest alternative at the end, in steps
    oldest: Any


class Plan(NamedTuple):
    """Numbers of steps, of which the first are not averaged over, and of slots; f is of this position and the last."""

    num_steps: int
    burn_in: int
    num_alternatives: int
    consecutive: bool


class Record(NamedTuple):
    """What a trace is to hold beside the least."""

    accepted: bool = False
    after: bool = False
    lives: bool = False


Averaged = Callable[[Array, Array], Float[Array, " m"]]


def run_chain(
    sampler: Any,
    f: Averaged,
    key: PRNGKeyArray,
    x0: Array,
    plan: Plan,
    rule: Rule | None = None,
    gradient: Gradient | None = None,
    record: Record = Record(),  # noqa: B008 (it cannot change)
) -> Run:
    """One chain, with alternatives if there is a rule for them; without, to the same numbers.

    `f(x, x_new)` gives a row; plain functions ignore x.
    """
    start = sampler.start(x0)
    steps = jnp.arange(plan.num_steps)

    def noise(key, num_steps):
        key_chain, key_extra = jax.random.split(key)
        of_chain = sampler.noise(key_chain, num_steps, x0)
        return of_chain, None if rule is None else sampler.extra(key_extra, num_steps, x0, rule)

    def step(carry, inputs):
        (point, total, num_accepted, slots), (k, (of_chain, extra)) = carry, inputs
        move = sampler.move(k, point, of_chain)
        value = f(point.x, move.after.x)
        counts = k >= plan.burn_in
        total = total + jnp.where(counts, value, 0)
        trace = None
        if rule is not None:
            slots, trace = _others(sampler, f, plan, rule, gradient, record, k, move, extra, value, slots)
            trace = trace._replace(contribution=jnp.where(counts, trace.contribution, 0))
        # NaN from here on, if the log ratio is no number.
        num_accepted = num_accepted + jnp.where(move.log_ratio < jnp.inf, move.accepted, jnp.nan)
        return (move.after, total, num_accepted, slots), trace

    width = jax.eval_shape(f, x0, x0)
    slots = None if rule is None else _none(start, plan, width.dtype)
    carry = start, jnp.zeros(width.shape, width.dtype), jnp.zeros(()), slots
    (_, total, num_accepted, slots), trace = scan_with_noise(step, noise, carry, key, steps, memory=None)
    oldest = None if slots is None else jnp.max(jnp.where(slots.strength > 0, plan.num_steps - slots.birth, 0))
    mean, acceptance = total / (plan.num_steps - plan.burn_in), num_accepted / plan.num_steps
    return Run(mean, acceptance, ~jnp.isfinite(start.log_prob), trace, oldest)


def _none(start: Point, plan: Plan, dtype: Any) -> Alternatives:
    shape = () if plan.num_alternatives == 1 else (plan.num_alternatives,)
    points = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *jnp.shape(leaf))), start)
    zeros = jnp.zeros(shape, dtype)
    previous, apart = (points.x, jnp.zeros(shape, bool)) if plan.consecutive else (None, None)
    return Alternatives(points, previous, apart, jnp.zeros(shape, jnp.int32), zeros, zeros)


def _others(
    sampler: Any,
    f: Averaged,
    plan: Plan,
    rule: Rule,
    gradient: Gradient | None,
    record: Record,
    k: Array,
    move: Any,
    extra: Any,
    value: Array,
    slots: Alternatives,
) -> tuple[Alternatives, Trace]:
    """The alternatives after the step `move`, and what they add."""
    x, after = move.old.x, move.after
    each: Any = (lambda of: of) if plan.num_alternatives == 1 else jax.vmap

    points, met = each(lambda point: sampler.follow(move, point, extra))(slots.point)
    apart, lives = ~met, ~met
    if plan.consecutive:
        # Of two positions f sees for one more step that they were apart; until then, together.
        points = each(lambda is_apart, there: choose(is_apart, there, after))(slots.apart, points)
        apart, lives = slots.apart & ~met, slots.apart
    strength = jnp.where(lives, slots.strength, 0)
    birth = sampler.birth(move, extra, rule, gradient)
    # A free slot if there is one, else that of the weakest: the newborn is kept there in proportion to its strength.
    total = jnp.min(strength) + birth.strength
    here = jnp.arange(strength.size) == jnp.argmin(strength) if strength.ndim else jnp.asarray(True)
    born = extra.coin * total < birth.strength
    taken = here & born
    # 1/p and 1/(1 - p), p = strength of the newborn over the total; both are of the living only.
    newborn = birth.coefficient * total / jnp.where(born, birth.strength, 1)
    older = jnp.where(strength > 0, slots.kappa * jnp.where(here, total / jnp.where(strength > 0, strength, 1), 1), 0)
    met_after = jnp.where((slots.strength > 0) & ~lives, k - slots.birth, 0) if record.lives else None
    slots = Alternatives(
        point=each(lambda is_new, y: choose(is_new, birth.point, y))(taken, points),
        previous=each(lambda is_new, y: jnp.where(is_new, x, y))(taken, slots.point.x) if plan.consecutive else None,
        apart=apart | taken if plan.consecutive else None,
        birth=jnp.where(taken, k, slots.birth).astype(jnp.int32),
        kappa=jnp.where(taken, newborn, older).astype(slots.kappa.dtype),
        strength=jnp.where(here, total, strength).astype(slots.strength.dtype),
    )
    before = slots.previous if plan.consecutive else slots.point.x
    others = each(f)(before, slots.point.x)
    # kappa is 0 where none lives, but f may not be finite there.
    contribution = jnp.where(slots.strength[..., None] > 0, slots.kappa[..., None] * (others - value), 0)
    trace = Trace(
        birth.low,
        birth.high,
        None if rule.proposal_gradient is None else birth.tag,
        slots.birth,
        contribution,
        accepted=move.accepted if record.accepted else None,
        after=after.x if record.after else None,
        lives=Lives(slots.kappa, met_after, born) if record.lives else None,
    )
    return slots, trace


def by_birth(trace: Trace) -> Float[Array, "num_steps m"]:
    """The contributions of one chain, summed by the step at which the alternative was born."""
    num_steps, width = len(trace.birth), trace.contribution.shape[-1]
    births, contributions = trace.birth.reshape(num_steps, -1), trace.contribution.reshape(num_steps, -1, width)

    # An alternative's steps follow each other in its slot: summed from the last to the first.
    def step(carry, inputs):
        later, total = carry
        k, birth, contribution = inputs
        total = jnp.where((birth == later)[:, None], total, 0) + contribution
        return (birth, total), jnp.sum(jnp.where((birth == k)[:, None], total, 0), axis=0)

    start = jnp.full_like(births[0], -1), jnp.zeros_like(contributions[0])
    inputs = jnp.arange(num_steps), births, contributions
    return jax.lax.scan(step, start, inputs, reverse=True)[1]
