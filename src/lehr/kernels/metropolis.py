"""The Metropolis correction: a wrapper that makes a move leave its density invariant."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.kernels.contract import AbstractKernel, AbstractMove, State, Transition
from lehr.path import Tempered


class Metropolis(AbstractKernel):
    """Accepts a move x -> x' with probability

        min(1, f(x') L(x | x') / [f(x) T(x' | x)]),

    else stays, with the momentum reversed. The move's own log ratio is all it needs to know of the move:
    `Metropolis(Hamiltonian(e))` is HMC, with persistence it is the kernel of HAIS, `Metropolis(Langevin(e))` is MALA,
    `Metropolis(RandomWalk(e))` random-walk Metropolis. A proposal whose density is NaN is rejected.

    Work per step: that of the move (HMC: `num_leapfrog` gradients, the value in the same pass as the last of them).

    Arguments:
        kernel: the move to correct.

    **Gradient**: raises `TypeError`. The pathwise gradient ignores that acceptance depends on the parameters, and is
    wrong without a word; stop the gradient at the chain, or use an uncorrected kernel.

    Raises `InputError` if `kernel` is not a move.

    Source: Hastings 1970; Horowitz 1991 (the reversal); Sohl-Dickstein, Culpepper 2012, algorithm 1.
    """

    kernel: AbstractMove

    exact: ClassVar[bool] = True

    def __check_init__(self):
        if not isinstance(self.kernel, AbstractMove):
            raise InputError(f"Metropolis corrects a move such as lehr.Hamiltonian, not a {type(self.kernel).__name__}")

    def init(self, key: PRNGKeyArray, density: Tempered, position: Float[Array, " dim"]) -> State:
        point = density.evaluate(position, gradient=self.kernel.uses_gradient)
        return State(point, self.kernel.draw_momentum(key, position))

    def noise(self, key: PRNGKeyArray, num_steps: int, position: jax.ShapeDtypeStruct) -> Any:
        key_move, key_accept = jax.random.split(key)
        log_uniform = -jax.random.exponential(key_accept, (num_steps,), position.dtype)
        return self.kernel.noise(key_move, num_steps, position), log_uniform

    def move(self, density: Tempered, state: State, noise: Any) -> Transition:
        noise_move, log_uniform = noise
        proposal = self.kernel.propose(density, state, noise_move)
        assert proposal.log_ratio is not None
        gained = density.log_prob_at(proposal.state.point) - density.log_prob_at(state.point) + proposal.log_ratio
        # NaN compares as false: rejected. (From a point of density zero any proposal of positive density is accepted.)
        accept = log_uniform < gained
        state = jax.tree.map(lambda new, old: jnp.where(accept, new, old), proposal.state, self.kernel.flip(state))
        probability = jnp.where(jnp.isnan(gained), 0, jnp.exp(jnp.minimum(gained, 0)))
        # `gained` too: a random walk's proposal does not depend on beta, its acceptance does.
        state, probability, _ = _forbid_gradient((state, probability, gained))
        return Transition(state, None, probability)

    def refresh(self, state: State, noise: Any) -> State:
        return self.kernel.refresh(state, noise[0])


@jax.custom_jvp
def _forbid_gradient(tree: Any) -> Any:
    return tree


@_forbid_gradient.defjvp
def _forbid_gradient_jvp(primals, tangents):
    del primals, tangents
    raise TypeError(
        "the gradient through a Metropolis accept step is not the gradient of the expectation: apply "
        "jax.lax.stop_gradient to what enters the chain, or use the uncorrected kernel without lehr.Metropolis"
    )
