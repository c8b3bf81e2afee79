"""The mean of a Gaussian through Metropolis-Hastings: how alternatives meet the chain, and what each scheme costs."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from lehr import mh_gradient
from lehr.errors import InputError
from lehr.mh_gradient.couplings import AbstractCoupling
from lehr.mh_gradient.expectation import mh_expectation
from lehr.mh_gradient.kernel import Kernel, choose
from lehr.mh_gradient.sampler import MetropolisHastings
from lehr.mh_gradient.target import Target
from lehr.studies.output import write

THETA, SCALE = 0.5, 2.38
NUM_STEPS, BURN_IN = 200, 50
#: gradients in one batch of the compiled loop, and chains of a call whose baseline is the mean over the others
_BATCH, _GROUP = 16, 16
#: of the excursions: steps, first step that may give birth, ages looked at, chains; an age at meeting that can be seen
_DRAWN, _FIRST, _OLD, _MANY, _AGES = 40, 5, 20, 1000, (6, 12)


def log_density(theta: Array, x: Array) -> Array:
    """N(theta, 1)."""
    return -jnp.sum((x - theta) ** 2) / 2


def position(x: Array) -> Array:
    """f."""
    return x[0]


#: of `mh_expectation`; its default coupling here is `MaximalReflection`
SCHEMES: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"weights: {name}": {"weights": name} for name in ("right", "left", "single-sided")},
    **{f"strength: {name}": {"strength": name} for name in ("acceptance", "gradient", "uniform")},
    **{f"{num} alternatives": {"num_alternatives": num} for num in (2, 4)},
    "coupling: full kernel": {"coupling": mh_gradient.FullKernelMaximal()},
    "coupling: GCRefl": {"coupling": mh_gradient.GCRefl()},
    "coupling: common numbers": {"coupling": mh_gradient.CommonRandomNumbers()},
    "coupling: independent": {"coupling": mh_gradient.Independent()},
    "default, 1 step": {"num_steps": 1, "burn_in": 0},
    "default, 10 steps": {"num_steps": 10, "burn_in": 0},
}
BASELINES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "covariance": (mh_gradient.covariance_expectation, {}),
    "finite differences": (mh_gradient.difference_expectation, {}),
    "score": (mh_gradient.score_expectation, {"baseline": False}),
    "score with baseline": (mh_gradient.score_expectation, {"num_chains": _GROUP}),
}
#: Where alpha is nearly 1 a rejection has probability |r|, and these weigh it by 1/|r|: the mean of the square is that
#: of 1/|r|, whose integral diverges wherever r goes through 0 (at x' = 2 theta - x).
INFINITE = ("weights: right", "weights: single-sided", "score", "score with baseline")


def gaussian(options: Any) -> int:
    """Runs the study, writes mh-gaussian.json and mh-gaussian.png; returns the exit code.

    Arguments:
        options: out (default runs/mh-gaussian), num_chains of each scheme (default 10,000), seed (default 0; of all
            chains), json (default false).
    """
    if options.num_chains < 10 * _GROUP:
        raise InputError(f"mh-gaussian needs at least {10 * _GROUP} chains: give a larger num_chains")
    console, key = Console(stderr=True), jax.random.key(options.seed)
    rows = []
    for name in (*SCHEMES, *BASELINES):
        rows.append(measure(name, key, options.num_chains))
        console.print(_in_words(rows[-1]), highlight=False, soft_wrap=True)
    result = {"theta": THETA, "scale": SCALE, "num_steps": NUM_STEPS, "burn_in": BURN_IN, "rows": rows}
    result |= {"num_chains": options.num_chains, "seed": options.seed, "excursions": excursions(key)}
    for row in result["excursions"]:
        text = f"{row['coupling']}: {row['apart'][10]:.1%} of alternatives have not met their chain after 10 steps"
        console.print(text, highlight=False, soft_wrap=True)
    write(options.out, "mh-gaussian", result, draw(result), to_stdout=options.json)
    return 0


@functools.cache
def exact(num_steps: int, burn_in: int) -> float:
    """d/dtheta of the mean of E[X_i] over b < i <= n, from x0 = 0: a central difference of quadratures."""
    return (_mean(THETA + 0.01, num_steps, burn_in) - _mean(THETA - 0.01, num_steps, burn_in)) / 0.02


def _mean(theta: float, num_steps: int, burn_in: int) -> float:
    """The masses at the places of a grid, moved by the kernel with what it rejects.

    alpha has a kink at x' = x and at x' = 2 theta - x: both are places of the grid, for theta of two decimals, so that
    the trapezoidal rule keeps its order, and its error cancels in differences.
    """
    x = np.arange(-750, 851) / 100
    walk = np.exp(-(((x - x[:, None]) / SCALE) ** 2) / 2) / (SCALE * np.sqrt(2 * np.pi) * 100)
    kernel = walk * np.exp(np.minimum((x[:, None] - theta) ** 2 - (x - theta) ** 2, 0) / 2)
    kernel[np.diag_indices(len(x))] += 1 - kernel.sum(axis=1)
    mass, total = (x == 0).astype(float), 0.0
    for i in range(1, num_steps + 1):
        mass = mass @ kernel
        total += (mass @ x) * (i > burn_in)
    return float(total / (num_steps - burn_in))


def measure(name: str, key: PRNGKeyArray, num_chains: int) -> dict[str, Any]:
    """The gradient by a scheme, its standard error, and the variance a chain, with its error."""
    made, given = BASELINES.get(name, (mh_expectation, SCHEMES.get(name, {})))
    given = {"num_steps": NUM_STEPS, "burn_in": BURN_IN} | given
    num_steps, burn_in, chains = given["num_steps"], given["burn_in"], given.get("num_chains", 1)
    given |= {"coupling": mh_gradient.MaximalReflection()} | given if made is mh_expectation else {}
    expectation = made(log_density, position, mh_gradient.RandomWalk(SCALE), x0=jnp.zeros(1), **given)
    # No remainder, which would be compiled too.
    keys = jax.random.split(key, num_chains // chains // _BATCH * _BATCH)
    found = _gradients(expectation, keys)
    truth, mean, square = exact(num_steps, burn_in), np.mean(found), np.var(found, ddof=1)
    error, kurtosis = np.sqrt(square / len(found)), np.mean((found - mean) ** 4) / square**2
    return {
        "scheme": name, "num_steps": num_steps, "burn_in": burn_in, "is_finite": name not in INFINITE,
        "gradient": float(mean), "error": float(error), "exact": truth, "z": float((mean - truth) / error),
        "variance": float(chains * square),
        # Var s^2 = sigma^4 (kurtosis - 1) / n, where there is a fourth moment.
        "variance_error": float(chains * square * np.sqrt((kurtosis - 1) / len(found))),
    }  # fmt: skip


def _gradients(expectation: Any, keys: Array) -> np.ndarray:
    """One for each key."""

    @jax.jit
    def run(keys: Array) -> Array:
        return jax.lax.map(lambda key: jax.grad(expectation)(THETA, key), keys, batch_size=_BATCH)

    with warnings.catch_warnings():
        # Couplings that do not meet are here on purpose.
        warnings.filterwarnings("ignore", message="in .* of the chains the alternative has not met")
        found = np.asarray(run(keys), np.float64)
    return found


def excursions(key: PRNGKeyArray) -> list[dict[str, Any]]:
    """By coupling: one chain and its alternative, and the share of alternatives that live after so many steps.

    The chain drawn is the same for all: the first whose alternative takes a while to meet it under reflection.
    """
    keys = jax.random.split(key, _MANY)
    paths = {
        "common random numbers": _paths(mh_gradient.CommonRandomNumbers(), keys),
        "maximal reflection": _paths(mh_gradient.MaximalReflection(), keys),
    }
    apart = {name: _apart(*both) for name, both in paths.items()}
    chain, other = paths["maximal reflection"]
    births, ages = np.isnan(other).sum(axis=1), apart["maximal reflection"].sum(axis=1)
    # Births far out have next to no weight.
    is_near = np.nanmax(np.abs(other - chain), axis=1) < 3
    shown = int(np.argmax((_AGES[0] <= ages) & (ages <= _AGES[1]) & is_near))
    found = []
    for name, (chain, other) in paths.items():
        alternative = [None if np.isnan(y) else float(y) for y in other[shown]]
        shares = [float(share) for share in apart[name].mean(axis=0)]
        row = {"coupling": name, "chain": [float(x) for x in chain[shown]], "alternative": alternative}
        found.append(row | {"birth": int(births[shown]) + 1, "apart": shares})
    return found


def _apart(chain: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the two differ, by age; of the chains whose alternative is born early enough to grow old."""
    differ = np.abs(chain - other) > 1e-5  # XLA may compute one x' twice, to two roundings
    births = np.minimum(np.isnan(other).sum(axis=1), _DRAWN - _OLD)
    return differ[np.arange(len(chain))[:, None], births[:, None] + np.arange(_OLD)]


def _paths(coupling: AbstractCoupling, keys: Array) -> tuple[np.ndarray, np.ndarray]:
    """Chains and, from its birth on, one alternative to each; NaN before. Of the first decision that has a weight."""
    walk = mh_gradient.RandomWalk(SCALE)
    sampler = MetropolisHastings(Kernel(Target(log_density, jnp.asarray(THETA), False), walk), coupling)
    start = sampler.start(jnp.zeros(1))

    def path(key: PRNGKeyArray) -> tuple[Array, Array]:
        key_chain, key_coupling, key_uniform = jax.random.split(key, 3)
        of_chain, uniform = sampler.noise(key_chain, _DRAWN, start.x), jax.random.uniform(key_uniform, (_DRAWN,))
        of_other = coupling.noise(walk, key_coupling, uniform, start.x)

        def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
            (point, other, born), (k, z, u) = carry, inputs
            move = sampler.move(k, point, z)
            other = coupling.follow(sampler.kernel, move, other, u).point
            # Proposals uphill are accepted whatever theta is.
            birth = ~born & (k + 1 >= _FIRST) & (move.log_ratio < 0)
            other = choose(birth, choose(move.accepted, move.old, move.new), other)
            born = born | birth
            return (move.after, other, born), (move.after.x[0], jnp.where(born, other.x[0], jnp.nan))

        inputs = jnp.arange(_DRAWN), of_chain, of_other
        return jax.lax.scan(step, (start, start, jnp.asarray(False)), inputs)[1]

    chain, other = jax.jit(jax.vmap(path))(keys)
    return np.asarray(chain, np.float64), np.asarray(other, np.float64)


def _in_words(row: dict[str, Any]) -> str:
    gradient = f"gradient {row['gradient']:.4f} +- {row['error']:.4f} (exact {row['exact']:.4f}, z {row['z']:+.1f})"
    return f"{row['scheme']}: {gradient}, variance a chain {row['variance']:.3g} +- {row['variance_error']:.1g}"


def draw(result: dict[str, Any]) -> Figure:
    """Excursions above; below, by scheme, the gradient less the exact one, and the variance a chain."""
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    above, below = np.ravel(np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.9))))
    *panels, survival = above.subplots(1, 3)
    for panel, row in zip(panels, result["excursions"]):
        _draw_excursion(panel, row)
        survival.plot(row["apart"], "o-", ms=3.5, label=row["coupling"])
    survival.set(title=f"alternatives apart, of {_MANY}", xlabel="age (steps)", ylabel="share", ylim=(-0.03, 1.05))
    survival.legend(frameon=False)
    left, right = below.subplots(1, 2, sharey=True)
    rows = result["rows"]
    places, names = np.arange(len(rows)), [row["scheme"] for row in rows]
    for place, row in zip(places, rows):
        colour = "C1" if row["scheme"] in BASELINES else "C0"
        left.errorbar(row["gradient"] - row["exact"], place, xerr=2 * row["error"], fmt="o", capsize=2, color=colour)
        hatch = None if row["is_finite"] else "///"
        right.barh(place, row["variance"], color=colour, alpha=0.75, hatch=hatch, xerr=row["variance_error"], capsize=2)
        end, text = row["variance"] + row["variance_error"], f"{row['variance']:.3g}"
        right.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    left.axvline(0, color="black", lw=0.8)
    left.set_xscale("symlog", linthresh=0.02)
    left.set(xlabel="gradient - exact (bars: 2 standard errors)", yticks=places, yticklabels=names)
    left.invert_yaxis()
    right.set(xscale="log", xlabel="variance a chain (hatched: seen, of an infinite one)")
    right.set_xlim(right=20 * max(row["variance"] for row in rows))
    return figure


def _draw_excursion(panel: Axes, row: dict[str, Any]) -> None:
    steps = np.arange(1, len(row["chain"]) + 1)
    other = [np.nan if y is None else y for y in row["alternative"]]
    panel.step(steps, other, where="post", color="C1", lw=2.8, label="alternative")
    panel.step(steps, row["chain"], where="post", color="C0", lw=1.2, label="chain")
    panel.axvline(row["birth"], color="grey", ls=":", lw=1)
    panel.set(title=row["coupling"], xlabel="step", ylabel="x")
    panel.legend(frameon=False)
