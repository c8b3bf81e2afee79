"""What is annealed along: a base, a schedule and a kernel, and how they meet a target."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.kernels import AbstractKernel
from lehr.path import LogDensity, Problem, Schedule


class Annealer(eqx.Module):
    """A base, a schedule and a kernel: everything about annealing that can be trained, each float leaf of it.

    Raises `lehr.errors.InputError` if the parts are not a `Schedule` and a kernel.
    """

    base: Any
    schedule: Schedule
    kernel: AbstractKernel

    def __check_init__(self):
        if not isinstance(self.schedule, Schedule):
            raise InputError("an Annealer's schedule must be a lehr.Schedule, for example lehr.Schedule.linear(10)")
        if not isinstance(self.kernel, AbstractKernel):
            raise InputError("an Annealer's kernel must be a lehr kernel, for example lehr.Hamiltonian(0.1)")


def base_draws(key: PRNGKeyArray, base: Any, num_particles: int) -> tuple[Array, Float[Array, "num_particles dim"]]:
    """Independent draws of the base, and with each a key for the chain that goes on from it."""
    keys = jax.vmap(jax.random.split)(jax.random.split(key, num_particles))
    return keys[:, 1], jax.vmap(base.sample)(keys[:, 0])


def prepare(annealer: Annealer, log_target: LogDensity) -> tuple[Problem, Annealer]:
    """Checks the problem, and brings schedule and kernel to its dtype: float32 stays float32 under x64.

    Of a kernel whose parameters are functions of beta it gives the rows, one for each step.
    """
    problem = Problem(annealer.base, log_target)
    cast = jax.tree.map(
        lambda leaf: leaf.astype(problem.position.dtype) if eqx.is_inexact_array(leaf) else leaf,
        (annealer.schedule, annealer.kernel),
    )
    schedule, kernel = cast
    return problem, Annealer(annealer.base, schedule, kernel.along(schedule.betas[1:]))
