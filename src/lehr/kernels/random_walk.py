"""A Gaussian random walk, for densities without a gradient."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from lehr.kernels.affine_in_beta import AffineInBeta
from lehr.kernels.contract import AbstractMove, State, Transition, log_of_parameter
from lehr.path import Tempered


class RandomWalk(AbstractMove):
    """T(x' | x) = N(x'; x, e^2), its own reverse: log L/T = 0. One value per step, no gradient.

    Uncorrected it ignores the density and serves as a null case; `Metropolis(RandomWalk(e))` is random-walk Metropolis.

    Arguments:
        step_size: e > 0, in units of position. A number, `(dim,)`, `(num_steps, 1)`, `(num_steps, dim)`, or
            an `AffineInBeta`.

    **Gradient**: exact through the uncorrected chain; raises through `Metropolis`.

    Raises `InputError` for a step size that is not positive.

    Source: Metropolis et al. 1953.
    """

    log_step_size: Array | AffineInBeta

    uses_gradient: ClassVar[bool] = False

    def __init__(self, step_size: ArrayLike | AffineInBeta):
        self.log_step_size = log_of_parameter("step_size", step_size)

    def propose(self, density: Tempered, state: State, noise: Any) -> Transition:
        point = density.evaluate(state.point.position + self.step_size * noise, gradient=False)
        return Transition(State(point), jnp.zeros((), point.position.dtype))

    @property
    def reverse_scale(self) -> Array:
        return self.step_size

    def reverse_noise(self, density: Tempered, before: State, moved: State, noise: Any) -> Array:
        del density, before, moved
        return -noise
