"""The geometric path from a base to a target, and the schedule of inverse temperatures along it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from lehr.chunked_scan import costly
from lehr.errors import InputError
from lehr.numerics import is_concrete


@runtime_checkable
class Base(Protocol):
    """A normalised distribution over positions; FlowJAX's and NumPyro's multivariate distributions fit."""

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Array:
        """Draws positions of shape `(*shape, dimension)`, reparameterised if the base is to be trained."""
        ...

    def log_prob(self, x: Array) -> Array:
        """The normalised log density of one position `(dimension,)`, a scalar."""
        ...


LogDensity = Callable[[Array], Array]


class Point(eqx.Module):
    """A position with the log densities (and gradients, where a kernel needs them) of base and target there.

    They are kept unmixed, so that another inverse temperature costs nothing. What a kernel does not need is None.
    """

    position: Float[Array, " dim"]
    log_base: Float[Array, ""] | None = None
    log_target: Float[Array, ""] | None = None
    grad_base: Float[Array, " dim"] | None = None
    grad_target: Float[Array, " dim"] | None = None

    @property
    def log_ratio(self) -> Float[Array, ""]:
        """log target - log base: the derivative of the path's log density in beta."""
        assert self.log_base is not None
        assert self.log_target is not None
        return self.log_target - self.log_base


class Tempered(eqx.Module):
    """The density f = base^(1 - beta) target^beta at one inverse temperature: all that a kernel sees of the path."""

    problem: "Problem"
    beta: Float[Array, ""]

    def gradient(self, position: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """grad log f: one gradient of the base and one of the target."""
        grad_target = costly(jax.grad(self.problem.log_prob)(position))
        return self._mix(jax.grad(self.problem.log_base)(position), grad_target)

    def log_prob_at(self, point: Point) -> Float[Array, ""]:
        """log f at an evaluated point; no work."""
        assert point.log_base is not None
        assert point.log_target is not None
        return self._mix(point.log_base, point.log_target)

    def gradient_at(self, point: Point) -> Float[Array, " dim"]:
        """grad log f at a point that was evaluated with its gradients; no work."""
        return self._mix(point.grad_base, point.grad_target)

    def evaluate(self, position: Float[Array, " dim"], *, gradient: bool) -> Point:
        """The densities at a position, with their gradients if asked for, in one pass."""
        return self.problem.evaluate(position, gradient=gradient)

    def _mix(self, base: Any, target: Any) -> Any:
        # At beta = 1 the base may be zero where the target is not, and 0 * inf must not hide it.
        return jnp.where(self.beta == 1, target, (1 - self.beta) * base + self.beta * target)


class Problem(eqx.Module):
    """The two ends of a path: a normalised `base` and an unnormalised `log_target`.

        f_beta(x) = base(x)^(1 - beta) target(x)^beta,    Z = integral of target.

    Arguments:
        base: anything with `sample(key, shape)` and `log_prob(x)`; positions are 1-D float arrays.
        log_target: maps one position `(dimension,)` to a scalar, the log of the unnormalised target, in nats. To train
            parameters of the target make it a pytree (an `equinox.Module`, a `jax.tree_util.Partial`).
        unravel: maps one position to what the user calls it (a pytree of named, constrained arrays), for reports; by
            default positions stay as they are. No density sees it.

    Raises `lehr.errors.InputError` if a sample is not a 1-D float array or a log density is not a scalar.
    """

    base: Any
    log_target: LogDensity
    unravel: Callable[[Array], Any] | None = None

    def __check_init__(self):
        position = self.position
        if position.ndim != 1 or not jnp.issubdtype(position.dtype, jnp.floating):
            raise InputError(
                f"a position must be a 1-D float array, but base.sample(key) gives {position.dtype}{position.shape}; "
                "ravel it (a scalar becomes shape (1,))"
            )
        for name, density in (("base.log_prob", self.base.log_prob), ("log_target", self.log_target)):
            value = jax.eval_shape(density, position)
            if not hasattr(value, "shape") or value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
                raise InputError(
                    f"{name}(x) must be one float for a position x of shape {position.shape}, but it is {value}; "
                    "sum it over the dimensions"
                )

    @property
    def position(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a position."""
        return jax.eval_shape(lambda: self.base.sample(jax.random.key(0)))

    def at(self, beta: Float[Array, ""]) -> Tempered:
        """The path's density at inverse temperature `beta` in [0, 1]."""
        return Tempered(self, beta)

    def log_base(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """log base(x), in the dtype of `x` (constants of a wider type stay where they are)."""
        return self.base.log_prob(x).astype(x.dtype)

    def log_prob(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """log target(x), in the dtype of `x`."""
        return self.log_target(x).astype(x.dtype)

    def evaluate(self, position: Float[Array, " dim"], *, gradient: bool) -> Point:
        """Both log densities at a position, and both gradients in the same pass if asked for."""
        if not gradient:
            return Point(position, self.log_base(position), self.log_prob(position))
        log_base, grad_base = jax.value_and_grad(self.log_base)(position)
        log_target, grad_target = costly(jax.value_and_grad(self.log_prob)(position))
        return Point(position, log_base, log_target, grad_base, grad_target)


class Schedule(eqx.Module):
    """Inverse temperatures 0 = beta_0 < beta_1 < ... < beta_K = 1, ordered by construction, trainable.

        beta_k = sum_{j <= k} softmax(logits)_j

    Any real `logits` give an increasing schedule, so that a gradient step cannot break it. The K increments are the
    only leaf. Make one with `linear`, `geometric`, `sigmoidal` or `from_betas`.

    **Gradient**: exact, through the softmax.
    """

    logits: Float[Array, " num_steps"]

    @property
    def num_steps(self) -> int:
        """K, the number of steps (of temperatures after the first)."""
        return self.logits.shape[0]

    @property
    def betas(self) -> Float[Array, " num_betas"]:
        """The K + 1 inverse temperatures, the ends exactly 0 and 1."""
        # A parallel sum of many small increments rounds; it must not fall, nor pass 1.
        inner = jnp.minimum(jax.lax.cummax(jnp.cumsum(jax.nn.softmax(self.logits))[:-1]), 1)
        end = jnp.ones((1,), inner.dtype)
        return jnp.concatenate([0 * end, inner, end])

    @classmethod
    def linear(cls, num_steps: int) -> "Schedule":
        """beta_k = k / K."""
        return cls(jnp.zeros(_at_least_one(num_steps)))

    @classmethod
    def geometric(cls, num_steps: int, *, first: float = 1e-3) -> "Schedule":
        """beta_k = first^((K - k) / (K - 1)): a constant ratio from `first` to 1, with `first` in (0, 1)."""
        if not 0 < first < 1:
            raise InputError(f"the first inverse temperature must be inside (0, 1), but it is {first}")
        k = np.arange(1, _at_least_one(num_steps) + 1)
        return cls.from_betas(np.concatenate([[0.0], np.power(first, (num_steps - k) / max(num_steps - 1, 1))]))

    @classmethod
    def sigmoidal(cls, num_steps: int, *, steepness: float = 4.0) -> "Schedule":
        """beta_k = [s(t_k) - s(-delta)] / [s(delta) - s(-delta)], t_k from -delta to delta, s the sigmoid.

        Small steps at both ends; delta = `steepness` > 0. Source: Grosse, Ghahramani, Adams 2015, section 6.
        """
        if not steepness > 0:
            raise InputError(f"the steepness of a sigmoidal schedule must be positive, but it is {steepness}")
        s = 1 / (1 + np.exp(-np.linspace(-steepness, steepness, _at_least_one(num_steps) + 1)))
        betas = (s - s[0]) / (s[-1] - s[0])
        return cls.from_betas(np.concatenate([[0.0], betas[1:-1], [1.0]]))

    @classmethod
    def from_betas(cls, betas: ArrayLike | Sequence[ArrayLike]) -> "Schedule":
        """The schedule with the given inverse temperatures, K + 1 of them from 0 to 1.

        Raises `InputError` unless they increase strictly from 0 to 1.
        """
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not np.all(np.diff(betas) > 0):
            raise InputError(
                "a schedule must increase strictly from 0 to 1, for example [0, 0.5, 1]; "
                f"this one is {np.array2string(betas, threshold=8)}"
            )
        return cls(jnp.asarray(np.log(np.diff(betas))))


def _at_least_one(num_steps: int) -> int:
    if not is_concrete(num_steps) or num_steps < 1:
        raise InputError(f"a schedule needs at least 1 step, but num_steps is {num_steps}")
    return num_steps
