"""Sticking the landing: how noisy each gradient rule is along a training run, down to the exact posterior."""

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from flowjax.distributions import StandardNormal
from flowjax.flows import coupling_flow
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from rich.console import Console
from sklearn.datasets import load_breast_cancer, load_diabetes

from lehr import objectives
from lehr.annealer import Annealer
from lehr.errors import InputError
from lehr.gaussian import Gaussian
from lehr.kernels import Hamiltonian
from lehr.numerics import bernoulli_log_prob
from lehr.optimisation import fit
from lehr.path import Schedule
from lehr.studies.output import write
from lehr.studies.sticking_plot import draw
from lehr.training_loop import split

if TYPE_CHECKING:
    from lehr.commands import Sticking

#: shares of the training run at which gradients are measured
_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
_DIMENSION = 11
#: patients; with all 569 the posterior is nearly Gaussian
_NUM_PATIENTS = 60
#: of linear regression, in standard deviations of the outcome: so large that five leapfrogs are stable
_NOISE = 2.0
#: of the bounds with several samples: as many as the ELBO has samples
_NUM_REPLICATES = 8


class Regression(eqx.Module):
    """w ~ N(0, I), and outcomes y given design w: Bernoulli with these log odds, or Gaussian with noise of scale 2.

    One class, that chooses by a number, so that both targets are served by one compiled program.
    """

    design: Float[Array, "n dim"]
    y: Float[Array, " n"]
    is_linear: Bool[Array, ""]

    def __call__(self, w: Float[Array, " dim"]) -> Float[Array, ""]:
        eta = self.design @ w
        log_likelihood = jnp.where(
            self.is_linear, -(((self.y - eta) / _NOISE) ** 2) / 2, bernoulli_log_prob(eta, self.y)
        )
        return -jnp.sum(w**2) / 2 + jnp.sum(log_likelihood)

    def posterior(self) -> Gaussian:
        """The exact one, of linear regression."""
        design, y = np.asarray(self.design, np.float64), np.asarray(self.y, np.float64)
        covariance = np.linalg.inv(np.eye(design.shape[1]) + design.T @ design / _NOISE**2)
        return Gaussian.from_covariance(covariance @ design.T @ y / _NOISE**2, covariance)


class LogProb(eqx.Module):
    """The log density of a distribution, as a target."""

    distribution: Any

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        return self.distribution.log_prob(x)


class Bound(eqx.Module):
    """An objective of one target, `(params, key) -> scalar`; data are its leaves, and so no constants."""

    objective: Callable = eqx.field(static=True)
    target: Any
    options: tuple[tuple[str, int], ...] = eqx.field(static=True)

    def __call__(self, params: Any, key: PRNGKeyArray) -> Float[Array, ""]:
        return self.objective(params, self.target, key, **dict(self.options))


class Rule(NamedTuple):
    """An objective; `num_replicates` is an option of those that are the mean of several bounds."""

    objective: Callable
    num_replicates: int | None = None

    def bound(self, target: Any, options: tuple[tuple[str, int], ...]) -> Bound:
        """The objective of a target, with options that all rules of a setting share."""
        more = () if self.num_replicates is None else (("num_replicates", self.num_replicates),)
        return Bound(self.objective, target, options + more)


class Run(NamedTuple):
    """What is trained, by the last rule of its first setting, and the settings whose gradients are measured on the way.

    A setting has the rules by name, and the number of samples. `exact` is a base that is the posterior.
    """

    target_name: str
    start: Any
    target: Any
    settings: dict[str, tuple[dict[str, Rule], tuple[tuple[str, int], ...]]]
    exact: Any = None


def sticking(options: "Sticking") -> int:
    """Runs the study, writes sticking.json and sticking.png; returns the exit code."""
    if options.num_iterations < 100 or options.num_keys < 10:
        raise InputError("sticking needs at least 100 iterations and 10 keys: give larger numbers")
    console, key, rows = Console(stderr=True), jax.random.key(options.seed), []
    for i, run in enumerate(runs(jax.random.fold_in(key, 0))):
        found = measure(jax.random.fold_in(key, 1 + i), run, options.num_iterations, options.num_keys)
        rows += found
        for name in run.settings:
            last = [row for row in found if row["setting"] == name][-len(run.settings[name][0]) :]
            where = "exact posterior" if last[0]["exact"] else f"{last[0]['iteration']:,} iterations"
            text = ", ".join(f"{row['rule']} {row['variance']:.2g}" for row in last)
            console.print(f"{name}, {run.target_name}, {where}: {text}", highlight=False, soft_wrap=True)
    result = {"num_iterations": options.num_iterations, "num_keys": options.num_keys, "rows": rows}
    write(options.out, "sticking", result, draw(result), to_stdout=options.json)
    return 0


def runs(key: PRNGKeyArray) -> list[Run]:
    """Three bases, each for a posterior outside its family and for one inside."""
    key_start, key_flow = jax.random.split(key)
    logistic, linear = _targets()
    elbo = {
        "plain": Rule(objectives.elbo),
        "control variate": Rule(objectives.elbo_control_variate),
        "STL": Rule(objectives.elbo_stl),
    }
    iwae = {
        "plain": Rule(objectives.iwae),
        "control variate": Rule(objectives.iwae_control_variate, _NUM_REPLICATES),
        "STL (biased)": Rule(objectives.iwae_stl),
        "DReG": Rule(objectives.iwae_dreg),
    }
    davi = {
        "plain": Rule(objectives.davi),
        "control variate": Rule(objectives.davi_control_variate, _NUM_REPLICATES),
        "STL (biased)": Rule(objectives.davi_stl),
        "DReG": Rule(objectives.davi_dreg),
    }
    gaussians = {
        "ELBO, full-rank Gaussian": (elbo, (("num_samples", 8),)),
        "IWAE S = 5": (iwae, (("num_samples", 5),)),
        "IWAE S = 50": (iwae, (("num_samples", 50),)),
    }
    flows = {"ELBO, coupling flow": (elbo, (("num_samples", 8),))}
    annealed = {"DAVI K = 5, S = 5": (davi, (("num_particles", 5),))}
    prior, posterior = Gaussian.from_covariance(np.zeros(_DIMENSION), np.eye(_DIMENSION)), linear.posterior()
    flow = coupling_flow(key_start, base_dist=StandardNormal((_DIMENSION,)), flow_layers=2, nn_width=16)
    # Another flow of the same kind.
    moved = jax.tree.map(
        lambda leaf: leaf + 0.05 * jax.random.normal(key_flow, leaf.shape) if eqx.is_inexact_array(leaf) else leaf, flow
    )

    annealer = Annealer(prior, Schedule.linear(5), Hamiltonian(jnp.full((5, 1), 0.05)))
    outside, inside = "logistic regression", "target in the family"
    return [
        Run(outside, prior, logistic, gaussians),
        Run(inside, prior, linear, gaussians, posterior),
        Run(outside, flow, logistic, flows),
        Run(inside, flow, LogProb(moved), flows, moved),
        Run(outside, annealer, logistic, annealed),
        Run(inside, annealer, linear, annealed, posterior),
    ]


def measure(key: PRNGKeyArray, run: Run, num_iterations: int, num_keys: int) -> list[dict[str, Any]]:
    """One row for each setting, iterate and rule, with the moments of the gradient in the base.

    The variance of a mean of B bounds is given times B, and its signal-to-noise divided by sqrt(B): what one bound has,
    as with the other rules. The training is one run of `lehr.fit`, gone on with from its checkpoint after each iterate
    that is measured.
    """
    key_fit, key_measure = jax.random.split(key)
    rules, options = next(iter(run.settings.values()))
    trained_by = list(rules.values())[-1].bound(run.target, options)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.03, num_iterations))
    iterates = [(0, False, run.start)]
    with tempfile.TemporaryDirectory() as folder:
        for done in [round(share * num_iterations) for share in _SHARES]:
            trained = fit(key_fit, trained_by, run.start, optimiser, done, window=10, checkpoint=folder, progress=False)
            iterates.append((done, False, trained.last_params))
    if run.exact is not None:
        last = iterates[-1][2]
        exact = eqx.tree_at(lambda a: a.base, last, run.exact) if isinstance(last, Annealer) else run.exact
        iterates.append((num_iterations, True, exact))
    rows = []
    for i, (iteration, exact, params) in enumerate(iterates):
        keys = jax.random.split(jax.random.fold_in(key_measure, i), num_keys)
        for setting, (rules, options) in run.settings.items():
            for name, rule in rules.items():
                moments = jax.tree.map(float, gradient_moments(rule.bound(run.target, options), params, keys))
                where = {"setting": setting, "target": run.target_name, "rule": name}
                rows.append(where | {"iteration": iteration, "exact": exact} | _of_one_bound(moments, rule))
    return rows


def _of_one_bound(moments: dict[str, float], rule: Rule) -> dict[str, float]:
    """The moments of a mean of bounds, brought to one of them."""
    b = rule.num_replicates or 1
    scales = {"variance": b, "variance_error": b, "signal_to_noise": b**-0.5}
    return {name: value * scales.get(name, 1) for name, value in moments.items()}


@eqx.filter_jit
def gradient_moments(bound: Bound, params: Any, keys: Array) -> dict[str, Float[Array, ""]]:
    """The bound, the total variance of its gradient in the base with its error, and the gradient's signal-to-noise.

        variance = tr Var g,    signal-to-noise = |E g| / sqrt(tr Var g),    |E g|^2 = |g_bar|^2 - tr Var g / n.

    g_bar is the mean over n keys. A ratio below 1 / sqrt(n) cannot be told from the noise of g_bar, and is NaN.
    """
    trained, rest = split(params)

    def one(key: Array) -> tuple[Array, Array]:
        value, gradient = jax.value_and_grad(lambda trained: bound(eqx.combine(trained, rest), key))(trained)
        of_base = gradient.base if isinstance(gradient, Annealer) else gradient
        return value, jax.flatten_util.ravel_pytree(of_base)[0]

    values, gradients = jax.lax.map(one, keys, batch_size=min(50, len(keys)))
    n, mean = len(keys), jnp.mean(gradients, axis=0)
    squares = jnp.sum((gradients - mean) ** 2, axis=1) * n / (n - 1)
    variance = jnp.mean(squares)
    signal = jnp.sum(mean**2) - variance / n
    return {
        "bound": jnp.mean(values),
        "variance": variance,
        "variance_error": jnp.std(squares) / np.sqrt(n),
        "signal_to_noise": jnp.sqrt(jnp.where(signal > variance / n, signal, jnp.nan) / variance),
    }


def _targets() -> tuple[Regression, Regression]:
    """Breast cancer by ten features, logistic, and diabetes by its ten, linear; intercepts, and the first patients."""
    tables: Any = load_breast_cancer(), load_diabetes()
    y = tables[1].target[:_NUM_PATIENTS]
    outcomes = tables[0].target[:_NUM_PATIENTS], (y - y.mean()) / y.std()
    found = []
    for table, outcome, is_linear in zip(tables, outcomes, (False, True)):
        features = table.data[:_NUM_PATIENTS, :10]
        standardised = (features - features.mean(axis=0)) / features.std(axis=0)
        design = np.column_stack([np.ones(_NUM_PATIENTS), standardised])
        found.append(Regression(jnp.asarray(design, float), jnp.asarray(outcome, float), jnp.asarray(is_linear)))
    return found[0], found[1]
