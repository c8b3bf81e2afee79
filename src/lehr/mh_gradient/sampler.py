"""Metropolis-Hastings, as the engine of alternatives sees it: a move, the births in it, and how others follow it."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.mh_gradient.births import FLIP, SCALE, SCORE, Birth, Ends, Strength, Weights, flip_coefficient
from lehr.mh_gradient.couplings import AbstractCoupling, Followed
from lehr.mh_gradient.kernel import Kernel, Move, choose
from lehr.mh_gradient.proposals import AbstractGaussian, difference
from lehr.mh_gradient.target import DensityRatio, Point
from lehr.numerics import uniform_pairs

#: how parameters of the proposal are differentiated
ProposalGradient = Literal["pathwise", "score", "weak"]
PROPOSAL_GRADIENTS = ("pathwise", "score", "weak")

#: maps a decision to the gradient of its log_factor in the parameters, as one row
Gradient = Callable[[Any], Array]


class Rule(NamedTuple):
    """How alternatives are born."""

    weights: Weights
    strength: Strength
    #: of the proposal's own parameters, where alternatives are born of them
    proposal_gradient: ProposalGradient | None


class Extra(NamedTuple):
    """Random numbers that only alternatives need."""

    #: uniform: whether an alternative is kept
    coin: Any
    #: uniform: which of several births
    choice: Any = None
    coupling: Any = None
    #: of a second proposal, and its acceptance
    fresh: Any = None
    log_uniform: Any = None
    #: a dimension, and an exponential number
    site: Any = None
    energy: Any = None


class Decided(NamedTuple):
    """Of a step: what follows neither from its noise nor from the rest."""

    after: Point
    otherwise: Point
    accepted: Any
    #: None if it is a difference of log densities, as quickly taken again
    log_ratio: Any


class MetropolisHastings(eqx.Module):
    """Steps of Metropolis-Hastings."""

    kernel: Kernel
    coupling: AbstractCoupling

    def start(self, x: Array) -> Point:
        """The first state."""
        return self.kernel.target.at(x)

    def noise(self, key: PRNGKeyArray, num_steps: int, x: Array) -> tuple[Any, Array]:
        """Of the chain itself: of its proposals, and log u."""
        key_proposal, key_accept = _split(key)[:2]
        dtype = jnp.result_type(float)
        return (
            self.kernel.proposal.noise(key_proposal, num_steps, x),
            -jax.random.exponential(key_accept, (num_steps,), dtype),
        )

    def extra(self, key: PRNGKeyArray, num_steps: int, x: Array, rule: Rule) -> Extra:
        """Of its alternatives, from the same key."""
        key_coupling, key_coin, key_choice, key_fresh, key_log, key_site, key_energy = _split(key)[2:]
        dtype, proposal = jnp.result_type(float), self.kernel.proposal
        several, weak = rule.proposal_gradient in ("score", "weak"), rule.proposal_gradient == "weak"
        fresh = rule.proposal_gradient == "score"
        shape = (num_steps,)
        coin, uniform = uniform_pairs(key_coin, num_steps, dtype)
        return Extra(
            coin=coin,
            choice=jax.random.uniform(key_choice, shape, dtype) if several else None,
            coupling=self.coupling.noise(proposal, key_coupling, uniform, x),
            fresh=proposal.noise(key_fresh, num_steps, x) if fresh else None,
            log_uniform=-jax.random.exponential(key_log, shape, dtype) if fresh else None,
            site=jax.random.randint(key_site, shape, 0, x.shape[0]) if weak else None,
            energy=jax.random.exponential(key_energy, shape, dtype) if weak else None,
        )

    def move(self, k: Array, point: Point, noise: Any) -> Move:
        """A step."""
        del k
        z, log_uniform = noise
        new = self.kernel.target.at(self.kernel.proposal.propose(point, z))
        log_ratio = self.kernel.log_ratio(new, point)
        accepted = log_uniform < log_ratio
        after, otherwise = choose(accepted, (new, point), (point, new))
        return Move(point, new, after, otherwise, accepted, log_ratio, log_uniform, z)

    def record(self, move: Move) -> Decided:
        """What of a step is to be kept, to know all of it again."""
        is_difference = self.kernel.proposal.symmetric and not isinstance(self.kernel.target.density, DensityRatio)
        ends = self._decision(move.after, move.otherwise, None)
        return Decided(
            move.after._replace(x=ends.low),
            move.otherwise._replace(x=ends.high),
            move.accepted,
            None if is_difference else move.log_ratio,
        )

    def recall(self, k: Array, did: Decided, noise: Any) -> Move:
        """The step that left this record."""
        del k
        z, log_uniform = noise
        x, x_otherwise = self.ends(Ends(did.after.x, z if self.kernel.proposal.involutive else did.otherwise.x))
        after, otherwise = did.after._replace(x=x), did.otherwise._replace(x=x_otherwise)
        new, old = choose(did.accepted, (after, otherwise), (otherwise, after))
        log_ratio = self.kernel.log_ratio(new, old) if did.log_ratio is None else did.log_ratio
        return Move(old, new, after, otherwise, did.accepted, log_ratio, log_uniform, z)

    def again(self, point: Point, z: Any, accepted: Array, used: Array) -> tuple[Point, Array]:
        """A step whose decision is known, and its log ratio where it is used: differentiable in all they depend on."""
        x_new = self.kernel.proposal.propose(point, z)
        # The gradient at a place that counts for nothing may be no number, and 0 times it is none.
        new = self.kernel.target.at(jnp.where(accepted | used, x_new, jax.lax.stop_gradient(point.x)))
        return choose(accepted, new, point), self.kernel.log_ratio(new, point)

    def follow(self, move: Move, other: Point, extra: Extra) -> Followed:
        """Where another chain goes."""
        return self.coupling.follow(self.kernel, move, other, extra.coupling)

    def ends(self, decision: Ends) -> tuple[Array, Array]:
        """The positions in a decision: of the first the density is positive."""
        proposal = self.kernel.proposal
        low = proposal.restored(decision.low)
        if proposal.involutive:
            return low, proposal.propose(Point(low, None, None), decision.high)
        return low, proposal.restored(decision.high)

    def _decision(self, low: Point, high: Point, noise: Any, tag: Any = None) -> Ends:
        """From one position to another, to which noise leads."""
        proposal = self.kernel.proposal
        return Ends(proposal.kept(low.x), noise if proposal.involutive else proposal.kept(high.x), tag)

    def newborn(self, move: Move, birth: Birth) -> Point:
        """The alternative that is born after a move."""
        return move.otherwise if birth.point is None else birth.point

    def log_factor(self, decision: Ends) -> Float[Array, ""]:
        """What weights are gradients of.

        Of a flip the log ratio of a step from low to high, for a `DensityRatio` the ratio; else log q, or a log scale.
        """
        tag, (low, high) = decision.tag, self.ends(decision)
        target, proposal = self.kernel.target, self.kernel.proposal
        old, new = target.at(low), target.at(high)
        if isinstance(target.density, DensityRatio):
            return target.density.ratio(target.params, high, low) * jnp.exp(proposal.log_ratio(new, old))
        flip = self.kernel.log_ratio(new, old)
        if tag is None:
            return flip
        found = jnp.where(tag == SCORE, proposal.log_prob(old, high), flip)
        if isinstance(proposal, AbstractGaussian) and proposal.scale.value.ndim < 2:
            log_scale = jnp.broadcast_to(jnp.log(proposal.scale.value), low.shape)
            found = jnp.where(tag >= SCALE, log_scale[jnp.maximum(tag - SCALE, 0)], found)
        return found

    def birth(self, move: Move, extra: Extra, rule: Rule, gradient: Gradient | None) -> Birth:
        """The alternative to this step; of several one, by a coin."""
        flip = self._flip(move, rule, gradient)
        if rule.proposal_gradient == "score":
            other = self._fresh(move, extra, rule, gradient)
        elif rule.proposal_gradient == "weak":
            other = self._wider(move, extra, rule, gradient)
        else:
            return flip
        total = flip.strength + other.strength
        share = other.strength / jnp.where(total > 0, total, 1)
        chosen = choose(extra.choice < share, other, flip)
        probability = jnp.where(extra.choice < share, share, 1 - share)
        coefficient = jnp.where(chosen.strength > 0, chosen.coefficient / probability, 0)
        return chosen._replace(coefficient=coefficient, strength=total)

    def _flip(self, move: Move, rule: Rule, gradient: Gradient | None) -> Birth:
        tag = None if rule.proposal_gradient is None else jnp.asarray(FLIP)
        ends = self._decision(move.after, move.otherwise, move.noise, tag)
        # Explicitly: the derivative of min(1, exp r) at r = 0 would be one half.
        alpha = jnp.exp(jnp.minimum(move.log_ratio, 0))
        moved = move.log_ratio < 0
        # Of a log density, grad alpha = alpha grad r. Of a ratio R it is grad R; and in that of the way back, which an
        # acceptance's flip is, -alpha^2 grad (1 / R).
        in_ratio = isinstance(self.kernel.target.density, DensityRatio)
        slope = moved * (1.0 if in_ratio else alpha)
        unit = jnp.where(move.accepted, alpha**2, 1.0) if in_ratio else 1.0
        row = None if gradient is None else unit * gradient(ends)
        rises = None if row is None else (row[0] > 0) != move.accepted
        coefficient = flip_coefficient(rule.weights, move.accepted, alpha, slope, rises)
        distance = self.kernel.proposal.changed(move.after.x, move.otherwise.x).astype(coefficient.dtype)
        strength = strength_of(rule.strength, coefficient, distance, row)
        # Of several births each has a point.
        return Birth(None if ends.tag is None else move.otherwise, ends, unit * coefficient, strength)

    def _fresh(self, move: Move, extra: Extra, rule: Rule, gradient: Gradient | None) -> Birth:
        """grad log q(x, x') [F(x') - F(x'')], x'' another draw from x: the score, with a baseline of its own."""
        again = self.move(jnp.asarray(0), move.old, (extra.fresh, extra.log_uniform))
        ends = self._decision(move.old, move.new, move.noise, jnp.asarray(SCORE))
        coefficient = -jnp.ones_like(move.log_ratio)
        row = None if gradient is None else gradient(ends)
        distance = difference(again.after.x, move.after.x).astype(coefficient.dtype)
        return Birth(again.after, ends, coefficient, strength_of(rule.strength, coefficient, distance, row))

    def _wider(self, move: Move, extra: Extra, rule: Rule, gradient: Gradient | None) -> Birth:
        """The weak derivative of a Gaussian in its scale, along one dimension, drawn at random.

        d/ds E[g(s z)] = (1/s) (E[g(s m)] - E[g(s z)]), m of the density m^2 N(m; 0, 1): m^2 ~ chi^2 with three degrees
        of freedom, which is z^2 and twice an exponential number.
        """
        z = move.noise
        m = jnp.where(z[extra.site] < 0, -1, 1) * jnp.sqrt(z[extra.site] ** 2 + 2 * extra.energy)
        wider = self.move(jnp.asarray(0), move.old, (z.at[extra.site].set(m), move.log_uniform))
        ends = self._decision(move.old, move.new, move.noise, SCALE + extra.site)
        coefficient = jnp.full_like(move.log_ratio, z.shape[0])
        row = None if gradient is None else gradient(ends)
        distance = difference(wider.after.x, move.after.x).astype(coefficient.dtype)
        return Birth(wider.after, ends, coefficient, strength_of(rule.strength, coefficient, distance, row))


def _split(key: PRNGKeyArray) -> Array:
    """Keys of all that is drawn for a chain and its alternatives: at once, for a split takes as long as a draw."""
    return jax.random.split(key, 9)


def strength_of(strength: Strength, coefficient: Array, distance: Array, row: Array | None) -> Array:
    """How much an alternative wants to be kept; 0 exactly where it is none."""
    if strength == "distance":
        return jnp.abs(coefficient) * jnp.sqrt(jnp.sum(distance**2))
    if strength == "acceptance":
        value = jnp.abs(coefficient)
    elif strength == "gradient":
        assert row is not None
        value = jnp.abs(coefficient) * jnp.sqrt(jnp.sum(row**2))
    else:
        value = jnp.ones_like(coefficient)
    return jnp.where((coefficient != 0) & jnp.any(distance != 0), value, 0)
