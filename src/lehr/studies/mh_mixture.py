"""The entropy of a posterior, a function of frequencies of Metropolis-Hastings: its curve, gradient and maximum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from rich.console import Console

from lehr.errors import InputError
from lehr.mh_gradient import DiscreteUniform, MaximalIndependent, covariance_expectation, score_expectation
from lehr.mh_gradient.expectation import mh_expectation
from lehr.optimisation import fit
from lehr.studies.output import write

MEANS, SD = (-2.5, 2.0, 5.0), 4.0
NUM_STEPS, BURN_IN, START = 5000, 50, 8.0
#: steps after burn-in whose variances are compared, at an observation where the entropy has a slope
LENGTHS, STEEP = (50, 160, 500, 1600, 5000), 4.0
#: where the gradient is looked at more closely
CLOSE = 0.4
NUM_ITERATIONS = 200
#: chains whose mean over the others is the score's baseline; gradients in one batch of the compiled loop
_GROUP, _BATCH = 16, 16
ESTIMATORS = ("alternatives", "covariance", "score", "score with baseline")


def mixture(options: Any) -> int:
    """Runs the study, writes mh-mixture.json and mh-mixture.png; returns the exit code.

    Arguments:
        options: out (default runs/mh-mixture), num_chains at each point (default 64), seed (default 0), json (default
            false).
    """
    if options.num_chains < 8:
        raise InputError("mh-mixture needs at least 8 chains, to tell errors: give a larger num_chains")
    console, key = Console(stderr=True), jax.random.key(options.seed)
    key_curve, key_close, key_fit, key_lengths = jax.random.split(key, 4)
    points = curve(key_curve, np.linspace(-5, 10, 31), options.num_chains)
    close = curve(key_close, np.array([CLOSE]), 16 * options.num_chains)[0]
    found = {"curve": points, "close": close, "ascent": ascent(key_fit)}
    found |= {"lengths": lengths(key_lengths, 16 * options.num_chains)}
    result = {"num_steps": NUM_STEPS, "burn_in": BURN_IN, "num_chains": options.num_chains, **found}
    for line in in_words(result):
        console.print(line, highlight=False, soft_wrap=True)
    write(options.out, "mh-mixture", result, draw(result), to_stdout=options.json)
    return 0


def log_density(obs: Array, x: Int[Array, " 1"]) -> Array:
    """Of the component, up to a constant: the prior is uniform."""
    return -(((obs - jnp.asarray(MEANS)[x[0]]) / SD) ** 2) / 2


def one_hot(x: Int[Array, " 1"]) -> Float[Array, " 3"]:
    """f, whose mean is the frequencies."""
    return jax.nn.one_hot(x[0], len(MEANS))


def entropy(p: Float[Array, " 3"]) -> Array:
    """g, in nats; p log p is 0 with a slope of 0 at p = 0."""
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0))


def exact(obs: float) -> tuple[float, float]:
    """H and dH / dobs: with p = softmax(l), dp = p (l' - E_p[l']) and dH = -sum dp log p."""
    logits = -(((obs - np.asarray(MEANS)) / SD) ** 2) / 2
    p = np.exp(logits - logits.max())
    p, slope = p / p.sum(), -(obs - np.asarray(MEANS)) / SD**2
    return float(-p @ np.log(p)), float(-(p * (slope - p @ slope)) @ np.log(p))


def estimator(name: str, num_steps: int) -> Any:
    """The entropy by one call, whose gradient is one of four: a function of obs and a key."""
    given: dict[str, Any] = {"num_steps": num_steps + BURN_IN, "burn_in": BURN_IN}
    common = log_density, one_hot, DiscreteUniform(len(MEANS))
    x0 = jnp.ones(1, jnp.int32)
    if name == "alternatives":
        expectation = mh_expectation(*common, MaximalIndependent(), x0, **given)
    elif name == "covariance":
        expectation = covariance_expectation(*common, x0, **given)
    else:
        num_chains, baseline = chains_of(name), name == "score with baseline"
        expectation = score_expectation(*common, x0, num_chains=num_chains, baseline=baseline, **given)
    return lambda obs, key: entropy(expectation(obs, key))


def chains_of(name: str) -> int:
    """In one call."""
    return _GROUP if name == "score with baseline" else 1


def _both(estimate: Any, obs: Array, keys: Array) -> tuple[np.ndarray, np.ndarray]:
    """Values and gradients, of each key."""

    @jax.jit
    def run(obs: Array, keys: Array) -> Any:
        return jax.lax.map(lambda row: jax.value_and_grad(estimate)(*row), (obs, keys), batch_size=_BATCH)

    value, gradient = run(obs, keys)
    return np.asarray(value, np.float64), np.asarray(gradient, np.float64)


def curve(key: PRNGKeyArray, places: np.ndarray, num_chains: int) -> list[dict[str, Any]]:
    """The entropy and its gradient at each place, from chains that each give one of both; errors, and exact."""
    obs = jnp.repeat(jnp.asarray(places, jnp.float32), num_chains)
    both = _both(estimator("alternatives", NUM_STEPS), obs, jax.random.split(key, len(obs)))
    value, gradient = (found.reshape(len(places), num_chains) for found in both)
    rows = []
    for place, values, gradients in zip(places, value, gradient):
        truth, slope = exact(place)
        error, gradient_error = (found.std(ddof=1) / num_chains**0.5 for found in (values, gradients))
        row = {"obs": float(place), "entropy": float(values.mean()), "error": float(error), "exact": truth}
        row |= {"gradient": float(gradients.mean()), "gradient_error": float(gradient_error), "exact_gradient": slope}
        # A constant chain has no error.
        z = (row["gradient"] - slope) / gradient_error if gradient_error > 0 else 0.0
        rows.append(row | {"gradient_z": float(z)})
    return rows


def ascent(key: PRNGKeyArray) -> dict[str, Any]:
    """To the largest entropy, by Adam, from one chain a step."""
    trained = fit(
        key,
        estimator("alternatives", NUM_STEPS),
        jnp.asarray(START),
        optax.adam(0.1),
        NUM_ITERATIONS,
        num_evaluations=2,
        progress=False,
    )
    obs = float(trained.last_params)
    grid = np.linspace(-5, 10, 15_001)
    best = float(grid[np.argmax([exact(place)[0] for place in grid])])
    values = [float(value) for value in trained.values]
    found = {"start": START, "values": values, "obs": obs, "exact_entropy": exact(obs)[0]}
    return found | {"best_obs": best, "best_entropy": exact(best)[0]}


def lengths(key: PRNGKeyArray, num_chains: int) -> list[dict[str, Any]]:
    """By estimator and steps after burn-in: the gradient, and its variance times the steps of all chains."""
    rows = []
    for name in ESTIMATORS:
        group = chains_of(name)
        # At least one batch; no remainder, which would be compiled too.
        num = max(1, num_chains // group // _BATCH) * _BATCH
        for length in LENGTHS:
            _, found = _both(estimator(name, length), jnp.full(num, STEEP), jax.random.split(key, num))
            square, truth = found.var(ddof=1), exact(STEEP)[1]
            kurtosis, scale = np.mean((found - found.mean()) ** 4) / square**2, group * length
            row = {"estimator": name, "num_steps": length, "gradient": float(found.mean()), "exact": truth}
            row |= {"error": float((square / num) ** 0.5), "cost": float(scale * square)}
            rows.append(row | {"cost_error": float(scale * square * ((kurtosis - 1) / num) ** 0.5)})
    return rows


def in_words(result: dict[str, Any]) -> list[str]:
    """The gradient at one place, the ascent, and variances, a line each."""
    close, up = result["close"], result["ascent"]
    gradient = f"{close['gradient']:.5f} +- {close['gradient_error']:.5f} (z {close['gradient_z']:+.1f})"
    worst = max(abs(row["gradient_z"]) for row in result["curve"])
    lines = [
        f"dH/dobs at {close['obs']}: {gradient}, exact {close['exact_gradient']:.5f}; largest |z| of 31: {worst:.1f}",
        f"ascent from {up['start']}: obs {up['obs']:.3f} with entropy {up['exact_entropy']:.5f}; the maximum is at "
        f"{up['best_obs']:.3f}, {up['best_entropy']:.5f}",
    ]
    for name in ESTIMATORS:
        rows = [row for row in result["lengths"] if row["estimator"] == name]
        costs = ", ".join(f"{row['cost']:.3g} +- {row['cost_error']:.1g} ({row['num_steps']})" for row in rows)
        lines.append(f"{name}: variance times steps (steps) {costs}")
    return lines


def draw(result: dict[str, Any]) -> Figure:
    """The entropy, its gradient, the ascent, and variances against lengths."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (top, slope), (up, cost) = figure.subplots(2, 2)
    fine, rows, ascent = np.linspace(-5, 10, 301), result["curve"], result["ascent"]
    truths = np.array([exact(obs) for obs in fine])
    for panel, key, truth in ((top, "entropy", truths[:, 0]), (slope, "gradient", truths[:, 1])):
        error = "error" if key == "entropy" else "gradient_error"
        panel.plot(fine, truth, color="black", lw=1, label="exact")
        values, errors = [row[key] for row in rows], [2 * row[error] for row in rows]
        panel.errorbar([row["obs"] for row in rows], values, yerr=errors, fmt="o", ms=3.5, capsize=2, label="estimated")
        panel.axvline(ascent["best_obs"], color="grey", ls=":", lw=1)
        panel.set(xlabel="observation")
    top.plot(ascent["start"], exact(ascent["start"])[0], "^", ms=9, color="C1", label="start of the ascent")
    top.plot(ascent["obs"], ascent["exact_entropy"], "*", ms=14, color="C1", label="its end")
    top.set(ylabel="entropy H (nats)", title="entropy of the posterior")
    top.legend(frameon=False, loc="lower center")
    slope.axhline(0, color="grey", lw=0.8)
    slope.set(ylabel="dH / dobs", title="its gradient (bars: 2 standard errors)")
    up.plot(ascent["values"], lw=1.2, label=f"one chain of {result['num_steps']:,} steps")
    up.axhline(ascent["best_entropy"], color="black", ls="--", lw=1, label="exact maximum")
    up.set(xlabel="iteration of Adam", ylabel="entropy H (nats)", title=f"ascent from {ascent['start']}")
    up.legend(frameon=False, loc="lower right")
    for i, name in enumerate(ESTIMATORS):
        of = [row for row in result["lengths"] if row["estimator"] == name]
        steps, costs, errors = ([row[key] for row in of] for key in ("num_steps", "cost", "cost_error"))
        cost.errorbar(steps, costs, yerr=errors, fmt="o-", ms=4, capsize=2, color=f"C{i}", label=name)
    cost.set(xscale="log", yscale="log", xlabel="steps n of a chain", ylabel="n x variance of the gradient")
    cost.set(title=f"gradient at {STEEP}: noise against length")
    cost.legend(frameon=False)
    return figure
