"""The two reports of an evidence that no run has estimated: too few gradients, and nothing to integrate over."""

import math
import time

import jax
import jax.numpy as jnp

from lehr.engine import Engine
from lehr.errors import InputError
from lehr.path import Problem
from lehr.report import Bound, Evidence, Round
from lehr.smc import PathStatistics
from lehr.support import Support


def from_pilot(problem: Problem, engine: Engine, support: Support, tolerance: float, seconds: float) -> Evidence:
    """What there is if the gradients do not suffice for one block: the estimate of the pilot run, marked."""
    run = engine.candidate.run
    size = int(run.num_steps)
    positions = engine.candidate.push(run.positions)[None]
    column = jnp.zeros(size, run.betas.dtype)
    discrepancy = jnp.diff(jnp.concatenate([jnp.zeros(1), run.barrier[:size]])) ** 2
    unknown = jnp.full((size + 1,), jnp.nan, column.dtype)
    path = PathStatistics(
        column + jnp.nan,
        discrepancy,
        column + jnp.nan,
        column + jnp.nan,
        jnp.exp(run.log_scale[:size]),
        unknown,
        unknown,
    )
    estimate = run.log_evidence[None]
    low = Bound(float(run.log_evidence), math.inf)
    high = Bound(math.inf, math.inf)
    return Evidence(
        forward=estimate,
        backward=jnp.full_like(estimate, jnp.inf),
        positions=positions,
        log_weights=jnp.broadcast_to(estimate[:, None], positions.shape[:2]),
        draws=positions if problem.unravel is None else jax.vmap(jax.vmap(problem.unravel))(positions),
        betas=jnp.concatenate([jnp.zeros(1, column.dtype), run.betas[:size]]),
        path=path,
        thermodynamic=jnp.full_like(estimate, jnp.nan),
        base=engine.candidate.name,
        rounds=(Round(1, engine.spent, low.value, math.inf, low, high),),
        num_gradients=engine.spent,
        seconds=seconds,
        num_invalid=support.num_invalid,
        exact_upper=False,
        converged=False,
        tolerance=tolerance,
        warnings=(
            f"max_gradients = {engine.max_gradients:,} did not suffice for one round: this is the estimate of the "
            f"pilot run, biased and without an error; give at least {engine.enough:,}.",
        ),
    )


def without_dimensions(problem: Problem, tolerance: float, started: float) -> Evidence:
    """A model without latent variables: the log density is the log evidence."""
    value = problem.log_prob(jnp.zeros(0, problem.position.dtype))
    if not math.isfinite(value):
        raise InputError(f"the model has no latent variable, and its log density is {float(value)}: check its data")
    two = jnp.broadcast_to(value, (2,))
    positions, zero = jnp.zeros((2, 1, 0), value.dtype), jnp.zeros(1, value.dtype)
    bound = Bound(float(value), 0.0)
    return Evidence(
        forward=two,
        backward=two,
        positions=positions,
        log_weights=two[:, None],
        draws=positions if problem.unravel is None else jax.vmap(jax.vmap(problem.unravel))(positions),
        betas=jnp.array([0.0, 1.0], value.dtype),
        path=PathStatistics(
            zero + value, zero, zero + 1, zero + 1, jnp.zeros((1, 0)), jnp.array([value] * 2), jnp.zeros(2)
        ),
        thermodynamic=two,
        base="none: the model has no latent variable, and this is exact",
        rounds=(Round(2, 0, float(value), 0.0, bound, bound),),
        num_gradients=0,
        seconds=time.monotonic() - started,
        num_invalid=0,
        exact_upper=True,
        converged=True,
        tolerance=tolerance,
        warnings=(),
    )
