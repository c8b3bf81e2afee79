"""Proposals on discrete spaces, of one coordinate at a time; and spins, +1 and -1, as they are kept."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from lehr.errors import InputError, check_whole
from lehr.mh_gradient.proposals import AbstractProposal
from lehr.mh_gradient.target import Point
from lehr.numerics import is_concrete


class DiscreteUniform(AbstractProposal):
    """One coordinate, drawn at random, moves to one of its other states, all alike.

    Arguments:
        num_states: of each coordinate; positions are integers `(dim,)` from 0 to `num_states` - 1.

    Raises `lehr.errors.InputError` for fewer than two states.
    """

    num_states: int = eqx.field(static=True)

    symmetric: ClassVar[bool] = True

    def __init__(self, num_states: int):
        self.num_states = check_whole("num_states", num_states, 2)

    def noise(self, key: PRNGKeyArray, num_steps: int, x: Shaped[Array, " dim"]) -> tuple[Array, Array]:
        key_site, key_shift = jax.random.split(key)
        sites = jax.random.randint(key_site, (num_steps,), 0, x.shape[0])
        return sites, jax.random.randint(key_shift, (num_steps,), 1, self.num_states).astype(x.dtype)

    def propose(self, point: Point, noise: Any) -> Array:
        site, shift = noise
        # Not the remainder of x + shift: the sum may not fit the type of x.
        left = (self.num_states - shift.astype(jnp.int32)).astype(point.x.dtype)
        x = point.x
        return jnp.where(is_at(site, x), jnp.where(x < left, x + shift, x - left), x)

    def log_prob(self, point: Point, x_new: Array) -> Float[Array, ""]:
        del x_new
        return -jnp.log(jnp.asarray(point.x.shape[0] * (self.num_states - 1), jnp.result_type(float)))

    def check(self, x: Any) -> None:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise InputError(f"DiscreteUniform moves integer positions, but x0 is of type {x.dtype}")
        if self.num_states - 1 > jnp.iinfo(x.dtype).max:
            raise InputError(f"{self.num_states} states do not fit the type of x0, {x.dtype}: give it as int32")
        if is_concrete(x) and not np.all((np.asarray(x) >= 0) & (np.asarray(x) < self.num_states)):
            raise InputError(f"DiscreteUniform moves positions from 0 to {self.num_states - 1}, but x0 is {x}")


class SpinFlip(AbstractProposal):
    """One spin, drawn at random, is turned over; positions are +1 or -1, floats or integers `(dim,)`."""

    symmetric: ClassVar[bool] = True
    involutive: ClassVar[bool] = True

    def noise(self, key: PRNGKeyArray, num_steps: int, x: Shaped[Array, " dim"]) -> Array:
        return jax.random.randint(key, (num_steps,), 0, x.shape[0])

    def propose(self, point: Point, noise: Any) -> Array:
        return flipped(point.x, noise)

    def changed(self, x: Array, x_new: Array) -> Array:
        del x_new
        return jnp.full(1, 2, x.dtype)

    def kept(self, x: Array) -> Array:
        return spins_kept(x)

    def restored(self, kept: Array) -> Array:
        return spins_of(kept)

    def log_prob(self, point: Point, x_new: Array) -> Float[Array, ""]:
        del x_new
        return -jnp.log(jnp.asarray(point.x.shape[0], jnp.result_type(float)))

    def check(self, x: Any) -> None:
        check_spins(x)


def flipped(x: Shaped[Array, " dim"], site: Int[Array, ""]) -> Shaped[Array, " dim"]:
    """Spins with one turned over."""
    return jnp.where(is_at(site, x), -x, x)


def is_at(site: Int[Array, ""], x: Shaped[Array, " dim"]) -> Bool[Array, " dim"]:
    """A flag for each coordinate. (With it all of them take less time than one that is gathered and scattered.)"""
    return jnp.arange(x.shape[0]) == site


def spins_kept(x: Shaped[Array, " dim"]) -> Shaped[Array, " dim"]:
    """Spins as they are kept: floats as one byte."""
    return x > 0 if jnp.issubdtype(x.dtype, jnp.floating) else x


def spins_of(kept: Shaped[Array, " dim"]) -> Shaped[Array, " dim"]:
    """The spins again. (All float positions have the precision of the session.)"""
    return jnp.where(kept, 1.0, -1.0).astype(jnp.result_type(float)) if kept.dtype == bool else kept


def check_spins(x: Any) -> None:
    """Raises `InputError` for positions other than +1 and -1."""
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.signedinteger)):
        raise InputError(f"spins are +1 or -1, which {x.dtype} has not: give them as floats or signed integers")
    if is_concrete(x) and not np.all(np.abs(np.asarray(x)) == 1):
        raise InputError("spins are +1 or -1, but x0 has other numbers: give for example jnp.ones(num_sites)")
