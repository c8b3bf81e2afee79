"""Tuning of kernels by what their runs report."""

import equinox as eqx
from jaxtyping import Array, Float

from lehr.kernels import Metropolis
from lehr.kernels.contract import rows


def adapt_step_size(
    kernel: Metropolis, acceptance: Float[Array, " num_steps"], *, target: float, rate: float
) -> Metropolis:
    """One stochastic approximation step of each temperature's step size towards a mean acceptance,

        log e_k <- log e_k + rate (acceptance_k - target).

    Arguments:
        kernel: a corrected move with one step size per step, shape `(num_steps, 1)` or `(num_steps, dim)`.
        acceptance: mean acceptance probability by step, as `lehr.anneal` reports it.
        target: in (0, 1): 0.6 in the AIWAE paper, 0.65 is best for HMC in high dimension (Beskos et al. 2013).
        rate: of the adaptation; the step sizes converge where it decreases.

    **Gradient**: not meant to be differentiated.

    Raises `lehr.errors.InputError` for step sizes that are a function of beta: take `kernel.along(betas)`.

    Source: Robbins, Monro 1951; Andrieu, Thoms 2008, section 5.1.
    """
    old = rows(kernel.kernel.log_step_size)
    new = old + (rate * (acceptance[:, None] - target)).astype(old.dtype)
    return eqx.tree_at(lambda k: k.kernel.log_step_size, kernel, new)
