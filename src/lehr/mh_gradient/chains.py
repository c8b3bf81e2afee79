"""Chains of Metropolis-Hastings as functions of parameters, and what does not fit together in them."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from lehr.errors import InputError, check_whole
from lehr.mh_gradient.alternatives import Plan
from lehr.mh_gradient.couplings import AbstractCoupling, MonotoneSpin
from lehr.mh_gradient.heat_bath import HeatBath, HeatBathSampler
from lehr.mh_gradient.kernel import Kernel
from lehr.mh_gradient.proposals import AbstractProposal, OwnProposal
from lehr.mh_gradient.sampler import MetropolisHastings
from lehr.mh_gradient.target import DensityRatio, Target
from lehr.mh_gradient.trace import chains_axis


class Chains(eqx.Module):
    """Chains of Metropolis-Hastings, as functions of parameters: what an expectation and its baselines share."""

    density: Callable[[Any, Array], Array] | DensityRatio
    f: Callable[..., Any]
    #: a proposal, or what makes one from the parameters
    proposal: Any
    coupling: AbstractCoupling | None
    #: positions of one or of all chains, or what makes them from the parameters
    x0: Any
    plan: Plan = eqx.field(static=True)
    num_chains: int = eqx.field(static=True)
    f_takes_params: bool = eqx.field(static=True)

    def proposal_of(self, params: Any) -> AbstractProposal | HeatBath:
        """The proposal."""
        made = self.proposal
        if callable(made) and not isinstance(made, eqx.Module):
            made = made(params)
        return made if isinstance(made, AbstractProposal | HeatBath) else _own(made)

    @property
    def proposal_has_params(self) -> bool:
        """Whether the proposal is made from the parameters."""
        return callable(self.proposal) and not isinstance(self.proposal, eqx.Module)

    def sampler(self, params: Any) -> MetropolisHastings | HeatBathSampler:
        """Of these parameters."""
        proposal = self.proposal_of(params)
        if isinstance(proposal, HeatBath):
            return HeatBathSampler(Target(self.density, params, False), proposal)
        coupling = MonotoneSpin() if self.coupling is None else self.coupling  # of a chain alone none is used
        with_gradient = proposal.needs_gradient or coupling.needs_gradient
        return MetropolisHastings(Kernel(Target(self.density, params, with_gradient), proposal), coupling)

    def starts(self, params: Any) -> Array:
        """The first positions `(num_chains, dim)`."""
        x0 = self._x0(params)
        return jnp.broadcast_to(x0, (self.num_chains, *x0.shape[-1:]))

    def axis(self, params: Any) -> Literal[0, -1]:
        """Of chains, in arrays of positions."""
        return chains_axis(self._x0(params).shape[-1])

    def _x0(self, params: Any) -> Array:
        """As given, floats as wide as those of densities and proposals."""
        x0 = jnp.asarray(self.x0(params) if callable(self.x0) else self.x0)
        return x0.astype(jnp.result_type(float)) if jnp.issubdtype(x0.dtype, jnp.floating) else x0

    def row(self, params: Any) -> Callable[[Array, Array], Array]:
        """f as a row, of the last position and this one."""

        def f(x: Array, x_new: Array) -> Array:
            positions = (x, x_new) if self.plan.consecutive else (x_new,)
            return ravel_pytree(self.f(params, *positions) if self.f_takes_params else self.f(*positions))[0]

        return f

    def from_row(self, params: Any, row: Array) -> Any:
        """A row in the form that f gives."""
        x = self.starts(params)[0]
        positions = (x, x) if self.plan.consecutive else (x,)
        like = jax.eval_shape(self.f, *((params, *positions) if self.f_takes_params else positions))
        leaves, tree = jax.tree.flatten(like)
        parts, at = [], 0
        for leaf in leaves:
            parts.append(row[..., at : at + leaf.size].reshape(*row.shape[:-1], *leaf.shape).astype(leaf.dtype))
            at += leaf.size
        return jax.tree.unflatten(tree, parts)

    def check(self, params: Any) -> None:
        """Raises `InputError` for what does not fit together, before anything is compiled."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if eqx.is_array(leaf) and not jnp.issubdtype(leaf.dtype, jnp.floating):
                name = jax.tree_util.keystr(path) or "params"
                raise InputError(f"parameters must be floats, but {name} is of type {leaf.dtype}: make it a float")
        x0 = self._x0(params)
        if x0.ndim not in (1, 2) or (x0.ndim == 2 and x0.shape[0] != self.num_chains) or 0 in x0.shape:
            raise InputError(f"x0 must be a position (dim,), or {self.num_chains} of them, but its shape is {x0.shape}")
        proposal = self.proposal_of(params)
        proposal.check(x0)
        if isinstance(proposal, HeatBath):
            proposal.check_density(Target(self.density, params, False), x0[0] if x0.ndim == 2 else x0)
        _check_pair(proposal, self.coupling)
        position = jax.ShapeDtypeStruct(x0.shape[-1:], x0.dtype)
        arguments = (position, position) if self.plan.consecutive else (position,)
        value = eqx.filter_eval_shape(self.f, *((params, *arguments) if self.f_takes_params else arguments))
        for leaf in jax.tree.leaves(value):
            if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise InputError("f must give floats, but it gives others: multiply by 1.0 what is counted")
        if not isinstance(self.density, DensityRatio):
            density = eqx.filter_eval_shape(self.density, params, position)
            if getattr(density, "shape", None) != () or not jnp.issubdtype(density.dtype, jnp.floating):
                raise InputError("log_density(params, x) must give one float: sum over what it gives now")


def as_arrays(params: Any) -> Any:
    """Parameters whose numbers are arrays."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf, params)


def make_chains(
    log_density: Any,
    f: Any,
    proposal: Any,
    coupling: Any,
    x0: Any,
    num_steps: int,
    burn_in: int,
    num_chains: int,
    consecutive: bool,
    num_alternatives: int = 1,
) -> Chains:
    """Checks what can be checked without parameters."""
    check_whole("num_steps", num_steps, 1)
    check_whole("burn_in", burn_in, 0)
    check_whole("num_chains", num_chains, 1)
    check_whole("num_alternatives", num_alternatives, 1)
    if burn_in >= num_steps:
        raise InputError(f"burn_in must be below num_steps = {num_steps}, but it is {burn_in}: nothing would be left")
    if not isinstance(proposal, AbstractProposal | HeatBath) and not callable(proposal):
        _own(proposal)
    if isinstance(proposal, AbstractProposal | HeatBath):
        _check_pair(proposal, coupling)
    positions = 2 if consecutive else 1
    # What can do without params does: jnp.sum(x), and not jnp.sum(params, x).
    takes_params = _takes(f, positions + 1) and not _takes(f, positions)
    x0 = x0 if callable(x0) else jnp.asarray(x0)
    plan = Plan(num_steps, burn_in, num_alternatives, consecutive)
    return Chains(log_density, f, proposal, coupling, x0, plan, num_chains, takes_params)


def _own(made: Any) -> OwnProposal:
    if not (hasattr(made, "sample") and hasattr(made, "log_prob")):
        raise InputError(
            f"a proposal must have sample(key, x) and log_prob(x, x_new), but {type(made).__name__} has not: use one "
            "of lehr.mh_gradient"
        )
    return OwnProposal(made)


def _check_pair(proposal: AbstractProposal | HeatBath, coupling: AbstractCoupling | None) -> None:
    if coupling is None:
        return
    if isinstance(proposal, HeatBath):
        if not isinstance(coupling, MonotoneSpin):
            raise InputError(f"HeatBath is coupled by MonotoneSpin, not by {type(coupling).__name__}")
        return
    coupling.check(proposal)


def _takes(f: Callable[..., Any], num: int) -> bool:
    """Whether f can be called with `num` arguments."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # of some built-in functions nothing is known
        return False
    try:
        signature.bind(*range(num))
    except TypeError:
        return False
    return True
