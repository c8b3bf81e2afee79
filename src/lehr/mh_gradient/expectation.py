"""lehr.mh_expectation: the mean of f along chains of Metropolis-Hastings, with an unbiased gradient."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.chunked_scan import scan_with_noise
from lehr.errors import InputError, check_whole
from lehr.mh_gradient.alternatives import Plan, Record, Run, by_birth, run_chain
from lehr.mh_gradient.births import STRENGTHS, WEIGHTS, Strength, Weights
from lehr.mh_gradient.couplings import AbstractCoupling, Kernel, MonotoneSpin
from lehr.mh_gradient.diagnostics import Diagnostics, diagnose, warn_of_unmet
from lehr.mh_gradient.gradient import support_moves, weighted_gradient
from lehr.mh_gradient.heat_bath import HeatBath, HeatBathSampler
from lehr.mh_gradient.proposals import AbstractProposal, OwnProposal, RandomWalk
from lehr.mh_gradient.sampler import PROPOSAL_GRADIENTS, MetropolisHastings, ProposalGradient, Rule
from lehr.mh_gradient.target import DensityRatio, Target

#: with as many steps, over all chains, of which none is accepted, nothing has been sampled
_ENOUGH = 100


class Kept(NamedTuple):
    """Of all chains, what the gradient needs: decisions, their weights, and positions where f is differentiated.

    Axes are steps, then chains, as the scan leaves them: to turn them round would cost as much as a pass.
    """

    low: Array
    high: Array
    tag: Any
    accepted: Any
    after: Any
    #: with a last axis of m
    weights: Array


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
        x0 = jnp.asarray(self.x0(params) if callable(self.x0) else self.x0)
        return jnp.broadcast_to(x0, (self.num_chains, *x0.shape[-1:]))

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
        x0 = jnp.asarray(self.x0(params) if callable(self.x0) else self.x0)
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


class Estimator(eqx.Module):
    """An expectation with its gradient."""

    chains: Chains
    rule: Rule = eqx.field(static=True)
    has_aux: bool = eqx.field(static=True)

    def __call__(self, params: Any, key: PRNGKeyArray) -> Any:
        """The mean of f over the chains, or with `has_aux` it and `Diagnostics`."""
        params = jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf, params
        )
        self.chains.check(params)
        self.check(params)
        return _call(self, params, key)

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


class MHExpectation:
    """A function of (params, key), as `lehr.mh_expectation` makes them."""

    def __init__(self, estimator: Any):
        self._estimator = estimator

    def __call__(self, params: Any, key: PRNGKeyArray) -> Any:
        """The mean of f over the chains; with `has_aux` also `Diagnostics`."""
        return self._estimator(params, key)

    def weights(self, params: Any, key: PRNGKeyArray) -> Float[Array, "num_steps num_chains m"]:
        """Of each decision, what it counts for: the gradient is their mean over chains times the log odds' gradients.

        Those that are not 0 carry a birth, and cost a gradient of the log density each.
        """
        return _weights(self._estimator, params, key)


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
    are kept, by coins that leave the mean as it is. The scan takes no derivative; one pass over the decisions whose
    alternative was kept gives the gradient, in any number of parameters.

    The result is for `jax.grad`, `jax.value_and_grad`, `jax.jacrev`, `lehr.fit`, and inside `jax.jit` and `jax.vmap`. A
    function g of several expectations is that of a pytree f: `lambda params, key: g(*expectation(params, key))`, whose
    value and gradient have the bias of a function of a mean: of order 1 / (steps of all chains), none if g is linear.

    Arguments:
        log_density: maps `(params, x)` to the log density in nats, up to a constant; or a
            `lehr.mh_gradient.DensityRatio`. -inf outside of a support that does not depend on the parameters.
        f: maps `x` or `(params, x)` to floats, of any shape, or a pytree of them.
        proposal: of `lehr.mh_gradient`, an object with `sample(key, x)` and `log_prob(x, x_new)`, or a function
            that makes one of these from params.
        coupling: of `lehr.mh_gradient`, that fits the proposal.
        x0: the first position, `(dim,)` or `(num_chains, dim)`; or a function that makes it from params.
        num_steps: n; burn_in: b < n, the first steps, which do not count; num_chains: N, which run side by side.
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
    make them leaves of params. Second derivatives raise. Where alternatives do not meet their chain it is noisier than
    its error over a few chains says: a RuntimeWarning tells.

    Raises `lehr.errors.InputError` for a coupling that does not fit the proposal, numbers out of range, and, when
    called, parameters or f that are not floats, and an x0 that the proposal cannot move. While it runs it raises a
    `RuntimeError` for a log density that is not finite at x0, or NaN later, no acceptance in a hundred steps, a
    gradient of the log density that is not finite, and a support that depends on the parameters (looked for at up to
    256 of the proposals).

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
    takes_params = _takes(f, 3 if consecutive else 2)
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
    """Whether f can be called with `num` positions: then the first is params."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # of some built-in functions nothing is known
        return False
    try:
        signature.bind(*range(num))
    except TypeError:
        return False
    return True


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
    return _by_decision(estimator, run.trace)


def _by_decision(estimator: Estimator, trace: Any) -> Array:
    plan = estimator.chains.plan
    return jax.vmap(by_birth, in_axes=1, out_axes=1)(trace) / (plan.num_steps - plan.burn_in)


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
    return jnp.mean(_checked(run, estimator.chains.plan.num_steps), axis=0), None


def _run(params: Any, estimator: Estimator, keys: Array, *, alone: bool) -> Run:
    chains = estimator.chains
    sampler, f = chains.sampler(params), chains.row(params)
    rule = None if alone else estimator.own_births

    def gradient(low: Array, high: Array, tag: Array) -> Array:
        found = jax.grad(lambda p: _log_odds(estimator, p, (low, high, tag)))(params)
        return ravel_pytree(found)[0]

    needed = rule is not None and (rule.strength == "gradient" or rule.weights == "single-sided")

    record = Record(
        accepted=estimator.pathwise, after=chains.f_takes_params and not estimator.pathwise, lives=estimator.has_aux
    )

    def chain(key: Array, x0: Array) -> Run:
        return run_chain(sampler, f, key, x0, chains.plan, rule, gradient if needed else None, record)

    return jax.vmap(chain, out_axes=Run(0, 0, 0, 1, 0))(keys, chains.starts(params))


def _checked(run: Run, num_steps: int) -> Array:
    """The chains' means; raises if they mean nothing."""
    mean = eqx.error_if(
        run.mean, jnp.any(run.bad_start), "the log density is not finite at x0 or not a number: start elsewhere"
    )
    mean = eqx.error_if(
        mean,
        jnp.any(jnp.isnan(run.acceptance)),
        "the log density is NaN or infinite where the chain went: mend it, or give -inf",
    )
    if num_steps * len(mean) >= _ENOUGH:
        text = "no proposal was accepted: give a smaller scale, or start where the density is"
        mean = eqx.error_if(mean, jnp.all(run.acceptance == 0), text)
    return mean


def _log_odds(estimator: Estimator, params: Any, row: Any) -> Array:
    flips_only = estimator.own_births.proposal_gradient is None
    return estimator.chains.sampler(params).log_odds(*row, flips_only=flips_only)


def _with_trace(params: Any, estimator: Estimator, keys: Array) -> tuple[Any, Any]:
    """Value and diagnostics, and what the gradient needs: `Kept`, or with diagnostics the gradient itself."""
    run = _run(params, estimator, keys, alone=False)
    plan, trace = estimator.chains.plan, run.trace
    means = _checked(run, plan.num_steps)
    warn_of_unmet(run.oldest, plan.num_steps)
    if not isinstance(estimator.chains.density, DensityRatio):
        low, high = (
            leaf.reshape(-1, *leaf.shape[2:])[:: -(-leaf[..., 0].size // 256)] for leaf in (trace.low, trace.high)
        )
        means = eqx.error_if(
            means,
            support_moves(estimator.chains.density, params, low, high),
            "the support of the log density depends on the parameters, so that its gradient misses what moves in and "
            "out: give a lehr.mh_gradient.DensityRatio",
        )
    weights = _by_decision(estimator, trace)
    kept = Kept(trace.low, trace.high, trace.tag, trace.accepted, trace.after, weights)
    if not estimator.has_aux:
        return (jnp.mean(means, axis=0), None), kept
    each = _each_gradient(params, estimator, keys, kept)
    error = jax.tree.map(_error, each)
    aux = eqx.tree_at(
        lambda d: (d.value_error, d.gradient_error),
        diagnose(run, plan.num_steps),
        (_error(means), error),
        is_leaf=lambda leaf: leaf is None,
    )
    mean_gradient = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), each)
    return (jnp.mean(means, axis=0), aux), mean_gradient


def _error(of_chains: Array) -> Array:
    return jnp.std(of_chains, axis=0, ddof=1) / len(of_chains) ** 0.5


def _each_gradient(params: Any, estimator: Estimator, keys: Array, kept: Kept) -> Any:
    """Of every chain and entry of the row: leaves `(num_chains, m, ...)`."""
    width = kept.weights.shape[-1]

    def of_chain(row: Any) -> Any:
        key, index = row
        one = jax.tree.map(lambda leaf: leaf[:, index][:, None], kept)
        return jax.vmap(lambda ct: _gradient(params, estimator, key[None], one, ct, index))(jnp.eye(width))

    return jax.lax.map(of_chain, (keys, jnp.arange(len(keys))))


def _gradient(params: Any, estimator: Estimator, keys: Array, kept: Kept, ct: Array, first: Array | int = 0) -> Any:
    """The gradient of ct . row, the mean over these chains, of which `first` is the number of the first."""
    chains = estimator.chains
    num = len(keys)
    weights = kept.weights @ ct / num
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

    def flat(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)

    rows = flat((kept.low, kept.high, kept.tag))
    found = weighted_gradient(
        lambda floats, row: _log_odds(estimator, eqx.combine(floats, others), row),
        floats,
        rows,
        flat(weights),
    )
    found = _finite(found)
    if chains.f_takes_params:
        starts = jax.lax.dynamic_slice_in_dim(chains.starts(params), first, num)
        before = jnp.concatenate([starts[None], kept.after[:-1]])
        is_counted = jnp.arange(chains.plan.num_steps) >= chains.plan.burn_in
        counts = jnp.broadcast_to(is_counted[:, None], kept.after.shape[:2])

        def of(floats: Any, row: Any) -> Array:
            return jnp.vdot(scale, chains.row(eqx.combine(floats, others))(*row))

        direct = weighted_gradient(of, floats, flat((before, kept.after)), flat(counts) * 1.0)
        found = jax.tree.map(jnp.add, found, direct)
    return found


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
        key_chain, _ = jax.random.split(key)
        return sampler.noise(key_chain, num_steps, x0)

    def step(carry, inputs):
        point, total = carry
        (k, accepted, weight), (z, _) = inputs
        after, log_ratio = sampler.again(point, z, accepted, weight != 0)
        value = jnp.where(k >= plan.burn_in, jnp.vdot(scale, f(point.x, after.x)), 0)
        return (after, total + value + jnp.where(weight != 0, weight * log_ratio, 0)), None

    steps = jnp.arange(plan.num_steps), accepted, weights
    start = sampler.start(x0), jnp.zeros((), weights.dtype)
    return scan_with_noise(step, noise, start, key, steps, memory="checkpoint")[0][1]


@_mean.def_fwd
def _forwards(perturbed: Any, params: Any, estimator: Estimator, keys: Array) -> tuple[Any, Any]:
    del perturbed
    return _with_trace(params, estimator, keys)


@_mean.def_bwd
def _backwards(residuals: Any, ct: Any, perturbed: Any, params: Any, estimator: Estimator, keys: Array) -> Any:
    del perturbed
    ct_row = ct[0]
    if estimator.has_aux:
        return jax.tree.map(lambda leaf: jnp.tensordot(ct_row, leaf, 1), residuals)
    return _gradient(params, estimator, keys, residuals, ct_row)
