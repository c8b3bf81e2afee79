"""lehr.mh_expectation: the mean of f along chains of Metropolis-Hastings, with an unbiased gradient."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.mh_gradient.alternatives import Run, run_chains
from lehr.mh_gradient.births import STRENGTHS, WEIGHTS, Strength, Weights
from lehr.mh_gradient.chains import Chains, as_arrays, make_chains
from lehr.mh_gradient.couplings import AbstractCoupling
from lehr.mh_gradient.diagnostics import Diagnostics, diagnose, warned_of_unmet
from lehr.mh_gradient.estimator import Estimator, Kept, each_gradient, gradient_of, largest_weight, log_factor
from lehr.mh_gradient.gradient import not_again, row_of, support_moves
from lehr.mh_gradient.sampler import PROPOSAL_GRADIENTS, ProposalGradient, Rule
from lehr.mh_gradient.target import DensityRatio
from lehr.mh_gradient.trace import Record, Trace, by_decision, largest_kappas

#: with as many steps, over all chains, of which none is accepted, nothing has been sampled
_ENOUGH = 100


class MHExpectation:
    """A function of (params, key), as `lehr.mh_expectation` makes them."""

    def __init__(self, estimator: Estimator):
        self._estimator = estimator

    def __call__(self, params: Any, key: PRNGKeyArray) -> Any:
        """The mean of f over the chains; with `has_aux` also `Diagnostics`."""
        params = as_arrays(params)
        self._estimator.chains.check(params)
        self._estimator.check(params)
        return _call(self._estimator, params, key)

    def weights(self, params: Any, key: PRNGKeyArray) -> Float[Array, "num_steps num_chains m"]:
        """Of each decision, what it counts for: summed over steps, and averaged over chains, these numbers times the
        gradients of the flips' log ratios (r of a rejection, -r of an acceptance, the ratio itself of a `DensityRatio`)
        are the gradient, but for that of f in parameters of its own, and of the positions.

        Those that are not 0 carry a birth, and need a gradient of the log density each.
        """
        return _weights(self._estimator, as_arrays(params), key)


def mh_expectation(
    log_density: Callable[[Any, Array], Array] | DensityRatio,
    f: Callable[..., Any],
    proposal: Any,
    coupling: AbstractCoupling,
    x0: Any,
    *,
    num_steps: int,
    burn_in: int = 0,
    num_chains: int = 1,
    weights: Weights = "measure-valued",
    strength: Strength = "distance",
    num_alternatives: int = 1,
    proposal_gradient: ProposalGradient = "pathwise",
    consecutive: bool = False,
    has_aux: bool = False,
) -> MHExpectation:
    """The mean of f along chains of Metropolis-Hastings, with an unbiased gradient through accept and reject:

        value(params, key) = 1/N sum_chains 1/(n - b) sum_{i > b} f(X_i),    X_i = X'_i if log u_i < r_i, else X_{i-1},

    with r the log of p(X') q(X', X) / [p(X) q(X, X')]. The gradient of its expectation, for these n steps from x0 and
    not only in the limit, is that of the acceptance probabilities, alpha = min(1, exp r):

        d E = E sum_i sum_k w_k [f(Y_i^k) - f(X_i)] + d_params f(X_i),    w_k = (1 - 2 A_k) 1{r_k < 0} alpha_k grad r_k,

    Y^k the chain that decided otherwise at step k, coupled to X, so that it meets it soon. Of all alternatives a few
    are kept, by coins that leave the mean as it is. The scan takes no derivative; one pass over the decisions that
    count, those whose alternative was kept, gives the gradient, in any number of parameters.

    The result is for `jax.grad`, `jax.value_and_grad`, `jax.jacrev`, `lehr.fit`, and inside `jax.jit` and `jax.vmap`. A
    function g of several expectations is that of a pytree f: `lambda params, key: g(*expectation(params, key))`, whose
    value and gradient have the bias of a function of a mean: of order 1 / (steps of all chains), none if g is linear.

    Arguments:
        log_density: maps `(params, x)` to the log density in nats, up to a constant; or a
            `lehr.mh_gradient.DensityRatio`. -inf outside of a support that does not depend on the parameters.
        f: maps `x` or, if it cannot be called so, `(params, x)` to floats, of any shape, or a pytree of them.
        proposal: of `lehr.mh_gradient`, an object with `sample(key, x)` and `log_prob(x, x_new)`, or a function
            that makes one of these from params.
        coupling: of `lehr.mh_gradient`, that fits the proposal.
        x0: the first position, `(dim,)` or `(num_chains, dim)`; or a function that makes it from params.
        num_steps: n.
        burn_in: b < n, the first steps, which do not count.
        num_chains: N, which run side by side.
        weights: of births. "right" and "left" flip only rejections, or acceptances; "single-sided" the one that has a
            weight of at least 0, for one parameter.
        strength: by what alternatives are kept. All are unbiased; "gradient" (the norm of grad alpha) varies least, but
            takes a gradient of log_density in each step.
        num_alternatives: kept at once.
        proposal_gradient: for parameters of the proposal, and of the target through a drift: "pathwise", along
            positions that are functions of noise (f and log_density differentiable in x); "score", grad log q beside a
            fresh proposal, for discrete ones too; "weak", the measure-valued derivative, for the scale of `RandomWalk`.
        consecutive: f is of two consecutive states, `(x, x_next)` or `(params, x, x_next)`, for autocorrelations.
        has_aux: returns `(value, Diagnostics)`; that takes a backward pass for each chain and entry of f.

    **Gradient**: unbiased in params, for the finite chain, by reverse mode. Not of `x0` or arrays inside `log_density`:
    make them leaves of params. Second derivatives in params raise. Where alternatives do not meet their chain it is
    noisier than its error over a few chains says: a RuntimeWarning tells.

    Raises `lehr.errors.InputError` for a coupling that does not fit the proposal, numbers out of range, and, when
    called, parameters or f that are not floats, and an x0 that the proposal cannot move. While it runs it raises a
    `RuntimeError` for a log density that is not finite at x0, or NaN later, no acceptance in a hundred steps, a
    gradient of the log density that is not finite, and a support that depends on the parameters (looked for at up to
    256 of the proposals where the density is 0).

    Source: Arya, Seyer, Schaefer, Chandra, Lew, Huot, Mansinghka, Ragan-Kelley, Rackauckas, Schauer 2023, theorem 2.1;
    Arya, Schauer, Seyer 2024.
    """
    if coupling is None or not isinstance(coupling, AbstractCoupling):
        raise InputError(f"coupling must be one of lehr.mh_gradient, but it is a {type(coupling).__name__}")
    chains = make_chains(
        log_density, f, proposal, coupling, x0, num_steps, burn_in, num_chains, consecutive, num_alternatives
    )
    for name, value, known in (
        ("weights", weights, WEIGHTS),
        ("strength", strength, STRENGTHS),
        ("proposal_gradient", proposal_gradient, PROPOSAL_GRADIENTS),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, but it is {value!r}")
    return MHExpectation(Estimator(chains, Rule(weights, strength, proposal_gradient), has_aux))


@eqx.filter_jit
def _call(estimator: Estimator, params: Any, key: PRNGKeyArray) -> Any:
    chains = estimator.chains
    keys = jax.random.split(key, chains.num_chains)
    row, aux = _mean(params, estimator, keys)
    value = chains.from_row(params, row)
    if not estimator.has_aux:
        return value
    flat_error, gradient_error = aux.value_error, aux.gradient_error
    gradient_error = jax.tree.map(jax.lax.stop_gradient, gradient_error)
    errors = chains.from_row(params, flat_error), _leading(chains, params, gradient_error)
    return value, eqx.tree_at(
        lambda d: (d.value_error, d.gradient_error), aux, errors, is_leaf=lambda leaf: leaf is None
    )


@eqx.filter_jit
def _weights(estimator: Estimator, params: Any, key: PRNGKeyArray) -> Array:
    run = _run(params, estimator, jax.random.split(key, estimator.chains.num_chains), alone=False)
    return jnp.swapaxes(_by_decision(estimator, run.trace), 1, 2)


def _by_decision(estimator: Estimator, trace: Any) -> Array:
    plan = estimator.chains.plan
    return by_decision(trace) / (plan.num_steps - plan.burn_in)


def _leading(chains: Chains, params: Any, rows: Any) -> Any:
    """Of a gradient of each entry of the row, that of f's form: for each leaf of f a tree of parameters."""

    def of_leaf(index: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[index], rows)

    width = jax.tree.leaves(rows)[0].shape[0]
    places = chains.from_row(params, jnp.arange(width, dtype=jnp.float32))
    return jax.tree.map(lambda place: of_leaf(jnp.round(place).astype(jnp.int32)), places)


@eqx.filter_custom_vjp
def _mean(params: Any, estimator: Estimator, keys: Array) -> tuple[Array, Diagnostics | None]:
    """The mean row of f; and diagnostics, if asked for."""
    if estimator.has_aux:
        return _with_trace(params, estimator, keys)[0]
    run = _run(params, estimator, keys, alone=True)
    return jnp.mean(run.mean * _checked(run, estimator.chains.plan.num_steps), axis=0), None


def _run(params: Any, estimator: Estimator, keys: Array, *, alone: bool) -> Run:
    chains = estimator.chains
    sampler, f = chains.sampler(params), chains.row(params)
    rule = None if alone else estimator.own_births

    def gradient(decision: Any) -> Array:
        found = jax.grad(lambda p: log_factor(estimator, p, decision))(params)
        return ravel_pytree(found)[0]

    needed = rule is not None and (rule.strength == "gradient" or rule.weights == "single-sided")

    record = Record(
        accepted=estimator.pathwise, after=chains.f_takes_params and not estimator.pathwise, lives=estimator.has_aux
    )

    starts = chains.starts(params)
    return run_chains(sampler, f, keys, starts, chains.plan, rule, gradient if needed else None, record)


def _checked(run: Run, num_steps: int) -> Array:
    """1, which raises if the chains mean nothing: a factor of all that is used of them.

    (Compiled code drops an error that nothing depends on; of a gradient alone the value is nothing.)
    """
    one = eqx.error_if(
        jnp.ones(()), jnp.any(run.bad_start), "the log density is not finite at x0 or not a number: start elsewhere"
    )
    one = eqx.error_if(
        one,
        jnp.any(jnp.isnan(run.acceptance)),
        "the log density is NaN or infinite where the chain went: mend it, or give -inf",
    )
    if num_steps * len(run.acceptance) >= _ENOUGH:
        text = "no proposal was accepted: give a smaller scale, or start where the density is"
        one = eqx.error_if(one, jnp.all(run.acceptance == 0), text)
    return one


def _with_trace(params: Any, estimator: Estimator, keys: Array) -> tuple[Any, Any]:
    """Value and diagnostics, and what the gradient needs: `Kept`, or with diagnostics the gradient itself."""
    run = _run(params, estimator, keys, alone=False)
    chains, plan, trace = estimator.chains, estimator.chains.plan, run.trace
    one = warned_of_unmet(_checked(run, plan.num_steps), run.ages, plan.num_steps)
    density = chains.density
    if not isinstance(density, DensityRatio):
        text = (
            "the support of the log density depends on the parameters, so that its gradient misses what moves in and "
            "out: give a lehr.mh_gradient.DensityRatio"
        )
        one = eqx.error_if(one, _support_moves(density, chains, params, trace), text)
    means, weights = run.mean * one, _by_decision(estimator, trace) * one
    counts = None
    if trace.after is not None:
        counts = jnp.where(jnp.arange(plan.num_steps)[:, None] >= plan.burn_in, one, 0)
        counts = jnp.broadcast_to(counts, trace.coefficient.shape)
    kept = Kept(trace.decision, trace.accepted, trace.after, weights, counts)
    if not estimator.has_aux:
        return (jnp.mean(means, axis=0), None), kept
    each = each_gradient(params, estimator, keys, kept)
    error = jax.tree.map(_error, each)
    found = diagnose(run, plan.num_steps, largest_weight(params, estimator, kept, largest_kappas(trace)))
    aux = eqx.tree_at(
        lambda d: (d.value_error, d.gradient_error),
        jax.tree.map(lambda leaf: leaf * one, found),
        (_error(means), error),
        is_leaf=lambda leaf: leaf is None,
    )
    mean_gradient = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), each)
    return (jnp.mean(means, axis=0), aux), mean_gradient


def _support_moves(log_density: Callable[[Any, Array], Array], chains: Chains, params: Any, trace: Trace) -> Array:
    """Whether what was proposed where the density is 0 has some for parameters a little off; of many, 256 are tried."""

    def tried() -> Array:
        count = jnp.cumsum(trace.forbidden)
        among = jnp.minimum(jnp.linspace(1, count[-1], 256).astype(int), count[-1])
        index = jnp.searchsorted(count, among)
        decisions = row_of(trace.decision, index, chains.axis(params))
        return support_moves(log_density, params, *jax.vmap(chains.sampler(params).ends)(decisions))

    return jax.lax.cond(jnp.any(trace.forbidden), tried, lambda: jnp.asarray(False))


def _error(of_chains: Array) -> Array:
    return jnp.std(of_chains, axis=0, ddof=1) / len(of_chains) ** 0.5


@_mean.def_fwd
def _forwards(perturbed: Any, params: Any, estimator: Estimator, keys: Array) -> tuple[Any, Any]:
    del perturbed
    return _with_trace(params, estimator, keys)


@_mean.def_bwd
def _backwards(residuals: Any, ct: Any, perturbed: Any, params: Any, estimator: Estimator, keys: Array) -> Any:
    del perturbed
    ct_row = ct[0]
    if estimator.has_aux:
        return jax.tree.map(lambda leaf: jnp.tensordot(ct_row, leaf, 1).astype(leaf.dtype), not_again(residuals))
    return gradient_of(not_again(params), estimator, keys, not_again(residuals), ct_row)
