"""Annealing with `memory="reversible"`: which kernels can, how much the gradient keeps, and the chain that does it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from lehr import whole_numbers
from lehr.errors import InputError
from lehr.kernels.contract import AbstractKernel
from lehr.kernels.hamiltonian import Hamiltonian
from lehr.numerics import is_concrete
from lehr.path import Problem, Schedule
from lehr.reversible_chain import run
from lehr.reversible_step import Chains, Inputs, Rates


@dataclass(frozen=True)
class Reversible:
    """`memory=lehr.Reversible(0.5)`: the reversible gradient for persistence of at least 0.5.

    What a program keeps is decided when it is compiled; `memory="reversible"` looks at the persistence if it has a
    value then, and else (inside of a user's `jax.jit`, of a gradient, of `lehr.fit`) takes 0.89.

    Arguments:
        smallest_persistence: inside (0, 1). The gradient keeps log2(1 / smallest_persistence) bits a parameter and
            step. Where persistence is smaller at run time, the checkpointed gradient takes its place.

    Raises `lehr.errors.InputError` for other numbers.
    """

    smallest_persistence: float = 0.89

    def __post_init__(self):
        if not 0 < self.smallest_persistence < 1:
            raise InputError(f"smallest_persistence must be inside (0, 1), but it is {self.smallest_persistence}")


Memory = Literal["store", "checkpoint", "reversible"] | Reversible

_USE = 'use memory="checkpoint"'


def memory_of(memory: Any, kernel: AbstractKernel) -> Literal["store", "checkpoint"] | Reversible:
    """What `memory` comes to for this kernel. (It means nothing to exact ones, which have no gradient.)

    Raises `InputError` for an unknown `memory`, and for "reversible" with a kernel that cannot be, or loses too much.
    """
    if memory not in ("store", "checkpoint", "reversible") and not isinstance(memory, Reversible):
        raise InputError(f'memory must be "store", "checkpoint" or "reversible", but it is {memory!r}')
    if kernel.exact:
        return "store"
    if memory == "store" or memory == "checkpoint":
        return memory
    if not isinstance(kernel, Hamiltonian):
        raise InputError(f'memory="reversible" needs a lehr.Hamiltonian, not a {type(kernel).__name__}: {_USE}')
    if kernel.num_leapfrog != 1:
        raise InputError(f'memory="reversible" needs num_leapfrog=1, but it is {kernel.num_leapfrog}: {_USE}')
    if kernel.logit_persistence is None:
        raise InputError(f'memory="reversible" needs a persistence above 0, which loses bits but not all: {_USE}')
    if not is_concrete(kernel.logit_persistence):
        return memory if isinstance(memory, Reversible) else Reversible()
    persistence = 1 / (1 + np.exp(-np.asarray(kernel.logit_persistence, np.float64)))
    smallest, last = float(np.min(persistence)), whole_numbers.LARGEST_AT_ENDS
    with jax.ensure_compile_time_eval():
        near = np.asarray(whole_numbers.is_near(jnp.asarray(persistence)))
    if not np.all(near):
        far = persistence[~near].flat[0]
        raise InputError(
            f'memory="reversible" needs a persistence from 1/{last} to {last - 1}/{last}, but it is {far:.6g}: {_USE}'
        )
    if isinstance(memory, Reversible):
        return memory
    # In steps of an eighth of the bits, so that a persistence in training seldom asks for another compilation.
    bits = 2 ** (np.ceil(8 * np.log2(np.log2(1 / smallest)) + 1e-3) / 8)
    return Reversible(float(2.0**-bits))


def anneal_reversibly(
    kernel: AbstractKernel,
    schedule: Schedule,
    problem: Problem,
    keys: Array,
    x: Float[Array, "num_particles dim"],
    *,
    memory: Reversible,
) -> tuple[Float[Array, "num_particles dim"], Float[Array, " num_particles"]]:
    """Positions and log weights of `lehr.anneal`, up to the rounding of positions, momenta and persistence.

    Raises `InputError` for positions of another type than float32 or float64.
    """
    assert isinstance(kernel, Hamiltonian)  # `memory_of` has seen to it
    if x.dtype not in (jnp.float32, jnp.float64):
        raise InputError(f'memory="reversible" needs positions of float32 or float64, not {x.dtype}: {_USE}')
    num_steps, betas = schedule.num_steps, schedule.betas
    kernel.split_steps(num_steps, x.shape[1])
    gamma = kernel.persistence
    fraction = whole_numbers.nearest_fraction(gamma, jnp.int32)
    # Straight through: the value is the fraction's, if it is near, and the gradient the persistence's.
    value = jnp.where(whole_numbers.is_near(gamma), fraction.value(x.dtype), gamma)
    gamma = jax.lax.stop_gradient(value) + (gamma - jax.lax.stop_gradient(gamma))
    rates = Rates(kernel.h, gamma, jnp.sqrt((1 - gamma) * (1 + gamma)))

    def log_density(x, beta):
        return problem.at(beta).log_prob_at(problem.evaluate(x, gradient=False))

    def momentum(key, x):
        return kernel.draw_momentum(key, x)

    def noise(key, num_steps):
        return kernel.noise(key, num_steps, problem.position)

    expression, seen = _closed(log_density, x[0], betas[0])
    num_rows = whole_numbers.rows_of_buffer(num_steps, memory.smallest_persistence)
    chains = Chains(expression, momentum, noise, num_steps, num_rows)
    inputs = Inputs(x, betas[1:], rates, tuple(seen))
    end, log_ratio = cast(tuple[Array, Array], run(chains, keys, fraction, inputs))
    return end, log_ratio + jax.vmap(problem.log_prob)(end) - jax.vmap(problem.log_base)(x)


def _closed(function: Callable[..., Array], *examples: Array) -> tuple[Callable[..., Array], list[Any]]:
    """f(*arguments, *seen) that closes over nothing, and what `function` saw: leaves of pytrees, and tracers.

    Tracers of whole numbers too: a rule for a derivative runs when the trace that it was made in may have ended.
    """
    jaxpr = jax.make_jaxpr(function)(*examples)

    def expression(*inputs: Any) -> Array:
        arguments, seen = inputs[: len(examples)], inputs[len(examples) :]
        return jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, seen))(*arguments)[0]

    return expression, jaxpr.consts
