"""A learned reverse: a move whose reverse kernel has a drift that is trained."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.kernels.contract import AbstractKernel, AbstractMove, State, Transition
from lehr.path import Tempered

Drift = Callable[[Float[Array, " dim"], Float[Array, " dim"] | None, Float[Array, ""]], Float[Array, " dim"]]


class LearnedReverse(AbstractKernel):
    """A move with T as it is, and for L the move's own reverse kernel, shifted by a drift r(x', u', beta):

        L(. | x') draws with standard normal noise xi what the move's own reverse draws with xi + s r(x', u', beta),

    s the standard deviation of that draw. A chain that lags behind the path is better undone by a kernel that knows
    it: the best L_k is the conditional distribution of x_{k-1} given x_k, and any L_k gives an unbiased weight. Where z
    is the noise with which the move's own reverse kernel would have drawn x,

        log L/T = that of the move + z . s r - |s r|^2 / 2.

    With `Langevin` L draws the position, s its step size: without drift ULA (the Monte Carlo VAE), with it Monte Carlo
    diffusion (MCD). With `Hamiltonian` L draws the momentum before it was refreshed, s^2 = 1 - persistence^2: without
    drift UHA and DAIS, with it Langevin diffusion variational inference (LDVI).

    Arguments:
        kernel: a move. Without `LearnedReverse` around it, it has its own reverse.
        drift: maps `(x', u', beta)` to r, `(dim,)`: positions, momentum in units of its scale (None for moves without),
            and the inverse temperature. A pytree (an `equinox.Module`), to be trained; `linear_drift` and
            `network_drift` make one.

    **Gradient**: exact through the chain, for the move and the drift.

    Raises `InputError` if `kernel` is no move (a Metropolis-corrected kernel has the reverse that keeps it exact).

    Source: Doucet, Grathwohl, Matthews, Strathmann 2022, section 3 (MCD); Geffner, Domke 2023, section 4 (LDVI).
    """

    kernel: AbstractMove
    drift: Drift

    exact: ClassVar[bool] = False

    def __check_init__(self):
        if not isinstance(self.kernel, AbstractMove):
            raise InputError(
                f"LearnedReverse is of a move such as lehr.Hamiltonian, not of a {type(self.kernel).__name__}"
            )

    def init(self, key: PRNGKeyArray, density: Tempered, position: Float[Array, " dim"]) -> State:
        return self.kernel.init(key, density, position)

    def noise(self, key: PRNGKeyArray, num_steps: int, position: jax.ShapeDtypeStruct) -> Any:
        return self.kernel.noise(key, num_steps, position)

    def move(self, density: Tempered, state: State, noise: Any) -> Transition:
        return self.kernel.move(density, state, noise)

    def refresh(self, state: State, noise: Any) -> State:
        return self.kernel.refresh(state, noise)

    def forwards(self, density: Tempered, state: State, noise: Any) -> Transition:
        moved = self.move(density, state, noise)
        after = self.refresh(moved.state, noise)
        z = self.kernel.reverse_noise(density, state, moved.state, noise)
        shift = self._shift(density, after)
        assert moved.log_ratio is not None
        return Transition(after, moved.log_ratio + jnp.sum(shift * (z - shift / 2)))

    def backwards(self, density: Tempered, state: State, noise: Any) -> Transition:
        # The reverse chain carries momentum reversed, and so the noise that momentum is drawn with is reversed too.
        sign = 1 if state.momentum is None else -1
        shift = sign * self._shift(density, self.kernel.flip(state))
        moved = self.kernel.backwards(density, state, noise + shift)
        # The move's log ratio has the density of its own draw, noise + shift; what was drawn is noise.
        assert moved.log_ratio is not None
        return Transition(moved.state, moved.log_ratio - jnp.sum(shift * (noise + shift / 2)))

    def _shift(self, density: Tempered, after: State) -> Float[Array, " dim"]:
        x = after.point.position
        drift = self.drift(x, after.momentum, density.beta)
        if drift.shape != x.shape:
            raise InputError(f"a reverse drift must have the shape {x.shape} of a position, but it is {drift.shape}")
        return self.kernel.reverse_scale * drift.astype(x.dtype)

    def split_steps(self, num_steps: int, dimension: int) -> tuple[Any, Any]:
        # The drift is the same function at every step: its matrices are not rows of steps.
        stepped, fixed = self.kernel.split_steps(num_steps, dimension)
        nothing = jax.tree.map(lambda _: None, self.drift)
        return eqx.tree_at(_parts, self, (stepped, nothing)), eqx.tree_at(_parts, self, (fixed, self.drift))


def _parts(kernel: LearnedReverse) -> tuple:
    return kernel.kernel, kernel.drift


class LinearDrift(eqx.Module):
    """r = c(beta) + A(beta) (x, u), each entry a line in beta: what undoes a chain of Gaussians with few steps' lag."""

    weight: Float[Array, "2 dim inputs"]
    bias: Float[Array, "2 dim"]

    def __call__(
        self, x: Float[Array, " dim"], u: Float[Array, " dim"] | None, beta: Float[Array, ""]
    ) -> Float[Array, " dim"]:
        inputs = x if u is None else jnp.concatenate([x, u])
        of_beta = jnp.stack([1 - beta, beta])
        return jnp.einsum("k,kdi,i->d", of_beta, self.weight, inputs) + of_beta @ self.bias


class NetworkDrift(eqx.Module):
    """r = network(x, u, beta), and a linear drift where there is one."""

    network: eqx.nn.MLP
    linear: LinearDrift | None = None

    def __call__(
        self, x: Float[Array, " dim"], u: Float[Array, " dim"] | None, beta: Float[Array, ""]
    ) -> Float[Array, " dim"]:
        inputs = [x, jnp.atleast_1d(beta)] if u is None else [x, u, jnp.atleast_1d(beta)]
        drift = self.network(jnp.concatenate(inputs))
        return drift if self.linear is None else drift + self.linear(x, u, beta)


def linear_drift(dimension: int, *, momentum: bool) -> LinearDrift:
    """A `LinearDrift` that is zero: the training starts from the move's own reverse.

    Arguments:
        dimension: of positions.
        momentum: whether the move has one (`Hamiltonian`).
    """
    inputs = 2 * dimension if momentum else dimension
    return LinearDrift(jnp.zeros((2, dimension, inputs)), jnp.zeros((2, dimension)))


def network_drift(
    key: PRNGKeyArray, dimension: int, *, momentum: bool, width: int = 64, depth: int = 2, linear: bool = False
) -> NetworkDrift:
    """A `NetworkDrift` that is zero, its last layer being so: the training starts from the move's own reverse.

    Arguments:
        key: a PRNG key, of the hidden layers.
        dimension: of positions, which should be of scales near 1.
        momentum: whether the move has one (`Hamiltonian`).
        width, depth: of the hidden layers.
        linear: add a `linear_drift`, which a narrow network of many dimensions would have to imitate.
    """
    inputs = 1 + (2 * dimension if momentum else dimension)
    network = eqx.nn.MLP(inputs, dimension, width, depth, activation=jax.nn.silu, key=key)
    network = eqx.tree_at(lambda n: n.layers[-1], network, replace_fn=_zeroed)
    return NetworkDrift(network, linear_drift(dimension, momentum=momentum) if linear else None)


def _zeroed(layer: eqx.nn.Linear) -> eqx.nn.Linear:
    return jax.tree.map(lambda leaf: 0 * leaf, layer)
