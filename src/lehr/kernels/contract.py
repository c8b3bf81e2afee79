"""The contract of a kernel, in mathematics.

A kernel T(x' | x) comes with the kernel L(x | x') that undoes it. Annealing needs of it, for one particle,

    a draw x' ~ T(. | x)   and   log [ L(x | x') / T(x' | x) ],

on the space that carries the momentum where there is one. One step `forwards` is `move`, then `refresh` of the
momentum; one step `backwards`, of the chain that undoes it, is `refresh`, then `move`. That is all of time reversal:
each move here is its own inverse up to the sign of the momentum, whose distribution is symmetric, and the refreshment
is reversible. (A kernel whose L is learned, and so not its own inverse, says itself what a step backwards is.)
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.kernels.affine_in_beta import AffineInBeta
from lehr.kernels.positive import log_of_positive
from lehr.numerics import normal
from lehr.path import Point, Tempered


class State(eqx.Module):
    """Where one particle is: a point, and the momentum of kernels that have one, in units of its scale: N(0, I)."""

    point: Point
    momentum: Float[Array, " dim"] | None = None


class Transition(eqx.Module):
    """What a move did.

    `log_ratio` is log [L(x | x') / T(x' | x)]; an exact kernel leaves it None, because it is then implied:
    log f(x) - log f(x'). `acceptance` is the Metropolis acceptance probability, None where nothing is rejected.
    """

    state: State
    log_ratio: Float[Array, ""] | None
    acceptance: Float[Array, ""] | None = None


class AbstractKernel(eqx.Module):
    """A kernel and its reverse. Parameters with two axes hold one row per step; `split_steps` hands them out."""

    #: whether the kernel leaves the density invariant (and the log ratio is implied)
    exact: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, density: Tempered, position: Float[Array, " dim"]) -> State:
        """The state at a given position."""

    @abc.abstractmethod
    def noise(self, key: PRNGKeyArray, num_steps: int, position: jax.ShapeDtypeStruct) -> Any:
        """All random numbers of `num_steps` steps, each leaf with that leading axis: drawn in chunks, for speed."""

    @abc.abstractmethod
    def move(self, density: Tempered, state: State, noise: Any) -> Transition:
        """The part of a step that sees the density."""

    def refresh(self, state: State, noise: Any) -> State:
        """The part of a step that does not: draws new momentum. Nothing by default."""
        del noise
        return state

    def forwards(self, density: Tempered, state: State, noise: Any) -> Transition:
        """A whole step: x' ~ T(. | x), with log [L(x | x') / T(x' | x)]."""
        transition = self.move(density, state, noise)
        return eqx.tree_at(lambda t: t.state, transition, self.refresh(transition.state, noise))

    def backwards(self, density: Tempered, state: State, noise: Any) -> Transition:
        """A whole step of the reverse chain: x ~ L(. | x'), with log [T(x' | x) / L(x | x')]; momentum is reversed."""
        return self.move(density, self.refresh(state, noise), noise)

    def along(self, betas: Float[Array, " num_steps"]) -> Any:
        """The kernel with a row for each step in place of what is a function of beta (`AffineInBeta`)."""

        def is_function(node):
            return isinstance(node, AffineInBeta)

        return jax.tree.map(lambda node: node.log_at(betas) if is_function(node) else node, self, is_leaf=is_function)

    def split_steps(self, num_steps: int, dimension: int) -> tuple[Any, Any]:
        """Splits into what differs by step (leaves with a leading axis K) and the rest; `equinox.combine` joins a row.

        Raises `InputError` for a parameter whose shape is none of (), (d,), (K, 1), (K, d).
        """
        for shape in {np.shape(leaf) for leaf in jax.tree.leaves(eqx.filter(self, eqx.is_inexact_array))}:
            rows, columns = (1, 1, *shape)[-2:]
            if len(shape) > 2 or columns not in (1, dimension) or (len(shape) == 2 and rows != num_steps):
                raise InputError(
                    f"a parameter of {type(self).__name__} has shape {shape}, but there are {num_steps} steps in "
                    f"{dimension} dimensions: give one number, ({dimension},) for one per dimension, "
                    f"({num_steps}, 1) for one per step, or ({num_steps}, {dimension})"
                )
        return eqx.partition(self, lambda leaf: eqx.is_array(leaf) and leaf.ndim == 2)


class AbstractMove(AbstractKernel):
    """An uncorrected kernel, which is also the proposal that `Metropolis` makes exact."""

    exact: ClassVar[bool] = False
    #: log of the step size; see `split_steps` for its shapes
    log_step_size: eqx.AbstractVar[Array | AffineInBeta]
    #: whether `propose` needs gradients at the point it starts from
    uses_gradient: eqx.AbstractClassVar[bool]

    @property
    def step_size(self) -> Array:
        """The step size, in the shape in which it was given."""
        return jnp.exp(rows(self.log_step_size))

    @abc.abstractmethod
    def propose(self, density: Tempered, state: State, noise: Any) -> Transition:
        """A move from an evaluated point to an evaluated point, with its log ratio."""

    def noise(self, key: PRNGKeyArray, num_steps: int, position: jax.ShapeDtypeStruct) -> Any:
        return normal(key, (num_steps, *position.shape), position.dtype)

    def init(self, key: PRNGKeyArray, density: Tempered, position: Float[Array, " dim"]) -> State:
        return State(density.evaluate(position, gradient=self.uses_gradient), self.draw_momentum(key, position))

    def move(self, density: Tempered, state: State, noise: Any) -> Transition:
        return self.propose(density, state, noise)

    def draw_momentum(self, key: PRNGKeyArray, position: Float[Array, " dim"]) -> Float[Array, " dim"] | None:
        """The momentum to start with; none by default."""
        del key, position

    @property
    @abc.abstractmethod
    def reverse_scale(self) -> Array:
        """The standard deviation of what the reverse kernel draws."""

    @abc.abstractmethod
    def reverse_noise(self, density: Tempered, before: State, moved: State, noise: Any) -> Float[Array, " dim"]:
        """The standard normal noise with which the reverse kernel would draw the state `before` this move."""

    def flip(self, state: State) -> State:
        """The state with its momentum reversed."""
        return state


def log_of_parameter(name: str, value: ArrayLike | AffineInBeta) -> Array | AffineInBeta:
    """What a kernel keeps of a positive parameter, so that a gradient step cannot make it negative.

    Raises `InputError` if it is not positive and finite.
    """
    return value if isinstance(value, AffineInBeta) else log_of_positive(name, value)


def rows(parameter: Array | AffineInBeta) -> Array:
    """The parameter of a kernel that runs along a path.

    Raises `InputError` if it is a function of beta still.
    """
    if isinstance(parameter, AffineInBeta):
        raise InputError("this parameter is a function of beta: it has values in kernel.along(schedule.betas[1:])")
    return parameter
