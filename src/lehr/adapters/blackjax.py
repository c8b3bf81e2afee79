"""A BlackJAX algorithm as a kernel, and its Pathfinder as a base."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import StandardNormal, Transformed
from jaxtyping import Array, Float, Key, PRNGKeyArray

from lehr.errors import InputError
from lehr.kernels.contract import AbstractKernel, State, Transition
from lehr.kernels.metropolis import _forbid_gradient
from lehr.path import Problem, Tempered
from lehr.transport import gaussian_map


class BlackJAX(AbstractKernel):
    """One step of a BlackJAX sampling algorithm per temperature, on the density f of that temperature,

        x' ~ T_f(. | x),   with T_f leaving f invariant, so that log [L(x | x') / T(x' | x)] = log f(x) - log f(x').

    The algorithm is made anew at each step for the density of that step, from the position alone: momentum and other
    variables that BlackJAX keeps beside the position are drawn afresh.

    Work per step: that of the algorithm, plus what it evaluates at its start (HMC, MALA, NUTS: one gradient), plus one
    value of base and target at its end.

    Arguments:
        algorithm: maps a log density to a `blackjax.SamplingAlgorithm`: `lambda f: blackjax.mala(f, 0.1)`,
            `lambda f: blackjax.nuts(f, step_size=0.5, inverse_mass_matrix=jnp.ones(3))`. The algorithm must leave
            exp(f) invariant. Uncorrected ones (`mclmc`, `sgld`) do not; `elliptical_slice` does if its first argument
            is f less the log density of its Gaussian.

    Functions compiled with this kernel are found again by the identity of `algorithm`: make it once.

    **Gradient**: raises `TypeError`, as for `lehr.Metropolis`.

    Raises `lehr.errors.InputError` if `algorithm` is no such function, or is known not to be exact.

    Source: Cabezas, Corenflos, Lao, Louf 2024, "BlackJAX: composable Bayesian inference in JAX".
    """

    algorithm: Any

    exact: ClassVar[bool] = True

    def __check_init__(self):
        if not callable(self.algorithm):
            raise InputError(
                "algorithm must map a log density to a BlackJAX algorithm, as in lambda f: blackjax.mala(f, 0.1), but "
                f"it is a {type(self.algorithm).__name__}"
            )

    def init(self, key: PRNGKeyArray, density: Tempered, position: Float[Array, " dim"]) -> State:
        del key
        return State(density.evaluate(position, gradient=False))

    def noise(self, key: PRNGKeyArray, num_steps: int, position: jax.ShapeDtypeStruct) -> Key[Array, " n"]:
        del position
        return jax.random.split(key, num_steps)

    def move(self, density: Tempered, state: State, noise: PRNGKeyArray) -> Transition:
        start = state.point.position
        key_init, key_step = jax.random.split(noise)
        algorithm = self.algorithm(lambda x: density.log_prob_at(density.evaluate(x, gradient=False)))
        if not hasattr(algorithm, "init") or not hasattr(algorithm, "step"):
            raise InputError(
                "algorithm must give a BlackJAX algorithm with init and step, as in lambda f: blackjax.mala(f, 0.1), "
                f"but it gives a {type(algorithm).__name__}"
            )
        inner, info = algorithm.step(key_step, algorithm.init(start, key_init))
        if not hasattr(inner, "position") or type(info).__name__ in _INEXACT:
            raise InputError(
                f"a BlackJAX algorithm with {type(info).__name__} is uncorrected, and leaves no density of the path "
                "invariant: use a corrected one, such as blackjax.mala or blackjax.nuts"
            )
        point = density.evaluate(inner.position.astype(start.dtype), gradient=False)
        acceptance = getattr(info, "acceptance_rate", None)
        if acceptance is not None:
            acceptance = jnp.asarray(acceptance, start.dtype)
        # The mixed density too: where a position does not depend on beta, its acceptance does.
        point, acceptance, _ = _forbid_gradient((point, acceptance, density.log_prob_at(point)))
        return Transition(State(point), None, acceptance)


def pathfinder(key: PRNGKeyArray, problem: Problem, *, num_samples: int = 200) -> Problem:
    """The problem from another base: the Gaussian that Pathfinder finds from a draw of the given one.

    Along the way of L-BFGS to a mode each inverse Hessian that it estimates makes a Gaussian; the one is taken whose
    bound, the mean of log target - log Gaussian over `num_samples` draws, is highest. (`lehr.evidence` tries the
    Laplace approximation at the mode by itself, and goes on from whatever base it is given.)

    Arguments:
        key: a PRNG key.
        problem: base and target; the draw of the base is where the search starts.
        num_samples: for each bound.

    Returns the problem with a full-rank Gaussian base: memory is of order dim^2.

    **Gradient**: not meant to be differentiated.

    Raises `lehr.errors.InputError` if no Gaussian with a finite bound is found, or BlackJAX is not installed.

    Source: Zhang, Carpenter, Gelman, Vehtari 2022 (Pathfinder), algorithm 1, as implemented by BlackJAX.
    """
    try:
        from blackjax.vi import pathfinder
    except ImportError as error:
        raise InputError("pathfinder needs BlackJAX: pip install 'lehr[blackjax]'") from error
    key_start, key_search = jax.random.split(key)
    found, _ = pathfinder.approximate(key_search, problem.log_prob, problem.base.sample(key_start), num_samples)
    alpha, beta, gamma, gradient, position = (
        np.asarray(part, np.float64)
        for part in (found.alpha, found.beta, found.gamma, found.grad_position, found.position)
    )
    # The inverse Hessian is diag(alpha) + beta gamma beta^T, and one Newton step from the position the centre.
    covariance = np.diag(alpha) + beta @ gamma @ beta.T
    if not np.isfinite(found.elbo) or not np.all(np.isfinite(covariance)):
        raise InputError("Pathfinder found no Gaussian with a finite bound: check the density near a draw of the base")
    gaussian = position + covariance @ gradient, np.linalg.cholesky(covariance)
    bijection = gaussian_map(*(jnp.asarray(part, problem.position.dtype) for part in gaussian))
    return Problem(Transformed(StandardNormal(problem.position.shape), bijection), problem.log_target, problem.unravel)


#: what uncorrected algorithms call the account of a step
_INEXACT = frozenset({"MCLMCInfo"})
