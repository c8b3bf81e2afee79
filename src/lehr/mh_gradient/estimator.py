"""An expectation with its rule for alternatives, and its gradient from what they gathered."""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lehr.chunked_scan import scan_with_noise
from lehr.errors import InputError
from lehr.mh_gradient.alternatives import steps_at_once
from lehr.mh_gradient.chains import Chains
from lehr.mh_gradient.gradient import largest_gradient, weighted_gradient
from lehr.mh_gradient.heat_bath import HeatBath
from lehr.mh_gradient.proposals import AbstractProposal, RandomWalk
from lehr.mh_gradient.sampler import MetropolisHastings, Rule
from lehr.mh_gradient.target import DensityRatio


class Kept(NamedTuple):
    """Of all chains, what the gradient needs: decisions, their weights, and positions where f is differentiated.

    Axes are those of a `Trace`.
    """

    decision: Any
    accepted: Any
    after: Any
    weights: Float[Array, "num_steps m num_chains"]
    #: where f is differentiated in parameters of its own: 1 after burn-in, else 0
    counts: Any

    def of_chain(self, i: Array, axis: Literal[0, -1]) -> "Kept":
        """The same of one chain; `axis` is that of positions."""

        def sliced(tree: Any, along: int) -> Any:
            return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i, 1, along), tree)

        decision, after = sliced((self.decision, self.after), -1 if axis == -1 else 1)
        return sliced(self._replace(decision=None, after=None), -1)._replace(decision=decision, after=after)


class Estimator(eqx.Module):
    """An expectation with its gradient."""

    chains: Chains
    rule: Rule = eqx.field(static=True)
    has_aux: bool = eqx.field(static=True)

    @property
    def pathwise(self) -> bool:
        """Whether positions depend on parameters other than by decisions."""
        if self.rule.proposal_gradient != "pathwise":
            return False
        proposal = self.chains.proposal
        drifts = isinstance(proposal, AbstractProposal) and proposal.needs_gradient
        return self.chains.proposal_has_params or drifts or callable(self.chains.x0)

    @property
    def own_births(self) -> Rule:
        """The rule, with births of the proposal's parameters only where it has any."""
        proposal = self.chains.proposal
        drifts = isinstance(proposal, AbstractProposal) and proposal.needs_gradient
        has_any = (self.chains.proposal_has_params or drifts) and not self.pathwise
        return self.rule if has_any else self.rule._replace(proposal_gradient=None)

    def check(self, params: Any) -> None:
        """Raises `InputError` for a rule that does not fit the chains."""
        proposal, route = self.chains.proposal_of(params), self.rule.proposal_gradient
        in_ratio = isinstance(self.chains.density, DensityRatio)
        if in_ratio and (self.pathwise or self.own_births.proposal_gradient is not None):
            raise InputError("a DensityRatio is for proposals without parameters and drift, and an x0 that is given")
        if in_ratio and self.rule.weights == "left":
            raise InputError(
                'weights="left" flips acceptances alone, of which a DensityRatio may have none where its gradient is: '
                'take "measure-valued"'
            )
        coupling = self.chains.coupling
        if in_ratio and coupling is not None and coupling.needs_gradient:
            raise InputError(f"a DensityRatio has no gradient, which {type(coupling).__name__} needs: take another")
        if callable(self.chains.x0) and route != "pathwise":
            raise InputError('an x0 that depends on the parameters needs proposal_gradient="pathwise"')
        if isinstance(proposal, HeatBath):
            if self.chains.proposal_has_params or callable(self.chains.x0):
                raise InputError("with HeatBath neither the proposal nor x0 can depend on the parameters")
            if self.rule.strength == "gradient" or self.rule.weights == "single-sided":
                raise InputError('HeatBath has no strength="gradient" and no weights="single-sided": take the defaults')
            return
        if self.pathwise:
            if not proposal.reparameterised:
                raise InputError(
                    f"{type(proposal).__name__} is no differentiable function of its parameters: give "
                    'proposal_gradient="score"'
                )
            if self.rule.strength == "gradient" or self.rule.weights == "single-sided":
                raise InputError(
                    'strength="gradient" and weights="single-sided" need the gradient of each decision alone: give '
                    'proposal_gradient="score"'
                )
        is_walk = isinstance(proposal, RandomWalk) and proposal.scale.value.ndim < 2
        if self.own_births.proposal_gradient == "weak" and not is_walk:
            raise InputError('proposal_gradient="weak" is for RandomWalk with a scale of one number or (dim,)')
        if self.rule.weights == "single-sided":
            size = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(params, eqx.is_array)))
            if size != 1:
                raise InputError(
                    f'weights="single-sided" goes by the sign of one derivative, but there are {size} parameters: take '
                    '"measure-valued"'
                )


def log_factor(estimator: Estimator, params: Any, row: Any) -> Array:
    """Of a decision: its weight is that of the gradient of this, a scalar."""
    return estimator.chains.sampler(params).log_factor(row)


def each_gradient(params: Any, estimator: Estimator, keys: Array, kept: Kept) -> Any:
    """Of every chain and entry of the row: leaves `(num_chains, m, ...)`."""
    width, axis = kept.weights.shape[1], estimator.chains.axis(params)

    def of_chain(row: Any) -> Any:
        key, index = row
        one = kept.of_chain(index, axis)
        return jax.vmap(lambda ct: gradient_of(params, estimator, key[None], one, ct, index))(jnp.eye(width))

    return jax.lax.map(of_chain, (keys, jnp.arange(len(keys))))


def gradient_of(params: Any, estimator: Estimator, keys: Array, kept: Kept, ct: Array, first: Array | int = 0) -> Any:
    """The gradient of ct . row, the mean over these chains, of which `first` is the number of the first."""
    chains = estimator.chains
    num = len(keys)
    weights = jnp.tensordot(ct, kept.weights, (0, 1)) / num
    floats = eqx.filter(params, eqx.is_inexact_array)
    others = eqx.filter(params, eqx.is_inexact_array, inverse=True)
    scale = ct / (chains.plan.num_steps - chains.plan.burn_in) / num
    if estimator.pathwise:

        def total(floats: Any) -> Array:
            params = eqx.combine(floats, others)
            starts = jax.lax.dynamic_slice_in_dim(chains.starts(params), first, num)
            each = jax.vmap(_replay, in_axes=(None, None, 0, 0, 1, 1, None))
            return jnp.sum(each(params, estimator, keys, starts, kept.accepted, weights, scale))

        return _finite(jax.grad(total)(floats))

    found = _weighted(weighted_gradient, estimator, floats, others, kept, weights)
    found = _finite(found)
    if chains.f_takes_params:
        starts = jax.lax.dynamic_slice_in_dim(chains.starts(params), first, num)
        axis = chains.axis(params)
        before = jnp.concatenate([jnp.moveaxis(starts, 0, axis)[None], kept.after[:-1]])

        def of(floats: Any, row: Any) -> Array:
            return jnp.vdot(scale, chains.row(eqx.combine(floats, others))(*row))

        direct = weighted_gradient(of, floats, (before, kept.after), kept.counts, axis)
        found = jax.tree.map(jnp.add, found, direct)
    return found


def largest_weight(params: Any, estimator: Estimator, kept: Kept, kappas: Array) -> Array:
    """The largest norm of an alternative's weight, kappa times the gradient of its decision's log ratio."""
    if estimator.pathwise:
        return jnp.asarray(jnp.nan)
    floats, others = eqx.partition(params, eqx.is_inexact_array)
    return _weighted(largest_gradient, estimator, floats, others, kept, kappas)


def _weighted(pass_over: Any, estimator: Estimator, floats: Any, others: Any, kept: Kept, weights: Array) -> Any:
    """`weighted_gradient` or `largest_gradient` of the decisions of all chains."""

    def of(floats: Any, row: Any) -> Array:
        return log_factor(estimator, eqx.combine(floats, others), row)

    params = eqx.combine(floats, others)
    return pass_over(of, floats, kept.decision, weights, estimator.chains.axis(params))


def _finite(gradient: Any) -> Any:
    bad = jnp.any(jnp.stack([jnp.any(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)]))
    text = "the gradient in the parameters is not finite where the chain went: mend that of the log density, or of f"
    return eqx.error_if(gradient, bad, text)


def _replay(
    params: Any, estimator: Estimator, key: Array, x0: Array, accepted: Array, weights: Array, scale: Array
) -> Array:
    """Along one chain with its decisions as they were: scale . sum f + sum weights . log ratio, of params."""
    chains = estimator.chains
    plan, sampler, f = chains.plan, chains.sampler(params), chains.row(params)
    assert isinstance(sampler, MetropolisHastings)

    def noise(key, num_steps):
        return sampler.noise(key, num_steps, x0)

    def step(carry, inputs):
        point, total = carry
        (k, accepted, weight), (z, _) = inputs
        after, log_ratio = sampler.again(point, z, accepted, weight != 0)
        flip = jnp.where(accepted, -log_ratio, log_ratio)
        value = jnp.where(k >= plan.burn_in, jnp.vdot(scale, f(point.x, after.x)), 0)
        return (after, total + value + jnp.where(weight != 0, weight * flip, 0)), None

    steps = jnp.arange(plan.num_steps), accepted, weights
    start = sampler.start(x0), jnp.zeros((), weights.dtype)
    group = steps_at_once(chains.starts(params))
    return scan_with_noise(step, noise, start, key, steps, memory="checkpoint", largest_group=group)[0][1]
