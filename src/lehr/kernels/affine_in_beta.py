"""A positive parameter that is a function of the inverse temperature: two numbers, whatever the schedule."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from lehr.errors import InputError
from lehr.kernels.positive import log_of_positive


class AffineInBeta(eqx.Module):
    """A step size (or momentum scale) whose logarithm is affine in beta, and which therefore stays positive:

        log e(beta) = (1 - beta) log e_0 + beta log e_1.

    Two numbers, or two per dimension, that fit a schedule of any length: `Hamiltonian(AffineInBeta(0.3, 0.1))`. Step k
    takes e(beta_k). Where a chain is run it becomes one row a step; `lehr.tune` leaves those rows.

    Arguments:
        at_base: e_0 > 0, at beta = 0: a number or `(dim,)`.
        at_target: e_1 > 0, at beta = 1.

    **Gradient**: exact, in the logarithms of both ends, and through beta in the schedule.

    Raises `lehr.errors.InputError` for ends that are not positive, or have more than one axis.
    """

    log_at_base: Array
    log_at_target: Array

    def __init__(self, at_base: ArrayLike, at_target: ArrayLike):
        self.log_at_base = log_of_positive("at_base", at_base)
        self.log_at_target = log_of_positive("at_target", at_target)
        for end in (self.log_at_base, self.log_at_target):
            if end.ndim > 1:
                raise InputError(f"an end of AffineInBeta is a number or (dim,), but its shape is {end.shape}")

    def log_at(self, betas: Float[Array, " num_steps"]) -> Float[Array, "num_steps columns"]:
        """log e(beta) for each step: `(num_steps, 1)` or `(num_steps, dim)`."""
        beta = betas[:, None]
        return (1 - beta) * jnp.atleast_1d(self.log_at_base) + beta * jnp.atleast_1d(self.log_at_target)
