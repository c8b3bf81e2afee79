"""The front door for modellers: the log evidence of a problem, bracketed and with an error bar, without tuning."""

import dataclasses
import math
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.engine import FEWEST_TO_JUDGE, Engine
from lehr.errors import InputError
from lehr.fitting import find_base
from lehr.path import Problem
from lehr.progress import Progress
from lehr.report import Evidence, Round, in_words
from lehr.runless import from_pilot, without_dimensions
from lehr.smc import Population, thermodynamic_integral
from lehr.support import Guarded, Support, look_at
from lehr.transport import PulledBack

#: as long as there are gradients no error is a reason to stop with fewer populations: estimates of Z are skewed to the
#: right, so that a low mean comes with a low error; stopping where the error is low would make that worse
_FEWEST_TO_STOP = 32
#: share of the gradients that the search for a base may take
_SHARE_FOR_FITTING = 0.4


def evidence(
    key: PRNGKeyArray,
    problem: Problem,
    *,
    tolerance: float = 0.05,
    max_gradients: int = 1_000_000,
    num_particles: int = 64,
    fit_base: bool = True,
    posterior_draws: Float[Array, "num_draws dim"] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Evidence:
    """The log evidence log Z of a problem, with its standard error and a bracket.

    Fits a base (`lehr.fitting.find_base`), tunes schedule, step sizes and masses along the path from it, and then runs
    independent populations of annealed sequential Monte Carlo with HMC moves, every one of them followed by annealing
    its draws back. Tuning ends before the first of the runs that count, so that it cannot bias them. The number of
    populations doubles until both ends of the bracket are within `tolerance` of the estimate, or `max_gradients` are
    spent; what then speaks against the estimate is said in its warnings.

    Arguments:
        key: a PRNG key.
        problem: base and target; the base need only cover the target roughly.
        tolerance: in nats.
        max_gradients: of the target, for everything, tuning included. (The first pilot run, at least 32 particles, is
            not cut short: a budget of a few thousand may be exceeded.)
        num_particles: N, particles of a population.
        fit_base: if false, the path starts from the given base as it is.
        posterior_draws: exact draws of the posterior, `(num_draws, dim)`, if there are any (the data are simulated):
            the upper end of the bracket is then a bound.
        batch_size: particles in memory at once (default: 4 populations a device).
        progress: whether to show a progress bar, with the estimate and its bracket, on standard error.

    Returns an `Evidence`.

    **Gradient**: not meant to be differentiated: `lehr.objectives.davi` is.

    Raises `lehr.errors.InputError` for options out of range, a density that is nowhere finite on draws of the base or
    infinite at any of them, or no base from which the target was reached.

    Source: Syed, Bouchard-Cote, Chern, Doucet 2024 (spacing the schedule); Grosse, Ghahramani, Adams 2015 (the
    bracket); Del Moral, Doucet, Jasra 2006.
    """
    started = time.monotonic()
    _check(problem, tolerance, max_gradients, num_particles, batch_size, posterior_draws)
    if problem.position.shape == (0,):
        return without_dimensions(problem, tolerance, started)
    key_support, key_fit, key_cover, key_tune, key_run = jax.random.split(key, 5)
    support = faults = look_at(key_support, problem)
    guarded = Problem(problem.base, Guarded(problem.log_target), problem.unravel)
    with Progress(max_gradients, show=progress) as display:
        fitted = find_base(
            key_fit,
            guarded,
            fit_base=fit_base,
            max_gradients=int(_SHARE_FOR_FITTING * max_gradients),
            say=lambda text: display.at(0, text),
        )
        if fitted.best.bijection is not None:
            covering = PulledBack(problem.log_target, fitted.best.bijection)
            support = look_at(key_cover, Problem(fitted.best.problem.base, covering))
            # Also NaN at which only the given base has draws is reported.
            faults = max(faults, support, key=lambda seen: seen.num_invalid / seen.num_draws)
        engine = Engine(fitted, num_particles, batch_size, max_gradients)
        engine.tune(key_tune)
        ledger = _Ledger(engine, support, faults, tolerance, posterior_draws)
        interrupted, goal = False, FEWEST_TO_JUDGE // 2
        try:
            while ledger.add(jax.random.fold_in(key_run, len(ledger.blocks))):
                if ledger.num_populations >= goal:
                    goal *= 2
                    if ledger.close_round().reach <= tolerance and ledger.num_populations >= _FEWEST_TO_STOP:
                        break
                # As of the last round: every new number of populations would be compiled for.
                display.at(engine.spent, ledger.line())
        except KeyboardInterrupt:
            if not ledger.blocks:
                raise
            interrupted = True
    seconds = time.monotonic() - started
    if not ledger.blocks:
        return from_pilot(guarded, engine, faults, tolerance, seconds)
    return ledger.report(guarded, interrupted=interrupted, seconds=seconds)


class _Ledger:
    """What the runs that count have given so far."""

    def __init__(
        self, engine: Engine, support: Support, faults: Support, tolerance: float, posterior_draws: Array | None
    ):
        self.engine, self.support, self.faults, self.tolerance = engine, support, faults, tolerance
        self.rounds: list[Round] = []
        self.blocks: list[tuple] = []
        self.exact = None
        if posterior_draws is not None:
            bijection = engine.candidate.bijection
            draws = jnp.asarray(posterior_draws, engine.problem.position.dtype)
            self.exact = draws if bijection is None else jax.vmap(bijection.inverse)(draws).astype(draws.dtype)

    @property
    def num_populations(self) -> int:
        return len(self.blocks) * self.engine.num_together

    def add(self, key: PRNGKeyArray) -> bool:
        """One more block forwards and back, unless the gradients do not suffice: then False."""
        engine = self.engine
        if engine.spent + 2 * engine.cost > engine.max_gradients:
            return False
        key_forward, key_backward, key_draws = jax.random.split(key, 3)
        population = engine.forward(key_forward)
        positions, log_weights = population.positions, population.log_weights
        if self.exact is not None:
            positions = self.exact[jax.random.randint(key_draws, log_weights.shape, 0, len(self.exact))]
            log_weights = jnp.zeros_like(log_weights)
        backward = engine.backward(key_backward, positions, log_weights) + self.support.log_share
        block = _block(population, engine.annealer.schedule.betas, engine.candidate.bijection)
        self.blocks.append(jax.tree.map(np.asarray, (*block, backward)))
        return True

    def so_far(self, *, problem: Problem | None = None, seconds: float = 0.0) -> Evidence:
        """The result of all blocks; with `problem` also the draws as it names them."""
        forward, positions, log_weights, paths, integrals, backward = jax.tree.map(
            lambda *parts: jnp.concatenate(parts), *self.blocks
        )
        draws = None
        if problem is not None:
            draws = positions if problem.unravel is None else jax.vmap(jax.vmap(problem.unravel))(positions)
        engine = self.engine
        return Evidence(
            forward=forward,
            backward=backward,
            positions=positions,
            log_weights=log_weights,
            draws=draws,
            betas=engine.annealer.schedule.betas,
            path=jax.tree.map(lambda leaf: leaf.mean(axis=0), paths),
            thermodynamic=integrals,
            base=engine.candidate.name,
            rounds=tuple(self.rounds),
            num_gradients=engine.spent,
            seconds=seconds,
            num_invalid=self.faults.num_invalid,
            exact_upper=self.exact is not None,
            converged=False,
            tolerance=self.tolerance,
            warnings=(),
        )

    def close_round(self) -> Evidence:
        """Notes the estimate as it is now."""
        now = self.so_far()
        value, error = float(now.log_evidence), float(now.standard_error)
        self.rounds.append(Round(self.num_populations, self.engine.spent, value, error, now.lower, now.upper))
        return now

    def line(self) -> str:
        """The estimate and its bracket, for the progress bar."""
        if not self.rounds:
            return "first populations"
        last = self.rounds[-1]
        value = in_words(last.log_evidence, last.standard_error)
        return f"log Z = {value}, between {last.lower.value:.2f} and {last.upper.value:.2f}"

    def report(self, problem: Problem, *, interrupted: bool, seconds: float) -> Evidence:
        """The report of all blocks, with what speaks against it."""
        if not self.rounds or self.rounds[-1].num_populations != self.num_populations:
            self.close_round()
        result = self.so_far(problem=problem, seconds=seconds)
        if not math.isfinite(result.log_evidence):
            raise InputError(
                f"the estimate of the log evidence is {float(result.log_evidence)}: the density is infinite, or zero, "
                "wherever the runs ended; check it near its mode"
            )
        doubts = (*_doubts(result, self.engine, self.faults), *(["It was interrupted."] if interrupted else []))
        return dataclasses.replace(result, warnings=doubts, converged=not doubts)


@eqx.filter_jit
def _block(population: Population, betas: Array, bijection: Any) -> tuple:
    """What is kept of each population of a block."""
    positions = population.positions
    if bijection is not None:
        positions = jax.vmap(jax.vmap(bijection.transform))(positions).astype(positions.dtype)
    return (
        jax.vmap(lambda p: p.log_evidence)(population),
        positions,
        population.log_weights,
        population.path,
        jax.vmap(lambda path: thermodynamic_integral(betas, path))(population.path),
    )


def _doubts(result: Evidence, engine: Engine, support: Support) -> list[str]:
    """One sentence on each thing that speaks against a result."""
    doubts = []
    if result.forward.shape[0] < FEWEST_TO_JUDGE:
        doubts.append(
            f"max_gradients = {engine.max_gradients:,} was spent after {result.forward.shape[0]} populations, too few "
            f"to tell the error: give at least {engine.enough:,}."
        )
    elif not result.reach <= result.tolerance:
        doubts.append(
            f"The bracket reaches {result.reach:.3g} nats from the estimate, beyond the tolerance of "
            f"{result.tolerance:g}, with max_gradients = {engine.max_gradients:,} spent: raise one of them."
        )
    spread = float(jnp.std(result.forward))
    if spread > 1:
        doubts.append(
            f"The populations disagree (their log estimates have a standard deviation of {spread:.1f} nats), as they "
            "do for targets with several modes: raise num_particles."
        )
    if result.pareto_k > 0.7:
        doubts.append(
            f"The weights have a heavy tail (Pareto k = {result.pareto_k:.2f}): the base may not cover the target."
        )
    low, high = result.lower, result.upper
    if low.value - high.value > 4 * math.hypot(low.error, high.error) + 0.01:
        doubts.append(
            "The upper end lies below the lower: the draws that were annealed back miss a part of the target."
        )
    for other in engine.fitted.tried:
        missed = other.log_evidence - float(result.log_evidence) - 2 * other.noise
        if missed > 0 and bool(other.run.finished):
            doubts.append(
                f"The pilot run from another base ({other.name}) found {other.log_evidence:.1f} nats: "
                "the runs may miss a part of the target."
            )
    if support.num_invalid:
        share = support.num_invalid / support.num_draws
        doubts.append(
            f"The log density is NaN at {share:.2%} of the draws of the base; it counted as density zero there: "
            "mend it, for what is missing is unknown."
        )
    return doubts


def _check(
    problem: Problem,
    tolerance: float,
    max_gradients: int,
    num_particles: int,
    batch_size: int | None,
    posterior_draws: Array | None,
) -> None:
    """Raises for options out of their range."""
    if not isinstance(problem, Problem):
        raise InputError(
            f"evidence needs a lehr.Problem, not a {type(problem).__name__}: make one with lehr.Problem(base, "
            "log_target), lehr.from_function, lehr.from_numpyro or lehr.from_pymc"
        )
    if not tolerance > 0:
        raise InputError(f"the tolerance must be a positive number of nats, but it is {tolerance}")
    if max_gradients < 1:
        raise InputError(f"max_gradients must be positive, but it is {max_gradients}")
    if num_particles < 2 or (batch_size is not None and batch_size < 2):
        raise InputError(
            f"a population needs at least 2 particles, but num_particles is {num_particles} and batch_size {batch_size}"
        )
    dimension = problem.position.shape[0]
    if posterior_draws is None:
        return
    if posterior_draws.ndim != 2 or posterior_draws.shape[1] != dimension:
        raise InputError(f"posterior_draws must have shape (num_draws, {dimension}), but it is {posterior_draws.shape}")
    if not len(posterior_draws) or not bool(jnp.all(jnp.isfinite(posterior_draws))):
        raise InputError("posterior_draws must be one finite draw or more: leave them out if there are none")
