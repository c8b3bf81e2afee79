"""Chains, and beside each a few alternatives that are born, kept or dropped by a coin, and end when they meet it.

An alternative is a chain that took one decision otherwise. With Y the alternative and X the chain,

    sum_i kappa_i (f(Y_i) - f(X_i)) grad l_k

is what the decision at step k adds to the gradient, l_k the log ratio of its flip, kappa its weight over grad l_k. So
no loop needs a derivative: they leave a number for each decision, and one pass over the decisions that count gives the
gradient in any number of parameters. A group of steps is run in three stages: the chains; what could be born of each of
their decisions; the alternatives. When all groups are done, what alternatives gathered goes to their decisions.

Kept by coins that take the newborn with probability p = m / M, m its strength and M that of all that competed for its
slot since that was empty, an alternative has kappa = (c / m) M: at birth c / p, and each newborn that is not kept
multiplies kappa by 1 / (1 - p), and M by as much. The loop knows M alone.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lehr.chunked_scan import GROUP, group_keys, in_groups, scan_groups
from lehr.mh_gradient.births import Birth
from lehr.mh_gradient.gradient import numbers_in
from lehr.mh_gradient.kernel import choose
from lehr.mh_gradient.packed_scan import scan_chains
from lehr.mh_gradient.sampler import Gradient, Rule
from lehr.mh_gradient.target import Point
from lehr.mh_gradient.trace import Lives, Record, Trace, chains_axis

#: numbers in a group of steps, of all chains' positions: what fits a cache
_NUMBERS = 2**17
#: the most of them, where so few would be less than `GROUP` steps; and the fewest steps
_MOST, _SHORTEST = 2**20, 10
#: numbers that f of a chain reads and writes, up to which it is taken of all steps at once
_CHEAP = 100


class Alternatives(NamedTuple):
    """Of a few slots: each holds a living alternative, if it has a strength. (One slot has no axis: code for an axis
    of one would be slow.)
    """

    point: Point
    #: where f is of two positions: its last one, and whether it is apart from the chain now (if not, it was before)
    previous: Any
    apart: Any
    #: M: of all that competed for the slot since it was empty
    strength: Any


class Sums(NamedTuple):
    """Of each chain: where it is, the sum of f after burn-in, and the number of accepted proposals."""

    point: Point
    total: Any
    #: NaN, once a log ratio was NaN or infinite
    num_accepted: Any


class Run(NamedTuple):
    """Of each chain: the mean of f after burn-in, the share of accepted proposals; with alternatives their trace."""

    mean: Float[Array, "num_chains m"]
    #: NaN, if a log ratio was no number
    acceptance: Float[Array, " num_chains"]
    bad_start: Bool[Array, " num_chains"]
    trace: Any
    #: at the end, of each slot the age of its alternative in steps; 0 if it is empty
    ages: Any


class Plan(NamedTuple):
    """Numbers of steps, of which the first are not averaged over, and of slots; f is of this position and the last."""

    num_steps: int
    burn_in: int
    num_alternatives: int
    consecutive: bool


class Steps(NamedTuple):
    """Steps of the chains, as their alternatives see them."""

    did: Any
    noise: Any
    #: what follows from `did` and `noise`; not computed where it is not used
    moves: Any
    #: where each began; None where f is of one position
    before: Any
    #: of f
    values: Any


Averaged = Callable[[Array, Array], Float[Array, " m"]]


def run_chains(
    sampler: Any,
    f: Averaged,
    keys: Array,
    x0: Array,
    plan: Plan,
    rule: Rule | None = None,
    gradient: Gradient | None = None,
    record: Record = Record(),  # noqa: B008 (it cannot change)
) -> Run:
    """Chains from positions x0 `(num_chains, dim)`, with alternatives if there is a rule.

    Without, to the same numbers, but for the rounding of sums.
    `f(x, x_new)` gives a row; plain functions ignore x.
    """
    axis = chains_axis(x0.shape[1])
    engine = _Engine(sampler, f, plan, rule, gradient, record, axis)
    start = engine.of_chains(sampler.start)(_moved(x0, 0, axis))

    def group(carry, inputs):
        (sums, slots), (keys, steps) = carry, inputs

        def draw(key):
            of_chain = sampler.noise(key, len(steps), x0[0])
            return of_chain, None if rule is None else sampler.extra(key, len(steps), x0[0], rule)

        noise, extra = _chains_last(draw, keys) if axis == -1 else jax.vmap(draw, out_axes=1)(keys)
        if rule is None:
            return (engine.chains(sums, steps, noise), slots), None
        sums, done = engine.recorded_chains(sums, steps, noise)
        slots, trace = engine.alternatives(slots, steps, done, extra, engine.births(done.moves, extra))
        # Positions stay as they are: rows of many numbers are taken from them as they lie.
        turned = jax.vmap(lambda of_step: _moved(of_step, axis, -1))(trace._replace(decision=None, after=None))
        return (sums, slots), turned._replace(decision=trace.decision, after=trace.after)

    width = jax.eval_shape(f, x0[0], x0[0])
    # Sums of many numbers of half precision would end at a few thousand.
    dtype = jnp.promote_types(width.dtype, jnp.float32)

    def first(point: Point) -> tuple[Sums, Any]:
        sums = Sums(point, jnp.zeros(width.shape, dtype), jnp.zeros(()))
        return sums, None if rule is None else _none(point, plan)

    largest = steps_at_once(x0)
    of_groups = jax.vmap(lambda key: group_keys(key, plan.num_steps, largest), out_axes=(1, 0))(keys)
    groups = in_groups(jnp.arange(plan.num_steps), of_groups, largest)
    (sums, slots), trace = scan_groups(group, engine.of_chains(first)(start), *groups)
    return Run(
        mean=_moved(sums.total, axis, 0) / (plan.num_steps - plan.burn_in),
        acceptance=sums.num_accepted / plan.num_steps,
        bad_start=~jnp.isfinite(start.log_prob),
        trace=trace,
        ages=None if rule is None else _ages(trace.taken, _moved(slots.strength, axis, -1) > 0),
    )


def steps_at_once(x0: Array) -> int:
    """How many steps of chains at these positions make a group that draws its noise at once.

    Many if positions are small, for a draw takes a time of its own, beside which the numbers of a hundred small steps
    are few; and few if they are large, for all that happens in a group is kept until its alternatives have run.
    (Whoever is to draw the same numbers again makes the same groups.)
    """
    return max(_NUMBERS // x0.size, min(GROUP, max(_SHORTEST, _MOST // x0.size)))


class _Engine(NamedTuple):
    """What is the same in every group of steps; its stages."""

    sampler: Any
    f: Averaged
    plan: Plan
    rule: Any
    gradient: Any
    record: Record
    #: of chains; in a trace, of positions alone
    axis: Literal[0, -1]

    def of_chains(self, function: Callable[..., Any], in_axes: Any = None) -> Callable[..., Any]:
        """A function of one chain, for all at once."""
        return jax.vmap(function, self.axis if in_axes is None else in_axes, out_axes=self.axis)

    def chains(self, sums: Sums, steps: Array, noise: Any) -> Sums:
        """Chains alone."""

        def step(sums: Sums, k: Array, of_chain: Any) -> tuple[Sums, None]:
            move = self.sampler.move(k, sums.point, of_chain)
            value = jnp.where(k >= self.plan.burn_in, self.f(sums.point.x, move.after.x), 0)
            return Sums(move.after, sums.total + value, sums.num_accepted + _accepted(move)), None

        return scan_chains(step, sums, steps, noise, self.axis)[0]

    def recorded_chains(self, sums: Sums, steps: Array, noise: Any) -> tuple[Sums, Steps]:
        """The same, and all that happened in each step."""
        f, x = self.of_chains(self.f), sums.point.x
        # Of all steps at once if f is cheap; else it may take much memory, and the position was just written.
        at_once = numbers_in(f, x, x) <= _CHEAP * x.shape[self.axis]

        def step(point: Point, k: Array, of_chain: Any) -> tuple[Point, Any]:
            move = self.sampler.move(k, point, of_chain)
            value = None if at_once else self.f(point.x, move.after.x)
            return move.after, (self.sampler.record(move), point.x if self.plan.consecutive else None, value)

        last, (did, before, values) = scan_chains(step, sums.point, steps, noise, self.axis)
        moves = jax.vmap(self.of_chains(self.sampler.recall, in_axes=(None, self.axis, self.axis)))(steps, did, noise)
        if at_once:
            after = moves.after.x
            values = jax.vmap(f)(after if before is None else before, after)
        counted = jnp.where((steps >= self.plan.burn_in)[:, None, None], values, 0)
        sums = Sums(
            last,
            sums.total + jnp.sum(counted, axis=0, dtype=sums.total.dtype),
            sums.num_accepted + jnp.sum(jax.vmap(self.of_chains(_accepted))(moves), axis=0),
        )
        return sums, Steps(did, noise, moves, before, values)

    def births(self, moves: Any, extra: Any) -> Birth:
        """What could be born of each move."""
        of_step = self.of_chains(lambda move, extra: self.sampler.birth(move, extra, self.rule, self.gradient))
        if self.gradient is None and self.rule.proposal_gradient is None:
            return jax.vmap(of_step)(moves, extra)
        # Not at once where a birth needs a log density or its gradient, which may take much memory.
        return jax.lax.map(lambda row: of_step(*row), (moves, extra))

    def alternatives(
        self, slots: Alternatives, steps: Array, done: Steps, extra: Any, births: Birth
    ) -> tuple[Alternatives, Trace]:
        """The alternatives after these steps, and what they add."""
        plan, record = self.plan, self.record
        # In many dimensions the positions of a move are not written again, but made from its record when it is used; in
        # few that would be several more slices of arrays in a step.
        is_wide, moves = self.axis == 0, done.moves
        done = done._replace(moves=None) if is_wide else done._replace(did=None, noise=None)
        each: Any = (lambda of: of) if plan.num_alternatives == 1 else jax.vmap

        def step(slots: Alternatives, k: Array, inputs: Any) -> tuple[Alternatives, Any]:
            (did, noise, move, before, value), extra, birth = inputs
            if is_wide:
                move = self.sampler.recall(k, did, noise)
            newborn = self.sampler.newborn(move, birth)
            points, met = each(lambda point: self.sampler.follow(move, point, extra))(slots.point)
            lives = ~met
            if plan.consecutive:
                # Of two positions f sees for one more step that they were apart; until then, together.
                points = each(lambda is_apart, there: choose(is_apart, there, move.after))(slots.apart, points)
                lives = slots.apart
            strength = jnp.where(lives, slots.strength, 0)
            # A free slot, if there is one, else that of the weakest: there the newborn is kept by its share.
            total = jnp.min(strength) + birth.strength
            here = jnp.arange(strength.size) == jnp.argmin(strength) if strength.ndim else jnp.asarray(True)
            taken = here & (extra.coin * total < birth.strength)
            is_met = (slots.strength > 0) & ~lives if record.lives else None
            slots = Alternatives(
                point=each(lambda is_new, y: choose(is_new, newborn, y))(taken, points),
                previous=each(lambda is_new, y: jnp.where(is_new, before, y))(taken, slots.point.x)
                if plan.consecutive
                else None,
                apart=(slots.apart & ~met) | taken if plan.consecutive else None,
                strength=jnp.where(here, total, strength).astype(slots.strength.dtype),
            )
            others = each(self.f)(slots.previous if plan.consecutive else slots.point.x, slots.point.x)
            # M is 0 where none lives, but f may not be finite there.
            counts = (slots.strength > 0) & (k >= plan.burn_in)
            contribution = jnp.where(counts[..., None], slots.strength[..., None] * (others - value), 0)
            lives = Lives(slots.strength, is_met) if record.lives else None
            return slots, (contribution, taken, lives)

        inputs = done, extra, births
        slots, (contribution, taken, lives) = scan_chains(step, slots, steps, inputs, self.axis)
        is_some = births.strength > 0
        return slots, Trace(
            decision=births.decision,
            coefficient=jnp.where(is_some, births.coefficient / jnp.where(is_some, births.strength, 1), 0),
            forbidden=jax.vmap(self.of_chains(lambda move: move.forbidden))(moves),
            taken=taken,
            contribution=contribution,
            accepted=moves.accepted if record.accepted else None,
            after=moves.after.x if record.after else None,
            lives=lives,
        )


def _chains_last(draw: Callable[[Array], Any], keys: Array) -> Any:
    """What is drawn with each key, with a last axis of chains.

    All numbers of a chain are one row when these are turned round: else the compiler makes a loop over each of the
    other axes, and what is drawn is computed in a short one (in ten dimensions that takes three times as long).
    """
    like = jax.eval_shape(draw, keys[0])
    rows = jax.vmap(lambda key: jax.tree.map(jnp.ravel, draw(key)), out_axes=-1)(keys)
    return jax.tree.map(lambda row, leaf: row.reshape(*leaf.shape, len(keys)), rows, like)


def _accepted(move: Any) -> Array:
    return jnp.where(move.log_ratio < jnp.inf, move.accepted, jnp.nan)


def _moved(tree: Any, axis: int, to: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, to), tree)


def _none(start: Point, plan: Plan) -> Alternatives:
    """Empty slots of a chain."""
    slots = () if plan.num_alternatives == 1 else (plan.num_alternatives,)
    points = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*slots, *leaf.shape)), start)
    previous, apart = (points.x, jnp.zeros(slots, bool)) if plan.consecutive else (None, None)
    return Alternatives(points, previous, apart, jnp.zeros(slots))


def _ages(taken: Array, lives: Array) -> Array:
    """Steps since the last birth in each slot that is not empty."""
    steps = jnp.arange(len(taken)).reshape(-1, *(1 for _ in lives.shape))
    return jnp.where(lives, len(taken) - jnp.max(jnp.where(taken, steps, 0), axis=0), 0)
