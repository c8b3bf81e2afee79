"""Leapfrog steps with momentum refreshment: the kernel of DAIS, and the proposal of HMC and HAIS."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.kernels.affine_in_beta import AffineInBeta
from lehr.kernels.contract import AbstractMove, State, Transition, log_of_parameter, rows
from lehr.numerics import is_concrete
from lehr.path import Point, Tempered


class Hamiltonian(AbstractMove):
    """Uncorrected leapfrog with partial momentum refreshment.

    With momentum v ~ N(0, M), M = diag(momentum_scale^2), step size e and persistence g, one leapfrog is

        x_half = x + (e/2) M^-1 v,   v_hat = v + e grad log f(x_half),   x' = x_half + (e/2) M^-1 v_hat,
        v' = g v_hat + sqrt(1 - g^2) xi,   xi ~ N(0, M),
        log L/T = log N(v_hat; 0, M) - log N(v; 0, M):

    one gradient and no density value. Under `Metropolis` the same flow is integrated kick, drift, kick, because the
    corrected step needs the density at its end, and gets the gradient for the next step in the same pass.

    Arguments:
        step_size: e > 0, in units of position times momentum scale. A number, `(dim,)`, `(num_steps, 1)` or
            `(num_steps, dim)`; a 1-D array is always one per dimension. Or an `AffineInBeta`.
        persistence: g in [0, 1); 0 draws fresh momentum each step and is then not a trainable leaf. A number or
            `(num_steps, 1)`.
        momentum_scale: sqrt(diag M) > 0, shapes as `step_size`.
        num_leapfrog: leapfrogs (and gradients) per step.

    **Gradient**: exact through the chain for every parameter (they are kept as logarithms and logits).

    Raises `InputError` for a step size or scale that is not positive, a persistence outside [0, 1), no leapfrog.

    Source: Zhang, Hsu, Li, Finn, Grosse 2021, algorithm 1 and equation (12); Neal 2001; Sohl-Dickstein, Culpepper 2012.
    """

    log_step_size: Array | AffineInBeta
    log_momentum_scale: Array | AffineInBeta
    logit_persistence: Array | None
    num_leapfrog: int = eqx.field(static=True)

    uses_gradient: ClassVar[bool] = True

    def __init__(
        self,
        step_size: ArrayLike | AffineInBeta,
        persistence: ArrayLike = 0.0,
        momentum_scale: ArrayLike | AffineInBeta = 1.0,
        num_leapfrog: int = 1,
    ):
        self.log_step_size = log_of_parameter("step_size", step_size)
        self.log_momentum_scale = log_of_parameter("momentum_scale", momentum_scale)
        self.logit_persistence = _logit_of_persistence(persistence)
        if num_leapfrog != int(num_leapfrog) or num_leapfrog < 1:
            raise InputError(f"num_leapfrog must be a whole number of at least 1, but it is {num_leapfrog}")
        self.num_leapfrog = int(num_leapfrog)

    @property
    def momentum_scale(self) -> Array:
        """sqrt(diag M), in the shape in which it was given."""
        return jnp.exp(rows(self.log_momentum_scale))

    @property
    def persistence(self) -> Array:
        """g."""
        return jnp.zeros(()) if self.logit_persistence is None else jax.nn.sigmoid(self.logit_persistence)

    # In the variable u = M^(-1/2) v ~ N(0, I), all of M and e is one vector h = e / momentum_scale:
    #     x_half = x + (h/2) u,   u_hat = u + h grad log f(x_half),   x' = x_half + (h/2) u_hat.
    # So momentum, drift and weight cannot disagree about M.
    @property
    def h(self) -> Array:
        """Step size over momentum scale: M^(-1/2) e."""
        return jnp.exp(rows(self.log_step_size) - rows(self.log_momentum_scale))

    def init(self, key: PRNGKeyArray, density: Tempered, position: Float[Array, " dim"]) -> State:
        del density
        return State(Point(position), self.draw_momentum(key, position))

    def draw_momentum(self, key: PRNGKeyArray, position: Float[Array, " dim"]) -> Float[Array, " dim"]:
        return jax.random.normal(key, position.shape, position.dtype)

    def move(self, density: Tempered, state: State, noise: Any) -> Transition:
        del noise
        assert state.momentum is not None
        h, u = self.h, state.momentum
        x, u, log_ratio = self._kicks_and_drifts(density, state.point.position + h / 2 * u, u)
        u, gained = _kick(u, h * density.gradient(x))
        return Transition(State(Point(x + h / 2 * u), u), log_ratio + gained)

    def propose(self, density: Tempered, state: State, noise: Any) -> Transition:
        del noise
        assert state.momentum is not None
        h = self.h
        u, first = _kick(state.momentum, h / 2 * density.gradient_at(state.point))
        x, u, log_ratio = self._kicks_and_drifts(density, state.point.position + h * u, u)
        point = density.evaluate(x, gradient=True)
        u, last = _kick(u, h / 2 * density.gradient_at(point))
        return Transition(State(point, u), first + log_ratio + last)

    def _kicks_and_drifts(self, density: Tempered, x: Array, u: Array) -> tuple[Array, Array, Array]:
        """The whole kicks and drifts between the two ends of a trajectory: all leapfrogs but one."""
        h = self.h

        def kick_and_drift(carry, _):
            x, u, log_ratio = carry
            u, gained = _kick(u, h * density.gradient(x))
            return (x + h * u, u, log_ratio + gained), None

        carry = (x, u, jnp.zeros((), x.dtype))
        return jax.lax.scan(kick_and_drift, carry, length=self.num_leapfrog - 1)[0]

    def refresh(self, state: State, noise: Any) -> State:
        if self.logit_persistence is None:
            return State(state.point, noise)
        assert state.momentum is not None
        return State(state.point, self.persistence * state.momentum + self.reverse_scale * noise)

    @property
    def reverse_scale(self) -> Array:
        # sqrt(1 - g^2), without cancellation as g -> 1
        if self.logit_persistence is None:
            return jnp.ones(())
        return jnp.sqrt(jax.nn.sigmoid(-self.logit_persistence) * (1 + self.persistence))

    def reverse_noise(self, density: Tempered, before: State, moved: State, noise: Any) -> Array:
        # Of u' = g u_hat + s xi the reverse draw is u_hat = g u' + s z.
        del density, before
        assert moved.momentum is not None
        return self.reverse_scale * moved.momentum - self.persistence * noise

    def flip(self, state: State) -> State:
        assert state.momentum is not None
        return State(state.point, -state.momentum)


def _kick(u: Array, change: Array) -> tuple[Array, Array]:
    """The momentum after a kick, and log N(after) - log N(before), a product: squares would cancel in float32."""
    after = u + change
    return after, -jnp.sum(change * (u + after)) / 2


def _logit_of_persistence(persistence: ArrayLike) -> Array | None:
    if is_concrete(persistence):
        values = np.asarray(persistence)
        if not np.all((values >= 0) & (values < 1)):
            raise InputError(f"persistence must be in [0, 1), but it is {persistence}")
        if np.all(values == 0):
            return None
        if np.any(values == 0):
            raise InputError("persistence must be zero at every step or positive at every step")
    value = jnp.asarray(persistence, dtype=jnp.result_type(float))
    # A traced zero would be the end of the logit's range: fresh momentum is a structure, not a value.
    value = eqx.error_if(value, ~((value > 0) & (value < 1)), "a traced persistence must be inside (0, 1)")
    return jnp.log(value) - jnp.log1p(-value)
