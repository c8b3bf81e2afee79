"""Finds a base from which the path to the target is short: candidates, each tried by a pilot run, the best refitted."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection, Chain, TriangularAffine
from flowjax.distributions import StandardNormal, Transformed
from jaxtyping import Array, Float, PRNGKeyArray
from paramax import unwrap

from lehr.bases import find_modes, laplace, moment_matched
from lehr.errors import InputError
from lehr.flows import flow_matched
from lehr.path import Problem
from lehr.pilot import Pilot, pilot
from lehr.transport import PulledBack, gaussian_map

#: searches for modes: half the mass in each of two basins is missed once in 2^15 times
_NUM_STARTS = 16
#: a Gaussian is fitted to the moments of draws up to here: above, the draws needed cost more than the path they shorten
_LARGEST_FOR_MOMENTS = 300
#: a flow is fitted up to here
_LARGEST_FOR_FLOW = 100
#: a flow is tried if the path from the best Gaussian is longer than this
_SHORT_ENOUGH = 1.5
#: a base with a shorter path is the target, up to the noise of a pilot run
_NEARLY_EXACT = 0.3
#: flows are fitted at most so often
_MOST_FLOWS = 5


class Candidate(NamedTuple):
    """A base, as a problem in the coordinates where it is simple, and what a pilot run saw of the path from it.

    `bijection` maps those coordinates to the target's (None: they are the same).
    """

    name: str
    problem: Problem
    bijection: AbstractBijection | None
    run: Pilot

    @property
    def barrier(self) -> float:
        """The length of the path."""
        return float(self.run.barrier[-1])

    @property
    def log_evidence(self) -> float:
        """Of the pilot run."""
        return float(self.run.log_evidence)

    @property
    def noise(self) -> float:
        """How far off the pilot's log evidence may be: 1.5 standard errors for perfect mixing, and a little.

        Not more: to keep a base with a longer path costs gradients, to take one that misses a mode costs the answer.
        """
        return 1.5 * self.barrier / math.sqrt(self.run.positions.shape[0]) + 0.1

    @property
    def draws(self) -> Float[Array, "n dim"]:
        """Dependent draws of the target, in the candidate's coordinates; those of one particle follow each other."""
        return self.families.reshape(-1, self.run.positions.shape[1])

    @property
    def families(self) -> Float[Array, "num_particles num_draws dim"]:
        """The same by particle."""
        return jnp.swapaxes(self.run.draws, 0, 1)

    def push(self, z: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
        """Positions of the candidate's problem, in the coordinates of the target."""
        return z if self.bijection is None else jax.vmap(self.bijection.transform)(z).astype(z.dtype)

    def beats(self, other: "Candidate") -> bool:
        """Whether it found more of the target, or as much on a shorter path.

        A base that does not cover the target gives a log evidence that is too low, with a short path to it.
        """
        return self.covers(other) and (self.barrier < other.barrier or not other.covers(self))

    def covers(self, other: "Candidate") -> bool:
        """Whether it found as much of the target as the other, as far as the noise of both can tell."""
        if not math.isfinite(self.log_evidence) or not bool(self.run.finished):
            return False
        return self.log_evidence > other.log_evidence - math.hypot(self.noise, other.noise)


class Fitted(NamedTuple):
    """The best candidate, all that were tried (the best too), and the gradients all of it took."""

    best: Candidate
    tried: list[Candidate]
    num_gradients: int
    num_modes: int


def find_base(
    key: PRNGKeyArray,
    problem: Problem,
    *,
    fit_base: bool = True,
    max_gradients: int = 300_000,
    say: Callable[[str], Any] = lambda text: None,
) -> Fitted:
    """Tries bases by pilot runs, and refits the best to the particles of its run while that shortens the path.

    In order: the given base; the Laplace approximation at the modes that L-BFGS finds from draws of the base; Gaussians
    with the moments of the best run's particles; the best of these widened; and if the path is still long, flows, each
    gone on with from the one before and fitted to the draws of all runs from flows so far.

    Arguments:
        key: a PRNG key.
        problem: base and target.
        fit_base: if false, only the given base.
        max_gradients: no further candidate is begun when these are spent.
        say: called with one line on each candidate.

    Raises `lehr.errors.InputError` if no base reaches the target.

    **Gradient**: not meant to be differentiated.
    """
    search = _Search(key, problem, max_gradients, say)
    dimension = problem.position.shape[0]
    # A run of N particles on a long path takes about 400 N gradients: so that the first takes half of them.
    small = int(min(256, max(32, 2 ** math.floor(math.log2(max(max_gradients / 800, 1))))))
    large = min(512, 4 * small)
    search.consider("given", None, small)
    num_modes = 0
    if fit_base:
        modes = search.modes()
        num_modes = len(modes)
        if modes:
            name = "Laplace approximation" + (f" of {num_modes} modes" if num_modes > 1 else "")
            search.consider(name, laplace(modes), small)
        if dimension <= _LARGEST_FOR_MOMENTS:
            search.refit_moments(large)
            search.refit_moments(large)
        search.widen(large)
        if 2 <= dimension <= _LARGEST_FOR_FLOW:
            search.refit_flows(jax.random.fold_in(key, 100), large)
    if search.best is None:
        raise InputError(
            "no run from the base reached the target: give a base that covers the target's support, or more gradients"
        )
    return Fitted(search.best, search.tried, search.num_gradients, num_modes)


class _Search:
    """The candidates so far."""

    def __init__(self, key: PRNGKeyArray, problem: Problem, max_gradients: int, say: Callable[[str], Any]):
        self.key, self.problem, self.max_gradients, self.say = key, problem, max_gradients, say
        self.best: Candidate | None = None
        self.tried: list[Candidate] = []
        self.num_gradients = 0

    @property
    def exhausted(self) -> bool:
        return self.num_gradients > self.max_gradients

    def modes(self) -> list:
        """The modes that searches from draws of the base find; none if the density has none that can be used."""
        starts = self.problem.base.sample(jax.random.fold_in(self.key, 50), (_NUM_STARTS,))
        try:
            modes, num_gradients = find_modes(self.problem.log_target, starts)
        except InputError as error:
            self.say(f"no Laplace approximation: {error}")
            return []
        self.num_gradients += num_gradients
        return modes

    def refit_moments(self, num_particles: int) -> None:
        """Considers the Gaussian with the moments of the best run's particles."""
        if self.best is None or self.best.barrier < _SHORT_ENOUGH or self.exhausted:
            return
        # In the coordinates of the best base, where shrinkage is towards that base.
        draws, within = self.best.draws, self.best.bijection
        fitted = _composed(moment_matched(draws), within)
        self.consider(f"Gaussian with the moments of {len(draws):,} draws", fitted, num_particles)

    def widen(self, num_particles: int) -> None:
        """Takes the best Gaussian wider, unless it is (almost) the target, or was given.

        Its path is little longer. But what lies beyond the reach of its draws, in tails heavier than a Gaussian's, is
        otherwise found by moves alone, now and then: the estimates are low but for a few, by tenths of their error.
        """
        best = self.best
        if best is None or best.bijection is None or best.barrier < _NEARLY_EXACT or self.exhausted:
            return
        self.consider(f"{best.name}, widened", _composed(_wider(best.bijection), best.bijection), num_particles)
        latest = self.tried[-1]
        if latest.covers(best) and latest.barrier < best.barrier + 0.5:
            self.best = latest

    def refit_flows(self, key: PRNGKeyArray, num_particles: int) -> None:
        """Considers flows, each gone on with from the last by the particles of its run, while the path shortens.

        None if particles held out of the fit show that nothing is gained over a Gaussian.
        """
        if self.best is None or self.best.barrier < _SHORT_ENOUGH or self.exhausted:
            return
        if self.best.run.positions.shape[0] < num_particles:
            self.consider(self.best.name, self.best.bijection, num_particles)
        # The coordinates stay as they are, so that a flow can be gone on with.
        latest, flow, standard = self.best, None, moment_matched(self.best.push(self.best.draws))
        seen = []
        for i in range(_MOST_FLOWS):
            key_hold, key_fit = jax.random.split(jax.random.fold_in(key, i))
            draws = jax.vmap(standard.inverse)(latest.push(latest.draws)).reshape(latest.families.shape)
            if flow is None and not _gains(key_hold, draws):
                self.say("a coupling flow fits the particles no better than a Gaussian")
                return
            # Of all the runs: fitted to the last alone, a flow loses what that run missed, and so does the next run.
            seen.append(draws)
            flow = flow_matched(key_fit, jnp.concatenate(seen), start=flow)
            name = f"coupling flow fitted {i + 1} times to {sum(len(part) * part.shape[1] for part in seen):,} draws"
            if not self.consider(name, Chain([_wider(flow), flow, standard]), num_particles):
                return
            latest = self.tried[-1]
            if not math.isfinite(latest.log_evidence):
                return
            # Tails are found last: a later flow is better for a path a little longer.
            if latest.covers(self.best) and latest.barrier < 1.5 * self.best.barrier:
                self.best = latest

    def consider(self, name: str, bijection: AbstractBijection | None, num_particles: int) -> bool:
        """Tries a base by a pilot run, which may become the best, unless the gradients are spent: then False."""
        if self.best is not None and self.exhausted:
            return False
        problem = self.problem
        if bijection is not None:
            bijection = _cast(bijection, problem.position.dtype)
            base = StandardNormal(problem.position.shape)
            problem = Problem(base, PulledBack(problem.log_target, bijection))
        run = pilot(jax.random.fold_in(self.key, len(self.tried)), problem, num_particles=num_particles)
        candidate = Candidate(name, problem, bijection, run)
        self.num_gradients += int(run.num_gradients)
        self.tried.append(candidate)
        self.say(f"{name}: log Z about {candidate.log_evidence:.2f}, barrier {candidate.barrier:.2f}")
        better = math.isfinite(candidate.log_evidence) if self.best is None else candidate.beats(self.best)
        # The same base with more particles replaces itself.
        if better or (self.best is not None and bijection is self.best.bijection):
            self.best = candidate
        return True


def _composed(inner: AbstractBijection, outer: AbstractBijection | None) -> AbstractBijection:
    """outer(inner(z)); of two triangular maps a triangular map again, so that what is compiled for one serves both."""
    if outer is None:
        return inner
    if isinstance(inner, TriangularAffine) and isinstance(outer, TriangularAffine):
        a, b = unwrap(outer), unwrap(inner)
        return TriangularAffine(a.transform(b.loc), a.triangular @ b.triangular)
    return Chain([inner, outer])


def _gains(key: PRNGKeyArray, draws: Float[Array, "num_families num_draws dim"]) -> bool:
    """Whether a flow's mean log density of held-out draws is significantly above that of a Gaussian.

    An eighth of the families is held out of both fits.
    """
    held_out, rest = jnp.split(draws, [len(draws) // 8])
    standard = StandardNormal(draws.shape[2:])

    def log_prob(bijection: AbstractBijection) -> Array:
        return Transformed(standard, bijection).log_prob(held_out)

    difference = log_prob(flow_matched(key, rest)) - log_prob(moment_matched(rest.reshape(-1, draws.shape[2])))
    by_family = difference.mean(axis=1)
    return bool(jnp.mean(by_family) > 2 * jnp.std(by_family) / math.sqrt(len(by_family)))


def _wider(bijection: AbstractBijection) -> AbstractBijection:
    """A map to go before another: wider by a factor that costs the same in every dimension.

    A standard Gaussian is d (s - 1)^2 nats, to second order, from one that is s times as wide: here 0.36.
    """
    (dimension,) = bijection.shape
    scale = jnp.full(dimension, 1 + 0.6 / math.sqrt(dimension))
    # Of the kind that composes with a triangular map to one.
    return gaussian_map(jnp.zeros(dimension), jnp.diag(scale) if isinstance(bijection, TriangularAffine) else scale)


def _cast(bijection: AbstractBijection, dtype: Any) -> AbstractBijection:
    """Its arrays in the dtype of the positions: a float64 map would widen float32 positions.

    Without FlowJAX's parametrisations, which hold functions of their own, so that nothing is compiled twice.
    """
    bijection = unwrap(bijection)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, bijection)
