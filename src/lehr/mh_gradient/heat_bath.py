"""The heat bath (Gibbs sampler) for spins on a graph: all sites of a colour at once."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from lehr.errors import InputError, check_whole
from lehr.mh_gradient.births import Birth, flip_coefficient
from lehr.mh_gradient.couplings import Followed
from lehr.mh_gradient.discrete import check_spins, flipped, spins_kept, spins_of
from lehr.mh_gradient.kernel import at_same_place
from lehr.mh_gradient.sampler import Extra, Gradient, Rule
from lehr.mh_gradient.target import DensityRatio, Point, Target
from lehr.numerics import is_concrete, uniform_pairs


class HeatBath(eqx.Module):
    """Each step draws all spins of one colour from their law given the others, the colours in turn:

        P(x_i = +1 | rest) = sigmoid(2 d log p / d x_i),

    the derivative of a log density that is linear in each spin (on spins every function can be written so; x_i^2
    is 1, and should be). One gradient of the log density serves all sites. Takes the place of a proposal; couple it
    with `MonotoneSpin`, by which both chains use the same random numbers.

    Arguments:
        colours: `(dim,)`, whole numbers from 0; no two sites of one colour may interact. Positions are floats, +1
            and -1.

    An alternative is one site turned over, drawn from all of the colour in proportion to its strength.

    Raises `lehr.errors.InputError` for other colours; in use, for log densities that are not linear in each spin, or
    sites of one colour that interact.

    Source: Geman, Geman 1984.
    """

    colours: np.ndarray
    #: as many steps are a sweep
    num_colours: int = eqx.field(static=True)

    def __init__(self, colours: ArrayLike | Sequence[int]):
        array = np.asarray(colours)
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise InputError("the colours of HeatBath must be whole numbers, one for each site")
        if set(array.tolist()) != set(range(int(array.max()) + 1)):
            raise InputError(
                f"the colours of HeatBath must be 0, 1, ... without a gap, but they are {set(array.tolist())}"
            )
        self.colours, self.num_colours = array, int(array.max()) + 1

    @classmethod
    def checkerboard(cls, *shape: int) -> "HeatBath":
        """For a periodic lattice of even sides, with neighbours along its axes, flattened in C order.

        Raises `lehr.errors.InputError` for odd sides.
        """
        sides = [check_whole("a side of the checkerboard", side, 2) for side in shape]
        if not sides or any(side % 2 for side in sides):
            raise InputError(f"a periodic checkerboard needs even sides, but the shape is {shape}")
        return cls(np.indices(shape).sum(axis=0).ravel() % 2)

    def check(self, x: Any) -> None:
        """Raises `InputError` for positions that it cannot move."""
        check_spins(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError("HeatBath takes spins as floats, for their derivatives: give x0 as +1.0 and -1.0")
        if x.shape[-1:] != self.colours.shape:
            raise InputError(f"HeatBath has colours of {len(self.colours)} sites, but x0 has the shape {x.shape}")

    def check_density(self, target: Target, x: Any) -> None:
        """Raises `InputError` for a log density of which the derivative is not half of the log odds."""
        if isinstance(target.density, DensityRatio):
            raise InputError("HeatBath needs a log density: a DensityRatio is for proposals")
        if not is_concrete(x) or not all(map(is_concrete, jax.tree.leaves(target.params))):
            return
        # Also inside of a function that is compiled, where nothing of this depends on its arguments.
        with jax.ensure_compile_time_eval():
            change, expected, influence, scale = map(np.asarray, _turned(target, jnp.asarray(x)))
        site = int(np.argmax(np.abs(change - expected)))
        if not np.abs(change - expected)[site] < scale:
            raise InputError(
                f"the log density is not linear in spin {site}: turned over it changes by {change[site]:.4g}, but its "
                f"derivative says {expected[site]:.4g}: leave out what is the square of a spin"
            )
        same = (self.colours[:, None] == self.colours) & ~np.eye(len(self.colours), dtype=bool)
        if np.any(influence[same] > scale):
            site = int(np.argmax(np.where(same, influence, 0).max(axis=1)))
            raise InputError(f"spin {site} interacts with others of its colour: give them other colours")


@eqx.filter_jit
def _turned(target: Target, x: Array) -> tuple[Array, Array, Array, Array]:
    """For each site turned over: how the log density changes, and should; how much all derivatives do; what counts."""

    def both(x: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(lambda x: target.at(x).log_prob)(x)

    value, half = both(x)
    values, halves = jax.vmap(lambda site: both(x.at[site].multiply(-1)))(jnp.arange(x.shape[0]))
    change = values - value
    scale = 1e-3 * jnp.maximum(1.0, jnp.maximum(jnp.max(jnp.abs(change)), jnp.abs(value)))
    return change, -2 * x * half, jnp.abs(halves - half), scale


class Sweep(NamedTuple):
    """A step: the spins of one colour were drawn, each up where its log odds are above a logistic number."""

    after: Point
    #: the share of the spins that turned over
    accepted: Float[Array, ""]
    colour: Bool[Array, " dim"]
    log_odds: Float[Array, " dim"]
    logistic: Float[Array, " dim"]

    @property
    def log_ratio(self) -> Array:
        """Finite, if the log odds are numbers: every state can be reached."""
        return jnp.where(jnp.any(jnp.isnan(self.log_odds)), jnp.nan, 0.0)

    @property
    def forbidden(self) -> Array:
        """Nothing is proposed."""
        return jnp.asarray(False)


class Drawn(NamedTuple):
    """Of a step: what follows neither from its number nor from its noise."""

    #: with the position in the form that is kept
    after: Point
    accepted: Float[Array, ""]
    log_odds: Float[Array, " dim"]


class SpinDecision(NamedTuple):
    """A decision: where the chain is, and the spin that would be the other way up."""

    #: in the form that is kept
    x: Bool[Array, " dim"]
    site: Int[Array, ""]


class HeatBathSampler(eqx.Module):
    """Steps of the heat bath."""

    target: Target
    proposal: HeatBath

    def start(self, x: Array) -> Point:
        """The first state. (Of the density its derivative in the spins is all that is used.)"""
        return self.target.at(x)

    def noise(self, key: PRNGKeyArray, num_steps: int, x: Array) -> Array:
        """Of the chain itself: a logistic number L for each spin, P(L < r) = sigmoid(r).

        (So that no chain or alternative takes an exponential of its own.)
        """
        key_spins, _ = jax.random.split(key)
        return jax.random.logistic(key_spins, (num_steps * x.shape[0],), x.dtype).reshape(num_steps, *x.shape)

    def extra(self, key: PRNGKeyArray, num_steps: int, x: Array, rule: Rule) -> Extra:
        """Of its alternatives, from the same key: whether one is kept, and at which site."""
        del rule
        _, key_coin = jax.random.split(key)
        return Extra(*uniform_pairs(key_coin, num_steps, x.dtype))

    def move(self, k: Array, point: Point, noise: Array) -> Sweep:
        """A step."""
        colour = self._colour(k)
        x, log_odds = self._drawn(point, colour, noise)
        accepted = jnp.sum(jnp.abs(x - point.x)) / 2 / jnp.sum(colour)
        return Sweep(Point(x, point.log_prob, None), accepted, colour, log_odds, noise)

    def record(self, move: Sweep) -> Drawn:
        """What of a step is to be kept, to know all of it again."""
        return Drawn(move.after._replace(x=spins_kept(move.after.x)), move.accepted, move.log_odds)

    def recall(self, k: Array, did: Drawn, noise: Array) -> Sweep:
        """The step that left this record."""
        after = did.after._replace(x=spins_of(did.after.x))
        return Sweep(after, did.accepted, self._colour(k), did.log_odds, noise)

    def follow(self, move: Sweep, other: Point, extra: Any) -> Followed:
        """Where another chain goes: by the same logistic numbers."""
        del extra
        x, _ = self._drawn(other, move.colour, move.logistic)
        return Followed(Point(x, other.log_prob, None), at_same_place(x, move.after.x))

    def ends(self, decision: SpinDecision) -> tuple[Array, Array]:
        """Where the chain is, and where it would be: of the first the density is positive."""
        x = spins_of(decision.x)
        return x, flipped(x, decision.site)

    def newborn(self, move: Sweep, birth: Birth) -> Point:
        """The alternative that is born after a move."""
        return Point(flipped(move.after.x, birth.decision.site), move.after.log_prob, None)

    def log_factor(self, decision: SpinDecision) -> Float[Array, ""]:
        """log p(high) - log p(low)."""
        both = jax.vmap(lambda x: self.target.at(x).log_prob)(jnp.stack(self.ends(decision)))
        return both[1] - both[0]

    def birth(self, move: Sweep, extra: Extra, rule: Rule, gradient: Gradient | None) -> Birth:
        """One site turned over, in proportion to the strength of each."""
        if gradient is not None:
            raise InputError("HeatBath knows no gradient of each site: take another strength, and two-sided weights")
        up, p = move.after.x > 0, jax.nn.sigmoid(move.log_odds)
        coefficients = flip_coefficient(rule.weights, up, p, p * (1 - p), None)
        strengths = jnp.ones_like(p) if rule.strength == "uniform" else coefficients
        strengths = jnp.where(move.colour & (coefficients != 0), strengths, 0)
        site, total = _site_by(strengths, extra.choice)
        share = strengths[site] / jnp.where(total > 0, total, 1)
        # Rounding may end at a site that cannot be chosen.
        found = share > 0
        coefficient = jnp.where(found, coefficients[site] / jnp.where(found, share, 1), 0)
        return Birth(None, SpinDecision(spins_kept(move.after.x), site), coefficient, jnp.where(found, total, 0))

    def _colour(self, k: Array) -> Array:
        return jnp.asarray(self.proposal.colours) == k % self.proposal.num_colours

    def _drawn(self, point: Point, colour: Array, logistic: Array) -> tuple[Array, Array]:
        log_odds = 2 * jax.grad(lambda x: self.target.at(x).log_prob)(point.x)
        return jnp.where(colour, jnp.where(logistic < log_odds, 1, -1).astype(point.x.dtype), point.x), log_odds


def _site_by(strengths: Float[Array, " dim"], uniform: Array) -> tuple[Array, Array]:
    """A site, in proportion to its strength, by a uniform number; and the sum of all.

    First a block of sites, then one of these: two short sums take less time than a running one over all.
    """
    num = strengths.shape[0]
    width = math.isqrt(num - 1) + 1
    blocks = jnp.pad(strengths, (0, -num % width)).reshape(-1, width)
    of_blocks = jnp.cumsum(jnp.sum(blocks, axis=1))
    total = of_blocks[-1]
    aim = uniform * total
    block = jnp.minimum(jnp.sum(of_blocks <= aim), len(blocks) - 1)
    before = jnp.where(block > 0, of_blocks[block - 1], 0)
    within = jnp.sum(before + jnp.cumsum(blocks[block]) <= aim)
    return jnp.minimum(block * width + jnp.minimum(within, width - 1), num - 1), total
