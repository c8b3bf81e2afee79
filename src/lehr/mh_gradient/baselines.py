"""Other gradients of the same expectation, to compare with: covariance, score, and finite differences.

Each is a function of (params, key), for `jax.grad`, with the value of `lehr.mh_expectation`, to the same numbers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray

from lehr.chunked_scan import scan_with_noise
from lehr.errors import InputError
from lehr.mh_gradient.alternatives import steps_at_once
from lehr.mh_gradient.chains import Chains, as_arrays, make_chains
from lehr.mh_gradient.gradient import not_again, weighted_gradient
from lehr.mh_gradient.heat_bath import HeatBath
from lehr.mh_gradient.sampler import MetropolisHastings
from lehr.mh_gradient.target import DensityRatio


class _Path(NamedTuple):
    """Of all chains: positions before, proposed and after each step, its log ratio and decision, and f after it.

    Axes are steps, what a chain has, chains.
    """

    before: Array
    proposed: Array
    after: Array
    log_ratio: Array
    accepted: Array
    value: Array


#: maps (params, chains, keys, path, cotangent of the row) to the gradient in the float arrays of params
_Rule = Callable[[Any, Chains, Array, _Path, Array], Any]


def covariance_expectation(
    log_density: Callable[[Any, Array], Array] | DensityRatio,
    f: Callable[..., Any],
    proposal: Any,
    x0: Any,
    *,
    num_steps: int,
    burn_in: int = 0,
    num_chains: int = 1,
) -> Callable[[Any, PRNGKeyArray], Any]:
    """The mean of f over the chains, with the gradient of its stationary limit,

        d E_pi[f] = Cov_pi(f, d log p) + E_pi[d f],

    the covariance estimated over all positions after burn-in, of all chains. For parameters of the target alone: of the
    proposal and of the path to the limit it knows nothing.

    Arguments: as `lehr.mh_expectation`; f is of one state.

    **Gradient**: biased for a finite chain; consistent, with a bias of order 1 / num_steps. Wrong where the support
    depends on the parameters.

    Raises `lehr.errors.InputError` as `lehr.mh_expectation`, and for a `DensityRatio`.

    Source: Swendsen, Ferrenberg 1988 (histogram reweighting); Hinton 2002 (the exact gradient of an energy).
    """
    return _made(_covariance, log_density, f, proposal, x0, num_steps, burn_in, num_chains)


def score_expectation(
    log_density: Callable[[Any, Array], Array] | DensityRatio,
    f: Callable[..., Any],
    proposal: Any,
    x0: Any,
    *,
    num_steps: int,
    burn_in: int = 0,
    num_chains: int = 1,
    baseline: bool = True,
) -> Callable[[Any, PRNGKeyArray], Any]:
    """The mean of f over the chains, with the score of its decisions as the gradient (REINFORCE),

        sum_k grad log P(A_k) (R_k - B_k),     R_k = 1/(n - b) sum_{i >= k, i > b} f(X_i),

    B_k the mean of R_k over the other chains (0 without `baseline`).

    Arguments: as `lehr.mh_expectation`; f is of one state, and the proposal has no parameters and no drift.

    **Gradient**: unbiased for the finite chain. Its variance grows with num_steps.

    Raises `lehr.errors.InputError` as `lehr.mh_expectation`, for a `DensityRatio`, `HeatBath`, proposals with
    parameters or drift, and a baseline with fewer than two chains.

    Source: Williams 1992; Arya et al. 2023, section 4 (its baseline to compare with).
    """
    if baseline and num_chains < 2:
        raise InputError("a baseline is the mean over other chains: give num_chains of at least 2, or baseline=False")
    if isinstance(proposal, HeatBath) or not isinstance(proposal, eqx.Module) or getattr(proposal, "needs_gradient", 0):
        raise InputError("score_expectation is for proposals without parameters and drift, and not for HeatBath")
    rule = _score_with_baseline if baseline else _score
    return _made(rule, log_density, f, proposal, x0, num_steps, burn_in, num_chains)


def difference_expectation(
    log_density: Callable[[Any, Array], Array] | DensityRatio,
    f: Callable[..., Any],
    proposal: Any,
    x0: Any,
    *,
    num_steps: int,
    burn_in: int = 0,
    num_chains: int = 1,
    step: float = 1e-2,
) -> Callable[[Any, PRNGKeyArray], Any]:
    """The mean of f over the chains, with central differences by common random numbers as the gradient,

        [value(params + h e_j, key) - value(params - h e_j, key)] / (2 h),     for each parameter j.

    Arguments: as `lehr.mh_expectation`; f is of one state; `step` is h > 0, of every parameter.

    **Gradient**: biased by order h^2; its variance grows as 1/h, because decisions jump. It takes two runs of
    all chains a parameter.

    Raises `lehr.errors.InputError` as `lehr.mh_expectation`, and for a step that is not positive.

    Source: Glasserman, Yao 1992 (common random numbers).
    """
    if not 0 < step < float("inf"):
        raise InputError(f"step must be positive, but it is {step}")
    return _made(_Differences(step), log_density, f, proposal, x0, num_steps, burn_in, num_chains)


def _made(
    rule: Any, log_density: Any, f: Any, proposal: Any, x0: Any, num_steps: int, burn_in: int, num_chains: int
) -> Callable[[Any, PRNGKeyArray], Any]:
    chains = make_chains(log_density, f, proposal, None, x0, num_steps, burn_in, num_chains, False)
    if isinstance(log_density, DensityRatio) and not isinstance(rule, _Differences):
        raise InputError("a DensityRatio has no gradient of a log density: use lehr.mh_expectation")

    def expectation(params: Any, key: PRNGKeyArray) -> Any:
        params = as_arrays(params)
        chains.check(params)
        return _call(params, chains, rule, key)

    return expectation


class _Differences(eqx.Module):
    """Central differences."""

    step: float = eqx.field(static=True)

    def __call__(self, params: Any, chains: Chains, keys: Array, path: _Path, ct: Array) -> Any:
        del path
        floats, others = eqx.partition(params, eqx.is_inexact_array)
        flat, unravel = ravel_pytree(floats)

        def value(flat: Array) -> Array:
            return jnp.vdot(ct, jnp.mean(_path(eqx.combine(unravel(flat), others), chains, keys)[0], axis=0))

        def along(j: Array) -> Array:
            step = jnp.zeros_like(flat).at[j].set(self.step)
            return (value(flat + step) - value(flat - step)) / (2 * self.step)

        return unravel(jax.lax.map(along, jnp.arange(flat.size)))


def _covariance(params: Any, chains: Chains, keys: Array, path: _Path, ct: Array) -> Any:
    del keys
    value, after = (leaf[chains.plan.burn_in :] for leaf in (path.value, path.after))
    reward = jnp.tensordot(ct, value, (0, 1))
    weights = (reward - jnp.mean(reward)) / (reward.size - 1)
    target = lambda params, x: chains.sampler(params).start(x).log_prob  # noqa: E731
    return _with_direct(params, chains, path, ct, _sum(target, params, after, weights))


def _score(params: Any, chains: Chains, keys: Array, path: _Path, ct: Array) -> Any:
    return _scored(params, chains, keys, path, ct, baseline=False)


def _score_with_baseline(params: Any, chains: Chains, keys: Array, path: _Path, ct: Array) -> Any:
    return _scored(params, chains, keys, path, ct, baseline=True)


def _scored(params: Any, chains: Chains, keys: Array, path: _Path, ct: Array, *, baseline: bool) -> Any:
    del keys
    plan, num = chains.plan, chains.num_chains
    counts = jnp.arange(plan.num_steps)[:, None] >= plan.burn_in
    reward = jnp.where(counts, jnp.tensordot(ct, path.value, (0, 1)), 0) / (plan.num_steps - plan.burn_in)
    to_go = jax.lax.cumsum(reward, axis=0, reverse=True)
    if baseline:
        to_go = to_go - (jnp.sum(to_go, axis=1, keepdims=True) - to_go) / (num - 1)
    r = jnp.minimum(path.log_ratio, 0)
    # d log alpha = grad r; d log (1 - alpha) = -alpha / (1 - alpha) grad r
    of_decision = jnp.where(path.accepted, 1, -jnp.exp(r) / jnp.where(r < 0, -jnp.expm1(r), 1))
    weights = jnp.where((path.log_ratio < 0) & (path.log_ratio > -jnp.inf), of_decision, 0) * to_go / num

    def log_ratio(params: Any, row: Any) -> Array:
        (before, proposed), sampler = row, chains.sampler(params)
        assert isinstance(sampler, MetropolisHastings)
        kernel = sampler.kernel
        return kernel.log_ratio(kernel.target.at(proposed), kernel.target.at(before))

    return _with_direct(params, chains, path, ct, _sum(log_ratio, params, (path.before, path.proposed), weights))


def _sum(of: Callable[[Any, Any], Array], params: Any, rows: Any, weights: Array) -> Any:
    floats, others = eqx.partition(params, eqx.is_inexact_array)
    return weighted_gradient(lambda floats, row: of(eqx.combine(floats, others), row), floats, rows, weights)


def _with_direct(params: Any, chains: Chains, path: _Path, ct: Array, found: Any) -> Any:
    """And the derivative of f in its own parameters."""
    if not chains.f_takes_params:
        return found
    before, after = (leaf[chains.plan.burn_in :] for leaf in (path.before, path.after))
    shape = len(after), chains.num_chains
    weights = jnp.full(shape, 1 / math.prod(shape))

    def rewarded(params: Any, row: Any) -> Array:
        x, x_new = row
        return jnp.vdot(ct, chains.row(params)(x, x_new))

    direct = _sum(rewarded, params, (before, after), weights)
    return jax.tree.map(jnp.add, found, direct)


def _path(params: Any, chains: Chains, keys: Array) -> tuple[Array, _Path]:
    """The chains' means, and all that they did."""
    sampler, f, plan = chains.sampler(params), chains.row(params), chains.plan

    def chain(key: Array, x0: Array) -> tuple[Array, _Path]:
        def noise(key, num_steps):
            return sampler.noise(key, num_steps, x0)

        def step(point, inputs):
            k, of_chain = inputs
            move = sampler.move(k, point, of_chain)
            proposed = getattr(move, "new", move.after).x
            value = f(point.x, move.after.x)
            did = _Path(point.x, proposed, move.after.x, move.log_ratio, jnp.asarray(move.accepted), value)
            return move.after, did

        steps = jnp.arange(plan.num_steps)
        _, path = scan_with_noise(step, noise, sampler.start(x0), key, steps, memory=None, largest_group=group)
        return jnp.mean(path.value[plan.burn_in :], axis=0), path

    starts = chains.starts(params)
    group = steps_at_once(starts)
    return jax.vmap(chain, out_axes=(0, -1))(keys, starts)


@eqx.filter_jit
def _call(params: Any, chains: Chains, rule: Any, key: PRNGKeyArray) -> Any:
    keys = jax.random.split(key, chains.num_chains)
    return chains.from_row(params, _mean(params, chains, rule, keys))


@eqx.filter_custom_vjp
def _mean(params: Any, chains: Chains, rule: Any, keys: Array) -> Array:
    del rule
    return jnp.mean(_path(params, chains, keys)[0], axis=0)


@_mean.def_fwd
def _forwards(perturbed: Any, params: Any, chains: Chains, rule: Any, keys: Array) -> tuple[Array, _Path]:
    del perturbed, rule
    means, path = _path(params, chains, keys)
    return jnp.mean(means, axis=0), path


@_mean.def_bwd
def _backwards(path: _Path, ct: Array, perturbed: Any, params: Any, chains: Chains, rule: Any, keys: Array) -> Any:
    del perturbed
    return rule(not_again(params), chains, keys, not_again(path), ct)
