"""Parameters of a proposal, by gradients through Metropolis-Hastings: those that leave the least autocorrelation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray
from matplotlib.figure import Figure
from rich.console import Console
from scipy import optimize
from scipy.special import ndtr

from lehr.errors import InputError
from lehr.mh_gradient import MALA, MaximalReflection, RandomWalk, expectation
from lehr.mh_gradient.sampler import ProposalGradient
from lehr.optimisation import fit
from lehr.studies.output import write

#: where gradients are compared, of the random walk and of MALA; where ascents begin
AT, AT_MALA, START = 1.5, 1.0, 1.0
NUM_STEPS, BURN_IN = 1100, 100
#: chains of one call: g of their mean is biased by one over their steps, and of a single chain that shows
CHAINS, NUM_ITERATIONS = 16, 200
#: of the Gaussian in two dimensions
COVARIANCE = np.array([[1, 0.9], [0.9, 1]])
#: what is trained there: the mean of the autocorrelations of the coordinates, or of all whitened directions
GOALS = ("coordinates", "whitened")
_BATCH = 16


def proposal(options: Any) -> int:
    """Runs the study, writes mh-proposal.json and mh-proposal.png; returns the exit code.

    Arguments:
        options: out (default runs/mh-proposal), num_chains for each gradient (default 8,192), seed (default 0), json
            (default false).
    """
    if options.num_chains < CHAINS * _BATCH:
        raise InputError(f"mh-proposal needs at least {CHAINS * _BATCH} chains: give a larger num_chains")
    console, keys = Console(stderr=True), jax.random.split(jax.random.key(options.seed), len(ROUTES) + 1)
    result = {
        "num_steps": NUM_STEPS, "burn_in": BURN_IN, "num_chains": options.num_chains,
        "routes": [measure(name, key, options.num_chains) for name, key in zip(ROUTES, keys)],
        "plane": [plane(goal, keys[-1]) for goal in GOALS], "plane_known": plane_known(),
    }  # fmt: skip
    for line in in_words(result):
        console.print(line, highlight=False, soft_wrap=True)
    write(options.out, "mh-proposal", result, draw(result), to_stdout=options.json)
    return 0


def walk_autocorrelation(s: float) -> float:
    """Of one step of a random walk of scale s on N(0, 1), stationary: 1 - E[(x' - x)^2 alpha] / 2.

    Over x the log ratio of x + s z is N(-v / 2, v), v = s^2 z^2, and E min(1, exp r) = 2 Phi(-s |z| / 2).
    """
    z = np.linspace(0, 10, 4001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return float(1 - 2 * s**2 * np.trapezoid(z**2 * density * ndtr(-s * z / 2), z))


def mala_autocorrelation(s: float) -> float:
    """The same of MALA, over a grid of x and x' where the kinks of alpha, |x'| = |x|, are places of the grid.

    With q(x, x') = N(x'; (1 - s^2 / 2) x, s^2) the log ratio is (x^2 - x'^2) s^2 / 8.
    """
    x = np.linspace(-8, 8, 1601)
    joint = np.exp(-((x[:, None] ** 2) + ((x - (1 - s**2 / 2) * x[:, None]) / s) ** 2) / 2)
    alpha = np.exp(np.minimum((x[:, None] ** 2 - x**2) * s**2 / 8, 0))
    return float(1 - np.sum(joint * alpha * (x - x[:, None]) ** 2) / np.sum(joint) / 2)


def slope(of: Callable[[float], float], at: float) -> float:
    """A central difference."""
    return (of(at + 1e-3) - of(at - 1e-3)) / 2e-3


def plane_autocorrelations(factor: np.ndarray) -> np.ndarray:
    """Of a stationary random walk of this Cholesky factor on the Gaussian of the plane: I - E[w w^T alpha] / 2,

    of the whitened direction w of a step; as in one dimension, E alpha = 2 Phi(-|w| / 2).
    """
    u = np.linspace(-7, 7, 281)
    z = np.stack(np.meshgrid(u, u), axis=-1).reshape(-1, 2)
    weights = np.exp(-np.sum(z**2, axis=1) / 2)
    w = np.linalg.solve(np.linalg.cholesky(COVARIANCE), factor @ z.T)
    return np.eye(2) - (w * (weights / weights.sum() * ndtr(-np.linalg.norm(w, axis=0) / 2))) @ w.T


def least(of: Callable[[float], float]) -> float:
    """The scale with the least autocorrelation."""
    return float(np.asarray(optimize.fminbound(of, 0.2, 4)))


def plane_known() -> list[dict[str, Any]]:
    """Factors to compare with: the best multiples of the identity, and of the Cholesky factor of the target."""
    rows = []
    for name, shape in (("identity", np.eye(2)), ("Cholesky factor", np.linalg.cholesky(COVARIANCE))):
        s = least(lambda s, shape=shape: float(np.trace(plane_autocorrelations(s * shape)) / 2))
        rows.append({"shape": name, "multiple": s} | _of_factor(s * shape))
    return rows


def _of_factor(factor: np.ndarray) -> dict[str, Any]:
    """What is known exactly of a proposal in the plane."""
    whitened, root, spread = plane_autocorrelations(factor), np.linalg.cholesky(COVARIANCE), factor @ factor.T
    return {
        "factor": factor.tolist(),
        "correlation": float(spread[0, 1] / np.sqrt(spread[0, 0] * spread[1, 1])),
        "coordinates": float(np.trace(root @ whitened @ root.T) / 2),
        "whitened": float(np.trace(whitened) / 2),
        "slowest": float(np.linalg.eigvalsh(whitened)[-1]),
    }


def moments(x: Array, x_next: Array) -> tuple[Array, Array, Array]:
    """f."""
    return x_next, jnp.outer(x_next, x_next), jnp.outer(x, x_next)


def autocorrelations(mean: Array, second: Array, both: Array) -> dict[str, Array]:
    """g: of the coordinates, and of whitened directions (the trace of both over the covariance), their means."""
    covariance, lagged = second - jnp.outer(mean, mean), (both + both.T) / 2 - jnp.outer(mean, mean)
    whitened = jnp.trace(jnp.linalg.solve(covariance, lagged)) / len(mean)
    return {"coordinates": jnp.mean(jnp.diagonal(lagged) / jnp.diagonal(covariance)), "whitened": whitened}


def estimator(make: Any, route: ProposalGradient, precision: np.ndarray, goal: str) -> Callable[[Any, Array], Array]:
    """The mean lag-one autocorrelation, a function of the parameters of the proposal and a key."""
    inverse = jnp.asarray(precision, jnp.float32)
    mean = expectation.mh_expectation(
        lambda params, x: -x @ inverse @ x / 2, moments, make, MaximalReflection(), jnp.zeros(len(precision)),
        num_steps=NUM_STEPS, burn_in=BURN_IN, num_chains=CHAINS, proposal_gradient=route, consecutive=True,
    )  # fmt: skip
    return lambda params, key: autocorrelations(*mean(params, key))[goal]


def gradient(estimate: Callable[[Array, Array], Array], at: float, key: PRNGKeyArray, num: int) -> dict[str, float]:
    """The mean over `num` chains, in calls of several; its error, and the variance times the steps of all chains."""
    keys = jax.random.split(key, num // CHAINS // _BATCH * _BATCH)  # no remainder, which would be compiled too

    @jax.jit
    def run(keys: Array) -> Array:
        return jax.lax.map(lambda key: jax.grad(estimate)(jnp.asarray(at), key), keys, batch_size=_BATCH)

    found = np.asarray(run(keys), np.float64)
    square, steps = found.var(ddof=1), CHAINS * (NUM_STEPS - BURN_IN)
    error, kurtosis = (square / len(keys)) ** 0.5, np.mean((found - found.mean()) ** 4) / square**2
    row = {"gradient": float(found.mean()), "error": float(error), "cost": float(steps * square)}
    return row | {"cost_error": float(steps * square * ((kurtosis - 1) / len(keys)) ** 0.5)}


def ascend(objective: Callable[[Any, Array], Array], params: Any, key: PRNGKeyArray) -> tuple[Any, list[float]]:
    """The last parameters, and the autocorrelation seen in each iteration, of an ascent to the least of it."""
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, NUM_ITERATIONS))
    negative = lambda params, key: -objective(params, key)  # noqa: E731
    trained = fit(key, negative, params, optimiser, NUM_ITERATIONS, num_evaluations=2, progress=False)
    return trained.last_params, [-float(value) for value in trained.values]


#: name: proposal, route, exact autocorrelation, and where its gradient is compared
ROUTES: dict[str, tuple[Any, ProposalGradient, Callable[[float], float], float]] = {
    "pathwise": (RandomWalk, "pathwise", walk_autocorrelation, AT),
    "weak": (RandomWalk, "weak", walk_autocorrelation, AT),
    "score": (RandomWalk, "score", walk_autocorrelation, AT),
    "MALA": (MALA, "pathwise", mala_autocorrelation, AT_MALA),
}


def measure(name: str, key: PRNGKeyArray, num_chains: int) -> dict[str, Any]:
    """The gradient of the autocorrelation on N(0, 1) by one route, and the ascent with it."""
    make, route, of, at = ROUTES[name]
    estimate = estimator(make, route, np.eye(1), "coordinates")
    row: dict[str, Any] = {"route": name} | gradient(estimate, at, key, num_chains) | {"exact": slope(of, at)}
    log_scale, values = ascend(lambda p, key: estimate(jnp.exp(p), key), jnp.log(START), key)
    scale, best = float(np.exp(log_scale)), least(of)
    row |= {"z": (row["gradient"] - row["exact"]) / row["error"], "at": at, "best": best, "least": of(best)}
    return row | {"scale": scale, "autocorrelation": of(scale), "values": values}


def plane(goal: str, key: PRNGKeyArray) -> dict[str, Any]:
    """A Cholesky factor trained on the correlated Gaussian, from the identity; what it does, exactly."""

    def factor(params: Any) -> Array:
        return jnp.diag(jnp.exp(params["log_diagonal"])) + params["below"] * jnp.eye(2, k=-1)

    precision = np.linalg.inv(COVARIANCE)
    estimate = estimator(lambda params: RandomWalk(factor(params)), "pathwise", precision, goal)
    params, values = ascend(estimate, {"log_diagonal": jnp.zeros(2), "below": jnp.zeros(())}, key)
    return {"goal": goal, "values": values} | _of_factor(np.asarray(factor(params), np.float64))


def in_words(result: dict[str, Any]) -> list[str]:
    """Gradients, ascents and the proposals of the plane, a line each."""
    lines = []
    for row in result["routes"]:
        found = f"{row['gradient']:.4f} +- {row['error']:.4f} (exact {row['exact']:.4f}, z {row['z']:+.1f})"
        costs = f"variance times steps {row['cost']:.3g} +- {row['cost_error']:.1g}"
        to = f"{row['scale']:.3f}, autocorrelation {row['autocorrelation']:.5f}"
        lines.append(f"{row['route']}: gradient at {row['at']} {found}, {costs}")
        lines.append(f"  ascent from {START} to {to}; exact optimum {row['best']:.3f}, {row['least']:.5f}")
    named = [(f"trained, {row['goal']}", row) for row in result["plane"]]
    for name, row in named + [(f"best multiple of the {row['shape']}", row) for row in result["plane_known"]]:
        of = f"of coordinates {row['coordinates']:.4f}, whitened {row['whitened']:.4f}, slowest {row['slowest']:.4f}"
        lines.append(f"{name}: correlation {row['correlation']:.4f}; mean autocorrelation {of}")
    return lines


def draw(result: dict[str, Any]) -> Figure:
    """The autocorrelation of one dimension, its gradients and their cost; below, the ascents, and proposals."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    (curves, slopes, costs), (ascents, planes, ellipses) = figure.subplots(2, 3)
    for name, style, largest in (("pathwise", "-", 3.5), ("MALA", "--", 2)):
        scales, label = np.linspace(0.7, largest, 40), "MALA, exact" if name == "MALA" else "random walk, exact"
        curves.plot(scales, [ROUTES[name][2](s) for s in scales], style, color="black", lw=1, label=label)
    for i, row in enumerate(result["routes"]):
        name, bar = row["route"], {"capsize": 3, "color": f"C{i}"}
        style = f"C{i}{'o^s*'[i % 4]}"
        curves.plot(row["scale"], row["autocorrelation"], style, ms=8, mfc="none", label=f"trained, {name}")
        slopes.errorbar(i, row["gradient"] - row["exact"], yerr=2 * row["error"], fmt="o", **bar)
        costs.bar(i, row["cost"], yerr=row["cost_error"], **bar)
        ascents.plot(row["values"], lw=1, color=f"C{i}", label=name)
        ascents.axhline(row["least"], color="black", ls="--", lw=0.8)
    for panel in (slopes, costs):
        panel.set_xticks(range(len(result["routes"])), [row["route"] for row in result["routes"]])
    slopes.axhline(0, color="black", lw=0.8)
    curves.set(xlabel="scale of the proposal", ylabel="lag-one autocorrelation", title="on N(0, 1)")
    slopes.set(title=f"gradient - exact, at {AT} (MALA: {AT_MALA})", ylabel="bars: 2 standard errors")
    costs.set(title="variance of the gradient x steps")
    ascents.set(xlabel="iteration", ylabel="lag-one autocorrelation", title="ascents (dashed: exact optima)")
    for i, row in enumerate(result["plane"]):
        planes.plot(row["values"], lw=1, color=f"C{i}", label=row["goal"])
        planes.axhline(row[row["goal"]], color=f"C{i}", ls="--", lw=1)
        _draw_ellipse(ellipses, np.array(row["factor"]), f"C{i}", lw=2, label=f"trained, {row['goal']}")
    planes.set(xlabel="iteration", ylabel="mean autocorrelation", title="a Cholesky factor (dashed: exact, at its end)")
    for row, style in zip(result["plane_known"], ("C2", "k--")):
        _draw_ellipse(ellipses, np.array(row["factor"]), style, lw=1.2, label=f"best multiple, {row['shape']}")
    ellipses.set(title="proposals (1 standard deviation)", aspect="equal", ylim=(-3.2, 4.9), xlim=(-4, 4))
    for panel in (curves, ascents, planes, ellipses):
        panel.legend(frameon=False, fontsize=8)
    return figure


def _draw_ellipse(axes: Any, factor: np.ndarray, style: str, **more: Any) -> None:
    angles = np.linspace(0, 2 * np.pi, 200)
    axes.plot(*(factor @ np.stack([np.cos(angles), np.sin(angles)])), style, **more)
