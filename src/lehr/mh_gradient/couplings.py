"""Couplings: how a second chain is moved with the first, so that it follows its own law, and meets the first.

That chains have met is a flag, and not read off their positions: a compiler may compute x' twice, and round it
otherwise where y' takes it.

A coupling is *faithful* if chains at the same position move alike. All here are but `Independent`. In the engine chains
that have met stay together by any coupling, which changes no law: it is the same kernel from the same place.
"""

import abc
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.mh_gradient.discrete import DiscreteUniform, SpinFlip, is_at
from lehr.mh_gradient.kernel import Kernel, Move, at_same_place, choose
from lehr.mh_gradient.proposals import AbstractGaussian, AbstractProposal, RandomWalk
from lehr.mh_gradient.target import Point
from lehr.numerics import normal


class Proposed(NamedTuple):
    """y', and whether it is x'; None where that can be read off the positions."""

    x: Any
    same: Any = None


class Followed(NamedTuple):
    """Where the other chain went, and whether it has met the first."""

    point: Point
    met: Any

    @property
    def x(self) -> Array:
        """Its position."""
        return self.point.x


class AbstractCoupling(eqx.Module):
    """Moves a second chain with the first: the same uniform number decides on both proposals."""

    #: chains at the same position propose the same
    faithful: ClassVar[bool] = True
    #: of the log density, where the chains are
    needs_gradient: ClassVar[bool] = False

    def check(self, proposal: AbstractProposal) -> None:
        """Raises `InputError` for a proposal that it does not fit."""

    def noise(self, proposal: AbstractProposal, key: PRNGKeyArray, uniform: Float[Array, " n"], x: Array) -> Any:
        """Its own, of n steps, with a leading axis; a uniform number for each has been drawn, and is its to use."""
        del proposal, key, uniform, x

    @abc.abstractmethod
    def propose(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Proposed:
        """y', of the law q(y, .)."""

    def log_uniform(self, move: Move, other: Point) -> Float[Array, ""]:
        """That decides on y'."""
        del other
        return move.log_uniform

    def follow(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Followed:
        """Where the other chain goes."""
        x_new, same = self.propose(kernel, move, other, noise)
        new = kernel.target.at(x_new)
        accepted = self.log_uniform(move, other) < kernel.log_ratio(new, other)
        after = choose(accepted, new, other)
        met = at_same_place(after.x, move.after.x) if same is None else same & accepted & move.accepted
        return Followed(after, met)


class CommonRandomNumbers(AbstractCoupling):
    """The same noise for both proposals. Any proposal.

    With an independence sampler y' = x', and the chains meet where both accept it. Chains of a random walk in
    a continuous space never meet: then use a reflection.
    """

    def propose(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Proposed:
        del noise
        return Proposed(kernel.proposal.propose(other, move.noise))


class Independent(AbstractCoupling):
    """A fresh proposal for the other chain, from noise of its own. Any proposal; a bad coupling, to compare with.

    Chains in a continuous space never meet.
    """

    faithful: ClassVar[bool] = False

    def noise(self, proposal: AbstractProposal, key: PRNGKeyArray, uniform: Float[Array, " n"], x: Array) -> Any:
        return proposal.noise(key, len(uniform), x)

    def propose(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Proposed:
        return Proposed(kernel.proposal.propose(other, noise))


class MaximalReflection(AbstractCoupling):
    """Proposals of two Gaussians N(m_x, L L^T), N(m_y, L L^T) are equal as often as can be, and else reflected.

    With d = L^-1 (m_x - m_y) and z the noise of x':

        y' = x'                         if log U <= |z|^2 / 2 - |z + d|^2 / 2, with U uniform,
        y' = m_y + L (z - 2 (e.z) e)    else, e = d / |d|.

    For `RandomWalk`, `PCN` and `MALA`.

    Source: Jacob, O'Leary, Atchade 2020, section 4.1; Bou-Rabee, Eberle, Zimmer 2020.
    """

    def check(self, proposal: AbstractProposal) -> None:
        _check_gaussian(self, proposal)

    def noise(self, proposal: AbstractProposal, key: PRNGKeyArray, uniform: Float[Array, " n"], x: Array) -> Array:
        del proposal, key, x
        return jnp.log1p(-uniform)

    def propose(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Proposed:
        proposal = kernel.proposal
        assert isinstance(proposal, AbstractGaussian)
        z, mean = move.noise, proposal.mean(other)
        d = proposal.scale.solve(proposal.mean(move.old) - mean)
        along, square = jnp.sum(d * z), jnp.sum(d * d)
        # |z + d|^2 - |z|^2 without the cancellation of two large numbers
        same = noise <= -(along + square / 2)
        # In one dimension, where that much is a good part of a step, a reflection is a change of sign.
        mirrored = -z if len(z) == 1 else z - 2 * along / jnp.where(square > 0, square, 1) * d
        reflected = mean + proposal.scale.times(mirrored)
        return Proposed(jnp.where(same, move.new.x, reflected), same)


class GCRefl(AbstractCoupling):
    """Gradient-corrected reflection: far apart, chains share the noise along the gradients of their log densities.

    Where |d|^2 = |L^-1 (x - y)|^2 is below the threshold this is `MaximalReflection`. Else, with e = d / |d|, and n_x,
    n_y the unit gradients of the two chains, projected orthogonally to e, the noise of y' is

        z_y = (w - (n_y.w) n_y + (n_x.z) n_y) - 2 (e.z) e,    w = z + (xi - n_x.z) n_x,    xi ~ N(0, 1):

    reflected along e, the same along each chain's gradient, and the same in what is orthogonal to all of them. So both
    proposals climb or descend alike, and are accepted together, in many dimensions too.

    For `RandomWalk`; it evaluates a gradient of the log density where the chains are.

    Arguments:
        threshold: of |d|^2; None is the number of dimensions.

    Raises `lehr.errors.InputError` for a threshold that is not positive.

    Source: Papp, Sherlock 2022 (GCRW, GCRefl).
    """

    threshold: float | None = eqx.field(static=True)

    needs_gradient: ClassVar[bool] = True

    def __init__(self, threshold: float | None = None):
        if threshold is not None and not 0 < threshold < float("inf"):
            raise InputError(f"the threshold of GCRefl must be positive, but it is {threshold}")
        self.threshold = threshold

    def check(self, proposal: AbstractProposal) -> None:
        if not isinstance(proposal, RandomWalk):
            raise InputError(f"GCRefl is for RandomWalk, not for {type(proposal).__name__}: use MaximalReflection")

    def noise(
        self, proposal: AbstractProposal, key: PRNGKeyArray, uniform: Float[Array, " n"], x: Array
    ) -> tuple[Array, Array]:
        return MaximalReflection().noise(proposal, key, uniform, x), normal(key, uniform.shape, x.dtype)

    def propose(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Proposed:
        proposal = kernel.proposal
        assert isinstance(proposal, RandomWalk)
        log_uniform, xi = noise
        near = MaximalReflection().propose(kernel, move, other, log_uniform)
        z, d = move.noise, proposal.scale.solve(move.old.x - other.x)
        e = _unit(d)

        def along(point: Point) -> Array:
            gradient = proposal.scale.transposed_times(point.gradient)
            rest = gradient - jnp.sum(e * gradient) * e
            # Of a gradient along e nothing is left but rounding, which is no direction.
            is_some = jnp.sum(rest**2) > 1e-6 * jnp.sum(gradient**2)
            rest = jnp.where(is_some, _unit(rest), 0)
            return _unit(rest - jnp.sum(e * rest) * e)

        n_x, n_y = along(move.old), along(other)
        shared = jnp.dot(n_x, z)
        w = z + (xi - shared) * n_x
        # In one dimension, and where a gradient vanishes, n is 0, and its term with it.
        has_both = jnp.any(n_x != 0) & jnp.any(n_y != 0)
        corrected = jnp.where(has_both, w - jnp.dot(n_y, w) * n_y + shared * n_y, z)
        far = other.x + proposal.scale.times(corrected - 2 * jnp.dot(e, z) * e)
        threshold = z.shape[0] if self.threshold is None else self.threshold
        is_near = jnp.sum(d**2) < threshold
        return Proposed(jnp.where(is_near, near.x, far), is_near & near.same)


class MaximalIndependent(AbstractCoupling):
    """The other chain moves the same coordinate to the same state where it can: y'_i = x'_i, else y'_i = x_i.

    (It cannot where y_i = x'_i.) For `DiscreteUniform`.

    Source: Arya et al. 2023, section 3.
    """

    def check(self, proposal: AbstractProposal) -> None:
        if not isinstance(proposal, DiscreteUniform):
            raise InputError(
                f"MaximalIndependent is for DiscreteUniform, not for {type(proposal).__name__}: use CommonRandomNumbers"
            )

    def propose(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Proposed:
        del kernel, noise
        site, _ = move.noise
        there, y = move.new.x, other.x
        return Proposed(jnp.where(is_at(site, y), jnp.where(there != y, there, move.old.x), y))


class MonotoneSpin(AbstractCoupling):
    """Both chains turn the same spin, and agree on it as often as can be.

    Where they differ in that spin, one would go up and the other down, and y' is decided by 1 - u in place of u: so
    both end up, or both down, as often as can be. With `HeatBath` the same random number decides on each spin of both
    chains, and in ferromagnets order is kept: from x <= y, x' <= y'.

    For `SpinFlip` and `HeatBath`.

    Source: Propp, Wilson 1996 (monotone coupling).
    """

    def check(self, proposal: AbstractProposal) -> None:
        if not isinstance(proposal, SpinFlip):
            raise InputError(f"MonotoneSpin is for SpinFlip and HeatBath, not for {type(proposal).__name__}")

    def propose(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Proposed:
        del noise
        return Proposed(kernel.proposal.propose(other, move.noise))

    def log_uniform(self, move: Move, other: Point) -> Float[Array, ""]:
        # The spin that was turned, or not, where the chain is now: no other position needs to be made.
        spin = move.after.x[move.noise]
        agree = jnp.where(move.accepted, -spin, spin) == other.x[move.noise]
        return jnp.where(agree, move.log_uniform, jnp.log(-jnp.expm1(move.log_uniform)))


class FullKernelMaximal(AbstractCoupling):
    """The states after a step are equal as often as the two kernels, acceptance and all, allow.

    If x accepts x', then y+ = x' with probability min(1, q(y, x') alpha(y, x') / [q(x, x') alpha(x, x')]); else y+ is
    drawn from what is left of its kernel, by rejection: steps from y, each kept unless it could have been x's.

    For any proposal with a density that reaches all of space: `RandomWalk`, `MALA`, `PCN`, `Independence`, your own.

    Source: Wang, O'Leary, Jacob 2021.
    """

    def check(self, proposal: AbstractProposal) -> None:
        if isinstance(proposal, DiscreteUniform | SpinFlip):
            raise InputError(
                f"FullKernelMaximal is for proposals on a continuous space, not for {type(proposal).__name__}"
            )

    def noise(self, proposal: AbstractProposal, key: PRNGKeyArray, uniform: Float[Array, " n"], x: Array) -> Array:
        del proposal, x
        return jax.random.split(key, len(uniform))

    def propose(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Proposed:
        raise NotImplementedError  # it couples what follows acceptance

    def follow(self, kernel: Kernel, move: Move, other: Point, noise: Any) -> Followed:
        key_same, key_rest = jax.random.split(noise)

        def log_kernel(old: Point, new: Point) -> Array:
            return kernel.proposal.log_prob(old, new.x) + jnp.minimum(0, kernel.log_ratio(new, old))

        def log_share(of: Point, beside: Point, new: Point) -> Array:
            """log of p_beside / p_of at a place reached from `of`."""
            return log_kernel(beside, new) - log_kernel(of, new)

        log_u = -jax.random.exponential(key_same)
        same = move.accepted & (log_u <= log_share(move.old, other, move.new))

        def attempt(carry: tuple[Array, Point, Array]) -> tuple[Array, Point, Array]:
            key, _, _ = carry
            key, key_noise, key_accept, key_keep = jax.random.split(key, 4)
            z = jax.tree.map(lambda leaf: leaf[0], kernel.proposal.noise(key_noise, 1, other.x))
            new = kernel.target.at(kernel.proposal.propose(other, z))
            accepted = -jax.random.exponential(key_accept) < kernel.log_ratio(new, other)
            # Where y stays, x could not have come: its law has a density.
            kept = ~accepted | (-jax.random.exponential(key_keep) > log_share(other, move.old, new))
            return key, choose(accepted, new, other), kept

        # Nothing is left of the law of a chain that is with the other.
        together = at_same_place(move.old.x, other.x)
        start = (key_rest, choose(same, move.new, move.after), same | together)
        _, found, _ = jax.lax.while_loop(lambda carry: ~carry[2], attempt, start)
        return Followed(found, same | together)


def _check_gaussian(coupling: AbstractCoupling, proposal: AbstractProposal) -> None:
    if not isinstance(proposal, AbstractGaussian):
        raise InputError(
            f"{type(coupling).__name__} is for Gaussian proposals (RandomWalk, MALA, PCN), not for "
            f"{type(proposal).__name__}: use CommonRandomNumbers"
        )


def _unit(d: Array) -> Array:
    """d / |d|, or 0."""
    square = jnp.sum(d**2)
    return jnp.where(square > 0, d / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
