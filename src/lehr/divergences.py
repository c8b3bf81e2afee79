"""Entropies and divergences in closed form."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flowjax import bijections
from flowjax.distributions import AbstractTransformed, StandardNormal
from jaxtyping import Array, Float
from paramax import unwrap

from lehr.errors import InputError
from lehr.gaussian import Gaussian

#: maps of the form A x + b with A the same everywhere
_AFFINE = (
    bijections.Affine,
    bijections.Flip,
    bijections.Identity,
    bijections.Loc,
    bijections.Permute,
    bijections.Scale,
    bijections.TriangularAffine,
)


def entropy(base: Any) -> Float[Array, ""]:
    """-E[log base(x)], x ~ base, in nats, exactly: of FlowJAX's Gaussians, and of what has an `entropy()` of its own.

    With x = A z + b, z ~ N(0, I):  (dim / 2) log(2 pi e) + log |det A|.

    Arguments:
        base: a distribution over `(dim,)`: FlowJAX's `Normal`, `MultivariateNormal` or a standard normal under affine
            bijections; or any with `entropy()` (`lehr.Gaussian`, NumPyro's).

    **Gradient**: exact.

    Raises `lehr.errors.InputError` for a base whose entropy is not known, such as a flow, or a transformed distribution
    of NumPyro's.
    """
    unknown = (
        f"the entropy of a {type(base).__name__} is not known in closed form: give a function entropy(base), or use "
        "objectives.elbo or elbo_stl"
    )
    if callable(getattr(base, "entropy", None)):
        try:
            return base.entropy()
        except NotImplementedError as error:  # NumPyro's way to say so
            raise InputError(unknown) from error
    bijection = _gaussian_map(base)
    if bijection is None:
        raise InputError(unknown)
    origin = jnp.zeros(bijection.shape)
    return origin.size / 2 * (1 + math.log(2 * math.pi)) + bijection.transform_and_log_det(origin)[1]


def kl_divergence(base: Any, prior: Any) -> Float[Array, ""]:
    """KL(base || prior) = E[log base(x) - log prior(x)], x ~ base, in nats, exactly, of two Gaussians.

    `lehr.Gaussian` and those of FlowJAX, in any pair.

    With x = A z + b, and M = A_prior^-1 A, c = A_prior^-1 (b - b_prior):

        KL = (|M|^2 + |c|^2 - dim) / 2 - log |det M|.

    Work: dim + 1 passes through both maps.

    **Gradient**: exact.

    Raises `lehr.errors.InputError` for other distributions.
    """
    ours, theirs = _gaussian_map(base), _gaussian_map(prior)
    if ours is None or theirs is None:
        other = type(base if ours is None else prior).__name__
        raise InputError(
            f"the divergence is known in closed form between Gaussians of lehr and FlowJAX, not of a {other}: give a "
            "function kl(base, prior), or use objectives.elbo or elbo_stl"
        )
    whitened = bijections.Chain([ours, bijections.Invert(theirs)])
    origin = jnp.zeros(ours.shape)
    c, log_det = whitened.transform_and_log_det(origin)
    columns = jax.vmap(whitened.transform)(jnp.eye(origin.size, dtype=origin.dtype)) - c
    return (jnp.sum(columns**2) + jnp.sum(c**2) - origin.size) / 2 - log_det


def _gaussian_map(distribution: Any) -> bijections.AbstractBijection | None:
    """The affine map under which N(0, I) becomes the distribution; None if there is none that is known."""
    if isinstance(distribution, Gaussian):
        return unwrap(bijections.TriangularAffine(distribution.loc, distribution.scale_tril))
    if isinstance(distribution, StandardNormal):
        return bijections.Identity(distribution.shape)
    if not isinstance(distribution, AbstractTransformed):
        return None
    merged = distribution.merge_transforms()
    bijection = unwrap(merged.bijection)
    return bijection if isinstance(merged.base_dist, StandardNormal) and _is_affine(bijection) else None


def _is_affine(bijection: Any) -> bool:
    if isinstance(bijection, bijections.Chain):
        return all(_is_affine(part) for part in bijection.bijections)
    if isinstance(bijection, bijections.Invert | bijections.Vmap):
        return _is_affine(bijection.bijection)
    return isinstance(bijection, _AFFINE)
