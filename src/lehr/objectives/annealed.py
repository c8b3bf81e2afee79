"""Annealed bounds that are differentiated through the chain."""

from jaxtyping import Array, Float, PRNGKeyArray

from lehr.annealer import Annealer
from lehr.annealing import anneal
from lehr.errors import InputError
from lehr.path import LogDensity
from lehr.reversible import Memory


def davi(
    annealer: Annealer,
    log_target: LogDensity,
    key: PRNGKeyArray,
    *,
    num_particles: int = 1,
    memory: Memory = "checkpoint",
) -> Float[Array, ""]:
    """The bound of differentiable annealing variational inference (DAVI),

        log (1/S) sum_i [ target(z_K^i) / base(z_0^i) prod_k N(v_hat_k^i; 0, M) / N(v_{k-1}^i; 0, M) ],

    for the uncorrected `Hamiltonian` kernel; for other uncorrected kernels the ratio is theirs. One particle gives the
    annealed ELBO. Differentiate in `annealer` to train base, schedule and kernel ("DAVI adapt"), or only in its base.

    Arguments:
        annealer: base, schedule (K steps) and an uncorrected kernel.
        log_target: maps a position `(dim,)` to the log unnormalised density, in nats.
        num_particles: S.
        memory: what the gradient keeps of the chain: see `lehr.anneal`.

    **Gradient**: unbiased for the bound, through the whole chain (reparameterised).

    Raises `lehr.errors.InputError` for a Metropolis-corrected kernel, and as `lehr.anneal`.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, equations (15) and (23).
    """
    refuse_exact(annealer)
    return anneal(key, annealer, log_target, num_particles, memory=memory).log_evidence


def refuse_exact(annealer: Annealer) -> None:
    """Raises for a kernel whose chain has no gradient."""
    if annealer.kernel.exact:
        raise InputError("DAVI needs an uncorrected kernel such as lehr.Hamiltonian; for corrected ones use aiwae")
