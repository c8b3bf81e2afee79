"""A log density over named, bounded arrays as a problem over one unconstrained vector."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection
from flowjax.distributions import StandardNormal
from jaxtyping import Array, Float

from lehr.errors import InputError
from lehr.path import Problem


class Layout(eqx.Module):
    """How a pytree of arrays lies in one vector: in the order of its leaves (`jax.flatten_util.ravel_pytree`).

    Arguments:
        treedef: the structure of the pytree.
        shapes: the shape of each leaf.
    """

    treedef: Any = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    @classmethod
    def of(cls, tree: Any) -> "Layout":
        """The layout of a pytree whose leaves have shapes."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(tuple(jnp.shape(leaf)) for leaf in leaves))

    @property
    def dimension(self) -> int:
        """The length of the vector."""
        return sum(map(math.prod, self.shapes))

    def split(self, x: Float[Array, " dim"]) -> list[Array]:
        """The leaves, in the dtype of `x` (which `ravel_pytree` would fix once and for all)."""
        leaves, start = [], 0
        for shape in self.shapes:
            leaves.append(x[start : start + math.prod(shape)].reshape(shape))
            start += math.prod(shape)
        return leaves

    def unravel(self, x: Float[Array, " dim"]) -> Any:
        """The pytree."""
        return jax.tree.unflatten(self.treedef, self.split(x))


class Constrain(eqx.Module):
    """Maps an unconstrained position to the pytree that the user's log density takes."""

    layout: Layout
    bijections: tuple[AbstractBijection | None, ...]

    def with_log_det(self, x: Float[Array, " dim"]) -> tuple[Any, Float[Array, ""]]:
        """The pytree, and log |det| of the Jacobian of the map, summed over the leaves."""
        leaves, total = [], jnp.zeros((), x.dtype)
        for leaf, bijection in zip(self.layout.split(x), self.bijections):
            if bijection is not None:
                value, log_det = _transform(bijection, leaf)
                # A float64 bijection must not widen float32 positions.
                leaf, total = value.astype(x.dtype), total + log_det.astype(x.dtype)
            leaves.append(leaf)
        return jax.tree.unflatten(self.layout.treedef, leaves), total

    def __call__(self, x: Float[Array, " dim"]) -> Any:
        return self.with_log_det(x)[0]


class UnconstrainedDensity(eqx.Module):
    """x -> log_density(T(x)) + log |det dT/dx|: the same integral over all of R^dim."""

    log_density: Callable[[Any], Array]
    constrain: Constrain

    def __call__(self, x: Float[Array, " dim"]) -> Array:
        tree, log_det = self.constrain.with_log_det(x)
        return self.log_density(tree) + log_det


def from_function(
    log_density: Callable[[Any], Array], example: Any, *, bijections: Any = None, base: Any = None
) -> Problem:
    """The problem of a log density over a pytree of named arrays, some of them bounded.

        log target(x) = log_density(T(x)) + log |det dT/dx|,    Z = integral of exp(log_density).

    Arguments:
        log_density: maps a pytree like `example` to the log unnormalised density, a scalar, in nats. To train its
            parameters make it a pytree (an `equinox.Module`).
        example: a pytree of float arrays, of which only the shapes count: `{"mu": jnp.zeros(3), "sigma": 1.0}`. A
            pytree without leaves is a model without parameters; its position has shape (0,).
        bijections: the bounds. A FlowJAX bijection from the unconstrained numbers to the constrained ones for each
            leaf, or None where there are no bounds: a prefix of the pytree `example`, in whose dicts names may be left
            out. `{"sigma": flowjax.bijections.Exp()}` makes sigma positive, `Chain([Sigmoid(), Affine(a, b - a)])`
            keeps it in (a, b). A bijection of a smaller shape, such as (), is applied along the leading axes of a leaf.
        base: a base over unconstrained positions `(dim,)`; a standard normal by default. The better it covers the
            posterior, the less annealing is left to do.

    Returns the problem; positions hold the leaves in the order of `jax.flatten_util.ravel_pytree`, and `unravel` gives
    the constrained pytree.

    **Gradient**: exact, in the position and in the parameters of `log_density`, `bijections` and `base`.

    Raises `lehr.errors.InputError` for leaves that are not floats, bijections that do not fit, a base of another
    dimension, or a log density that is not a scalar.
    """
    leaves = jax.tree_util.tree_flatten_with_path(example)[0]
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError(
                f"every leaf of the example must be a float array, but {_name(path)} is {jnp.result_type(leaf)}: write "
                "0.0 for a real number, and sum a discrete one out of the log density"
            )
    chosen = _choose(example, bijections)
    for (path, leaf), bijection in zip(leaves, chosen):
        _check_bijection(_name(path), tuple(jnp.shape(leaf)), bijection)
    constrain = Constrain(Layout.of(example), tuple(chosen))
    base = base_of_dimension(base, constrain.layout.dimension)
    return Problem(base, UnconstrainedDensity(log_density, constrain), constrain)


def base_of_dimension(base: Any, dimension: int) -> Any:
    """The given base, checked, or a standard normal for None. Raises `InputError` for another dimension."""
    if base is None:
        return StandardNormal((dimension,))
    if not hasattr(base, "sample") or not hasattr(base, "log_prob"):
        raise InputError(f"a base needs the methods sample(key, shape) and log_prob(x), but it is {base!r}")
    shape = jax.eval_shape(lambda: base.sample(jax.random.key(0))).shape
    if shape != (dimension,):
        raise InputError(
            f"the model has {dimension} unconstrained numbers, but the base draws positions of shape {shape}: give a "
            f"base over positions of shape ({dimension},)"
        )
    return base


def _transform(bijection: AbstractBijection, leaf: Array) -> tuple[Array, Array]:
    """The bijection along the leading axes of a leaf, and the sum of its log determinants."""
    transform = bijection.transform_and_log_det
    for _ in range(leaf.ndim - len(bijection.shape)):
        transform = jax.vmap(transform)
    value, log_det = transform(leaf)
    return value, jnp.sum(log_det)


def _choose(example: Any, bijections: Any) -> list[AbstractBijection | None]:
    """The bijection of each leaf of the example, in the order of its leaves."""

    def is_leaf(node: Any) -> bool:
        return node is None or isinstance(node, AbstractBijection)

    try:
        full = jax.tree.broadcast(_fill(example, bijections), example, is_leaf=is_leaf)
    except ValueError as error:
        raise InputError(f"the bijections must have the structure of the example, or of its top: {error}") from error
    chosen = jax.tree.leaves(full, is_leaf=is_leaf)
    for bijection in chosen:
        if not is_leaf(bijection):
            raise InputError(f"a bound must be a FlowJAX bijection or None, but it is {bijection!r}")
    return chosen


def _fill(example: Any, bijections: Any) -> Any:
    """None for the names that were left out of a dict."""
    if type(example) is not dict or type(bijections) is not dict:
        return bijections
    unknown = sorted(str(name) for name in bijections if name not in example)
    if unknown:
        raise InputError(
            f"there are bijections for {', '.join(unknown)}, but the example has {', '.join(map(str, example))}"
        )
    return {name: _fill(example[name], bijections.get(name)) for name in example}


def _check_bijection(name: str, shape: tuple[int, ...], bijection: AbstractBijection | None) -> None:
    if bijection is None:
        return
    if bijection.cond_shape is not None:
        raise InputError(f"the bijection of {name} wants a condition: give one without")
    if len(bijection.shape) > len(shape) or shape[len(shape) - len(bijection.shape) :] != tuple(bijection.shape):
        raise InputError(
            f"the bijection of {name} has shape {tuple(bijection.shape)}, but {name} has shape {shape}: give a "
            "bijection of that shape, or of its last axes"
        )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the example"
