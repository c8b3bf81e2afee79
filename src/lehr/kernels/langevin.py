"""One Langevin step: the kernel of the Monte Carlo VAE, and the proposal of MALA."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from lehr.kernels.affine_in_beta import AffineInBeta
from lehr.kernels.contract import AbstractMove, State, Transition, log_of_parameter
from lehr.path import Tempered


class Langevin(AbstractMove):
    """Uncorrected (unadjusted) Langevin, with itself as the reverse kernel.

        T(x' | x) = N(x'; x + (e^2/2) grad log f(x), e^2),    log L/T = log T(x | x') - log T(x' | x),

    one gradient and one value per step (both at x', carried to the next). Inside `Metropolis` it is MALA.

    Arguments:
        step_size: e > 0, in units of position. A number, `(dim,)`, `(num_steps, 1)`, `(num_steps, dim)`, or
            an `AffineInBeta`.

    **Gradient**: exact through the chain.

    Raises `InputError` for a step size that is not positive.

    Source: Thin et al. 2021, "Monte Carlo variational auto-encoders", section 3; Roberts, Tweedie 1996.
    """

    log_step_size: Array | AffineInBeta

    uses_gradient: ClassVar[bool] = True

    def __init__(self, step_size: ArrayLike | AffineInBeta):
        self.log_step_size = log_of_parameter("step_size", step_size)

    def propose(self, density: Tempered, state: State, noise: Any) -> Transition:
        e, x = self.step_size, state.point.position
        point = density.evaluate(x + e * (e / 2 * density.gradient_at(state.point) + noise), gradient=True)
        # The difference of the squared norms of the two noises is written as a product: they would cancel in float32.
        drift = self._drift(density, state, State(point))
        return Transition(State(point), -jnp.sum(drift * (2 * noise + drift)) / 2)

    def _drift(self, density: Tempered, before: State, after: State) -> Array:
        """(e/2) [grad log f(x) + grad log f(x')]: the reverse kernel draws with the noise -(noise + drift)."""
        return self.step_size / 2 * (density.gradient_at(before.point) + density.gradient_at(after.point))

    @property
    def reverse_scale(self) -> Array:
        return self.step_size

    def reverse_noise(self, density: Tempered, before: State, moved: State, noise: Any) -> Array:
        return -(noise + self._drift(density, before, moved))
