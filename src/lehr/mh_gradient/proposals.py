"""Proposals q(x, x'): what is drawn in a step, as a function of noise, and its log density."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Shaped

from lehr.errors import InputError
from lehr.mh_gradient.target import Point
from lehr.numerics import inverse_of_lower, is_concrete, normal


class AbstractProposal(eqx.Module):
    """A proposal: x' is a function of the present point and of noise that does not depend on it."""

    #: q(x, x') = q(x', x): the ratio of the two is left out
    symmetric: eqx.AbstractClassVar[bool]
    #: of the log density, at the present point
    needs_gradient: ClassVar[bool] = False
    #: x' is a differentiable function of positions and of the proposal's own numbers
    reparameterised: ClassVar[bool] = False
    #: the same noise leads back, from x' to x exactly
    involutive: ClassVar[bool] = False

    @abc.abstractmethod
    def noise(self, key: PRNGKeyArray, num_steps: int, x: Shaped[Array, " dim"]) -> Any:
        """That of all steps, with a leading axis."""

    @abc.abstractmethod
    def propose(self, point: Point, noise: Any) -> Shaped[Array, " dim"]:
        """x'."""

    @abc.abstractmethod
    def log_prob(self, point: Point, x_new: Shaped[Array, " dim"]) -> Float[Array, ""]:
        """log q(x, x')."""

    def log_ratio(self, new: Point, old: Point) -> Float[Array, ""] | float:
        """log q(x', x) - log q(x, x')."""
        return 0.0 if self.symmetric else self.log_prob(new, old.x) - self.log_prob(old, new.x)

    def changed(self, x: Array, x_new: Array) -> Array:
        """|x' - x|, or of its coordinates those that are not 0."""
        return difference(x, x_new)

    def kept(self, x: Array) -> Array:
        """A position in the form in which it is kept for the gradient."""
        return x

    def restored(self, kept: Array) -> Array:
        """The position again, exactly."""
        return kept

    def check(self, x: Any) -> None:
        """Raises `InputError` for positions that it cannot move."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"{type(self).__name__} moves float positions, but x0 is of type {x.dtype}")


class Scale(eqx.Module):
    """L of a covariance L L^T, a number, a number for each dimension, or a lower triangular matrix; and its inverse."""

    value: Array
    inverse: Array

    def __init__(self, name: str, value: ArrayLike):
        if is_concrete(value):
            array: Any
            try:
                array = np.asarray(value, np.float64)
            except (TypeError, ValueError):
                array = np.full((), np.nan)
            diagonal = np.diagonal(array) if array.ndim == 2 else array
            triangular = array.ndim < 2 or (array.shape[0] == array.shape[1] and not np.triu(array, 1).any())
            if array.ndim > 2 or not triangular or not np.all(np.isfinite(array)) or not np.all(diagonal > 0):
                raise InputError(
                    f"{name} must be a positive number, one for each dimension, or a lower triangular matrix with a "
                    f"positive diagonal, but it is {str(value)[:60]}"
                )
        self.value = jnp.asarray(value, jnp.result_type(float))
        if not is_concrete(value):
            diagonal = jnp.diagonal(self.value) if self.value.ndim == 2 else self.value
            text = f"{name} must be positive"
            self.value = eqx.error_if(self.value, ~jnp.all(diagonal > 0), text)
        self.inverse = inverse_of_lower(self.value) if self.value.ndim == 2 else 1 / self.value

    def times(self, z: Array) -> Array:
        """L z."""
        return self.value @ z if self.value.ndim == 2 else self.value * z

    def transposed_times(self, z: Array) -> Array:
        """L^T z."""
        return self.value.T @ z if self.value.ndim == 2 else self.value * z

    def solve(self, d: Array) -> Array:
        """L^-1 d."""
        return self.inverse @ d if self.value.ndim == 2 else self.inverse * d

    def log_det(self, dimension: int) -> Array:
        """log det L."""
        if self.value.ndim == 2:
            return jnp.sum(jnp.log(jnp.diagonal(self.value)))
        return jnp.sum(jnp.broadcast_to(jnp.log(self.value), (dimension,)))

    def check(self, name: str, dimension: int) -> None:
        """Raises `InputError` for positions of another dimension."""
        if self.value.ndim and self.value.shape[0] != dimension:
            raise InputError(
                f"{name} is for {self.value.shape[0]} dimensions, but x0 has {dimension}: give a number or one for each"
            )


class AbstractGaussian(AbstractProposal):
    """x' = mean(x) + L z, z ~ N(0, I), with the same L everywhere: what the reflection couplings need."""

    scale: eqx.AbstractVar[Scale]

    reparameterised: ClassVar[bool] = True

    @abc.abstractmethod
    def mean(self, point: Point) -> Float[Array, " dim"]:
        """Of x', from the present point."""

    def noise(self, key: PRNGKeyArray, num_steps: int, x: Shaped[Array, " dim"]) -> Float[Array, "num_steps dim"]:
        return normal(key, (num_steps, *x.shape), x.dtype)

    def propose(self, point: Point, noise: Any) -> Float[Array, " dim"]:
        return self.mean(point) + self.scale.times(noise)

    def log_prob(self, point: Point, x_new: Array) -> Float[Array, ""]:
        z = self.scale.solve(x_new - self.mean(point))
        dim = x_new.shape[0]
        return -jnp.sum(z**2) / 2 - self.scale.log_det(dim) - dim * np.log(2 * np.pi) / 2

    def check(self, x: Any) -> None:
        super().check(x)
        self.scale.check(f"the scale of {type(self).__name__}", x.shape[-1])


class RandomWalk(AbstractGaussian):
    """q(x, .) = N(x, L L^T).

    Arguments:
        scale: L, in units of position: a positive number, `(dim,)`, or a lower triangular `(dim, dim)`.

    Raises `lehr.errors.InputError` for other scales.

    Source: Metropolis et al. 1953; scale 2.38 / sqrt(dim) standard deviations: Roberts, Gelman, Gilks 1997.
    """

    scale: Scale

    symmetric: ClassVar[bool] = True

    def __init__(self, scale: ArrayLike):
        self.scale = Scale("the scale of RandomWalk", scale)

    def mean(self, point: Point) -> Float[Array, " dim"]:
        return point.x


class MALA(AbstractGaussian):
    """The Metropolis-adjusted Langevin proposal, q(x, .) = N(x + L L^T grad log p(x) / 2, L L^T).

    It depends on the parameters of the target, through the drift: where these are differentiated, so is the path.

    Arguments:
        scale: L, in units of position: a positive number, `(dim,)`, or a lower triangular `(dim, dim)`.

    Raises `lehr.errors.InputError` for other scales.

    Source: Roberts, Tweedie 1996.
    """

    scale: Scale

    symmetric: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = True

    def __init__(self, scale: ArrayLike):
        self.scale = Scale("the scale of MALA", scale)

    def mean(self, point: Point) -> Float[Array, " dim"]:
        return point.x + self.scale.times(self.scale.transposed_times(point.gradient)) / 2


class PCN(AbstractGaussian):
    """Preconditioned Crank-Nicolson, q(x, .) = N(m + sqrt(1 - b^2) (x - m), b^2 L L^T), reversible for N(m, L L^T).

    Arguments:
        step: b in (0, 1).
        scale: L of the prior: a positive number, `(dim,)`, or a lower triangular `(dim, dim)`.
        loc: m, a number or `(dim,)`.

    Raises `lehr.errors.InputError` for values out of range.

    Source: Cotter, Roberts, Stuart, White 2013.
    """

    step: Array
    scale: Scale
    loc: Array

    symmetric: ClassVar[bool] = False

    def __init__(self, step: ArrayLike, scale: ArrayLike = 1.0, loc: ArrayLike = 0.0):
        if is_concrete(step) and not (np.ndim(step) == 0 and 0 < float(np.asarray(step)) < 1):
            raise InputError(f"the step of PCN must be between 0 and 1, but it is {str(step)[:40]}")
        self.step = jnp.asarray(step, jnp.result_type(float))
        Scale("the scale of PCN", scale)  # before it is multiplied, for the message
        self.scale = Scale("the scale of PCN", self.step * jnp.asarray(scale))
        if is_concrete(loc) and not np.all(np.isfinite(np.asarray(loc, np.float64))):
            raise InputError(f"the loc of PCN must be finite, but it is {str(loc)[:60]}")
        self.loc = jnp.asarray(loc, jnp.result_type(float))

    def mean(self, point: Point) -> Float[Array, " dim"]:
        return self.loc + jnp.sqrt(1 - self.step**2) * (point.x - self.loc)

    def check(self, x: Any) -> None:
        super().check(x)
        if self.loc.shape not in ((), x.shape[-1:]):
            raise InputError(f"the loc of PCN has the shape {self.loc.shape}, but positions have {x.shape[-1:]}")


class Independence(AbstractProposal):
    """The independence sampler, q(x, .) = q(.).

    Arguments:
        distribution: has `sample(key)`, a position `(dim,)`, and `log_prob(x)`: a `lehr.Gaussian`, FlowJAX's, yours.

    Source: Tierney 1994.
    """

    distribution: Any

    symmetric: ClassVar[bool] = False

    def noise(self, key: PRNGKeyArray, num_steps: int, x: Shaped[Array, " dim"]) -> Array:
        return jax.vmap(self.distribution.sample)(jax.random.split(key, num_steps)).astype(x.dtype)

    def propose(self, point: Point, noise: Any) -> Array:
        del point
        return noise

    def log_prob(self, point: Point, x_new: Array) -> Float[Array, ""]:
        del point
        return self.distribution.log_prob(x_new)

    def check(self, x: Any) -> None:
        super().check(x)
        drawn = jax.eval_shape(self.distribution.sample, jax.eval_shape(lambda: jax.random.key(0)))
        if drawn.shape != x.shape[-1:]:
            raise InputError(f"Independence draws positions of the shape {drawn.shape}, but x0 has {x.shape[-1:]}")


class OwnProposal(AbstractProposal):
    """A user's proposal: an object with `sample(key, x)` and `log_prob(x, x_new)`."""

    own: Any

    symmetric: ClassVar[bool] = False

    def noise(self, key: PRNGKeyArray, num_steps: int, x: Shaped[Array, " dim"]) -> Array:
        del x
        return jax.random.split(key, num_steps)

    def propose(self, point: Point, noise: Any) -> Array:
        return self.own.sample(noise, point.x)

    def log_prob(self, point: Point, x_new: Array) -> Float[Array, ""]:
        return self.own.log_prob(point.x, x_new)

    def check(self, x: Any) -> None:
        key, one = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct(x.shape[-1:], x.dtype)
        new = jax.eval_shape(self.own.sample, key, one)
        if new.shape != one.shape or new.dtype != one.dtype:
            raise InputError(
                f"sample(key, x) of {type(self.own).__name__} gives {new.dtype}{list(new.shape)}, but x0 is "
                f"{one.dtype}{list(one.shape)}: it must give positions like x"
            )


def difference(x: Array, y: Array) -> Array:
    """|x - y|, also of unsigned types, and 0 only where they are equal."""
    return jnp.where(x > y, x - y, y - x)
