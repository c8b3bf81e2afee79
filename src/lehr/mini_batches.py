"""How the steps of a chain see a target of which each takes a mini-batch."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lehr.errors import InputError
from lehr.kernels import AbstractKernel, Hamiltonian, LearnedReverse
from lehr.path import Problem, Tempered
from lehr.subsampled import Subsampled


class MiniBatches:
    """How the steps of a chain see a problem: with a batch each, if its target is `Subsampled`, and else as it is.

    Raises `InputError` for a kernel of which a step and its reverse would see different batches (it keeps gradients).
    """

    def __init__(self, problem: Problem, kernel: AbstractKernel):
        self.problem, self.target = problem, None
        move = kernel.kernel if isinstance(kernel, LearnedReverse) else kernel
        # An exact kernel sees all data.
        if isinstance(problem.log_target, Subsampled) and not kernel.exact:
            if not isinstance(move, Hamiltonian):
                raise InputError(f"mini-batches need a lehr.Hamiltonian, not a {type(move).__name__}")
            self.target = problem.log_target

    def keys(self, key: PRNGKeyArray, num_steps: int) -> tuple[PRNGKeyArray, Array | None]:
        """A key for the noise of the kernel, and one a step for its batch."""
        if self.target is None:
            return key, None
        key_noise, key_batch = jax.random.split(key)
        return key_noise, jax.random.split(key_batch, num_steps)

    def parts(self, num_steps: int) -> Int[Array, " num_steps"] | None:
        """The part of the path, of those with batch sizes of their own, that each step belongs to."""
        if self.target is None:
            return None
        if len(self.target.batch_sizes) > num_steps:
            raise InputError(
                f"there are {len(self.target.batch_sizes)} batch sizes, for as many parts of the path, but {num_steps} "
                "steps: give fewer, or more steps"
            )
        return jnp.asarray(np.arange(num_steps) * len(self.target.batch_sizes) // num_steps, jnp.int32)

    def at(self, beta: Float[Array, ""], key: PRNGKeyArray | None, part: Int[Array, ""] | None) -> Tempered:
        """The density that a step sees."""
        if self.target is None:
            return self.problem.at(beta)
        assert key is not None
        assert part is not None
        return Problem(self.problem.base, self.target.on(key, part)).at(beta)
