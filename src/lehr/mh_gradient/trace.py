"""What the steps of chains leave for the gradient: decisions, and what the alternatives born of them added."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

#: dimensions, up to which chains are the last axis
_FEW_DIMENSIONS = 10


def chains_axis(dimension: int) -> Literal[0, -1]:
    """Of chains, in arrays of positions, after that of steps if they have one.

    In few dimensions operations run along the chains, many at once, and a gradient takes half the time. In many they
    run along the dimensions anyway, and a density of a whole lattice or matrix would turn it round in each step.
    """
    return -1 if dimension <= _FEW_DIMENSIONS else 0


class Record(NamedTuple):
    """What a trace is to hold beside the least."""

    accepted: bool = False
    after: bool = False
    lives: bool = False


class Lives(NamedTuple):
    """For diagnostics, of each slot after each step: its strength, and whether its alternative met the chain."""

    strength: Any
    met: Any


class Trace(NamedTuple):
    """What each step of each chain leaves for the gradient: its decision, and what the alternatives after it add.

    Axes are steps, what a chain has, chains; but of positions, in many dimensions, steps, chains, dimensions.
    """

    #: of which its alternative was born, in the form of the sampler: with positions
    decision: Any
    #: c / m of the decision's alternative
    coefficient: Float[Array, "num_steps num_chains"]
    #: whether the density is 0 at what was proposed
    forbidden: Bool[Array, "num_steps num_chains"]
    #: by slot: whether the decision's alternative was kept there, and M (f(Y) - f(X))
    taken: Bool[Array, "num_steps *slots num_chains"]
    contribution: Float[Array, "num_steps *slots m num_chains"]
    #: whether it was accepted; None where the gradient does not need it
    accepted: Any
    #: the position after the step; None where the gradient does not need it
    after: Any
    lives: Any


def by_decision(trace: Trace) -> Float[Array, "num_steps m num_chains"]:
    """What counts for each decision: sum_i kappa_i (f(Y_i) - f(X_i)), Y its alternative."""
    return trace.coefficient[:, None] * _of_lives(jnp.add, trace.contribution, trace.taken)


def largest_kappas(trace: Trace) -> Float[Array, "num_steps num_chains"]:
    """Of each decision, the largest kappa of its alternative; 0 if it has none. For traces that recorded lives."""
    return trace.coefficient * _of_lives(jnp.maximum, trace.lives.strength[..., None, :], trace.taken)[:, 0]


def _of_lives(
    combine: Callable[[Array, Array], Array], values: Float[Array, "num_steps *slots m num_chains"], taken: Array
) -> Float[Array, "num_steps m num_chains"]:
    """For each step at which a slot was taken, the values while that birth was in it, combined; else 0."""

    # An alternative's steps follow each other in its slot: from the last to the first.
    def step(total, inputs):
        value, taken = inputs
        total, taken = combine(total, value), taken[..., None, :]
        found = jnp.where(taken, total, 0)
        return jnp.where(taken, 0, total), jnp.sum(found, axis=tuple(range(found.ndim - 2)))

    return jax.lax.scan(step, jnp.zeros_like(values[0]), (values, taken), reverse=True)[1]
