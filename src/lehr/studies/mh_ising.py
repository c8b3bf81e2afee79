"""The Ising model on a torus: its specific heat, the derivative of that, and the ascent to its maximum."""

import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure
from rich.console import Console

from lehr import mh_gradient as mh
from lehr.errors import InputError
from lehr.mh_gradient import mh_expectation
from lehr.optimisation import fit
from lehr.studies.ising_exact import exact_heat, exact_moments, maximum
from lehr.studies.output import write

if TYPE_CHECKING:
    from lehr.mh_studies import Ising

#: independent parts of the chains: squares of means are products of two of them, and errors are by the jackknife
_GROUPS = 16
#: of the curve; sweeps from all spins up, that do not and do count
TEMPERATURES = (1.5, 1.75, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.65, 2.8, 3.0, 3.5, 4.0)
SWEEPS = (500, 1000)
#: alternatives kept at once: of the births of all sites and of many sweeps one that is kept would have to speak for all
_ALTERNATIVES = 4
#: where numbers of them are compared, and by how many gradients of chains of how many sweeps
_SLOTS, SLOTS_AT, _SLOTS_SWEEPS, _SLOTS_REPEATS = (1, 4, 16), (2.1, 2.3, 2.8), (100, 300), 48
#: single spins, but for the last; a proposal turns the same spin in both chains, so that they propose opposite ones
_COUPLINGS = {
    "single spins, monotone": mh.MonotoneSpin(),
    "single spins, opposite proposals": mh.CommonRandomNumbers(),
    "single spins, independent": mh.Independent(),
    "heat bath": mh.MonotoneSpin(),
}
COMPARED_AT, _COMPARED_SWEEPS = (2.5, 3.0, 4.0, 6.0), 10
#: a variance seen in 64 chains may be half or twice that of the next 64
_COMPARED_REPEATS = 12
#: ascents side by side, chains of each, their sweeps, and iterations
_RUNS, _RUN_CHAINS, RUN_SWEEPS, ITERATIONS = 4, 8, (100, 300), 400
_START = 6.0
_FIELDS = ("value", "error", "exact", "z")


def ising(options: "Ising") -> int:
    """Runs the study, writes mh-ising.json and mh-ising.png; returns the exit code."""
    if options.num_chains < _GROUPS or options.num_chains % _GROUPS:
        raise InputError(f"num_chains must be a multiple of {_GROUPS}, but it is {options.num_chains}")
    if options.side < 4 or options.side % 2:
        raise InputError(f"the side of the lattice must be even and at least 4, but it is {options.side}")
    say = partial(Console(stderr=True).print, highlight=False, soft_wrap=True)
    keys = jax.random.split(jax.random.key(options.seed), 3)
    result: dict[str, Any] = {"side": options.side, "num_chains": options.num_chains, "maximum": maximum(options.side)}
    with warnings.catch_warnings():
        # What they say, that alternatives did not meet the chain, is counted here.
        warnings.filterwarnings("ignore", "in .* of the chains the alternative", RuntimeWarning)
        result["curve"] = specific_heats(keys[0], options, say)
        result["couplings"] = compare_couplings(keys[1], options, say)
        result["alternatives"] = compare_alternatives(keys[1], options.side, say)
        result["ascents"] = ascend(keys[2], options.side, say)
    write(options.out, "mh-ising", result, draw(result), to_stdout=options.json)
    return 0


def energy(x: Array) -> Float[Array, ""]:
    """-sum of x_i x_j over neighbours on the square torus, of spins `(side * side,)`."""
    side = round(x.shape[0] ** 0.5)
    spins = x.reshape(side, side) * 1.0
    return -jnp.sum(spins * (jnp.roll(spins, 1, 0) + jnp.roll(spins, 1, 1)))


def log_density(temperature: Any, x: Array) -> Array:
    """-energy / T."""
    return -energy(x) / temperature


class Moments(eqx.Module):
    """f: (D, D^2) a site, D the energy from a reference: near the mean, or float32 loses the variance in D^2."""

    reference: Float[Array, ""]

    def __call__(self, x: Array) -> Float[Array, "2"]:
        excess = energy(x) - self.reference
        return jnp.stack([excess, excess**2]) / x.shape[0]


def heat(temperature: Any, rows: Float[Array, "groups 2"], sites: int) -> Float[Array, ""]:
    """C from the moments of independent groups of chains.

    (E D)^2 is the mean of products of two groups: a square of a mean would be too large by that mean's variance.
    """
    mean, square = rows[:, 0], jnp.mean(rows[:, 1])
    pairs = (jnp.sum(mean) ** 2 - jnp.sum(mean**2)) / (len(mean) * (len(mean) - 1))
    return sites * (square - sites * pairs) / temperature**2


def _estimates(groups: Float[Array, "groups 2 2"], t: float, side: int) -> dict[str, dict[str, float]]:
    """<E>, C and dC/dT from moments and their derivatives; standard errors by the jackknife, and the exact ones."""
    mean = exact_moments(1 / t, side, side)[0]  # the reference

    def of(groups: Array) -> Array:
        tangents = jnp.ones(()), groups[..., 1]
        both = jax.jvp(lambda t, rows: heat(t, rows, side**2), (jnp.asarray(t), groups[..., 0]), tangents)
        return jnp.stack([jnp.mean(groups[:, 0, 0]) * side**2 + mean, *both])

    num = len(groups)
    without = jax.jit(jax.vmap(of))(jnp.stack([jnp.delete(groups, i, axis=0) for i in range(num)]))
    values, errors = np.asarray(of(groups), float), np.std(np.asarray(without, float), axis=0) * (num - 1) ** 0.5
    exact = mean, *exact_heat(t, side)
    rows = np.stack([values, errors, exact, (values - exact) / errors], axis=1).tolist()
    return {name: dict(zip(_FIELDS, row)) for name, row in zip(("energy", "specific_heat", "slope"), rows)}


def _groups(make: Callable[[Moments], Any]) -> Callable[[Array, Array, Array], tuple[Array, Any]]:
    """Maps (T, reference, keys) to moments and, beside them, their derivatives in T: `(keys, 2, 2)`; and aux."""

    def one(temperature: Array, reference: Array, key: PRNGKeyArray) -> tuple[Array, Any]:
        value, pull, aux = jax.vjp(lambda t: make(Moments(reference))(t, key), temperature, has_aux=True)
        return jnp.stack([value, jax.vmap(pull)(jnp.eye(2))[0]], axis=-1), aux

    # One after another: of every step the position is kept.
    return jax.jit(lambda t, reference, keys: jax.lax.map(lambda key: one(t, reference, key), keys))


def specific_heats(key: PRNGKeyArray, options: "Ising", say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Of each temperature: energy, C and dC/dT with errors, beside the exact ones, and dC/dT by the covariance."""
    side, x0 = options.side, jnp.ones(options.side**2)
    bath, n = mh.HeatBath.checkerboard(side, side), _lengths(SWEEPS, options.num_chains // _GROUPS)

    def by_covariance(f: Moments) -> Any:
        expectation = mh.covariance_expectation(log_density, f, bath, x0, **n)
        return lambda t, key: (expectation(t, key), None)

    def through(f: Moments) -> Any:
        coupling = mh.MonotoneSpin()
        return mh_expectation(log_density, f, bath, coupling, x0, **n, num_alternatives=_ALTERNATIVES, has_aux=True)

    routes = _groups(through), _groups(by_covariance)
    rows = []
    for i, t in enumerate(TEMPERATURES):
        keys = jax.random.split(jax.random.fold_in(key, i), _GROUPS)
        at = jnp.asarray(t), jnp.asarray(exact_moments(1 / t, side, side)[0])
        (groups, aux), (covariance, _) = (route(*at, keys) for route in routes)
        row: dict[str, Any] = {"temperature": t} | _estimates(groups, t, side)
        row["slope_by_covariance"] = _estimates(covariance, t, side)["slope"]
        texts = [f"{k} {e['value']:.1f} +- {e['error']:.1f} (exact {e['exact']:.1f})" for k, e in list(row.items())[1:]]
        row["unmet"], row["meeting_99"] = float(jnp.mean(aux.unmet)), float(jnp.nanmean(aux.meeting_times[:, 2]))
        rows.append(row)
        say(f"T = {t}: {', '.join(texts).replace('_', ' ')}; unmet {row['unmet']:.2f}")
    return rows


def _lengths(sweeps: tuple[int, int], num_chains: int) -> dict[str, Any]:
    return {"num_steps": 2 * sum(sweeps), "burn_in": 2 * sweeps[0], "num_chains": num_chains}


def compare_couplings(key: PRNGKeyArray, options: "Ising", say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The variance, a chain, of d<E>/dT in as many sweeps: alternatives that meet the chain, and that do not."""
    side, sites = options.side, options.side**2
    # Of single spins, two positions a step are kept: here at most half a gigabyte.
    num = max(4, min(options.num_chains, 2**28 // (2 * _COMPARED_SWEEPS * sites**2)))
    rows = []
    for t in COMPARED_AT:
        for name, coupling in _COUPLINGS.items():
            single = name != "heat bath"
            proposal = mh.SpinFlip() if single else mh.HeatBath.checkerboard(side, side)
            x0, n = jnp.ones(sites, jnp.int8 if single else None), _COMPARED_SWEEPS * (sites if single else 2)
            expectation = mh_expectation(
                log_density, energy, proposal, coupling, x0, num_steps=2 * n, burn_in=n, num_chains=num, has_aux=True
            )
            gradient = jax.jit(jax.value_and_grad(expectation, has_aux=True))
            found = [gradient(jnp.asarray(t), key) for key in jax.random.split(key, _COMPARED_REPEATS)]
            slope = float(np.mean([slope for _, slope in found]))
            variances = [num * float(aux.gradient_error) ** 2 for (_, aux), _ in found]
            variance, unmet = float(np.mean(variances)), float(np.mean([aux.unmet for (_, aux), _ in found]))
            rows.append(
                {"temperature": t, "coupling": name, "slope": slope, "variance": variance, "unmet": unmet}
                | {"error": (variance / num / _COMPARED_REPEATS) ** 0.5}
                | {"variance_error": float(np.std(variances, ddof=1)) / _COMPARED_REPEATS**0.5}
            )
            say(
                f"T = {t}, {2 * _COMPARED_SWEEPS} sweeps, {name}: variance of d<E>/dT {variance:.3g} +- "
                f"{rows[-1]['variance_error']:.1g} a chain, unmet {unmet:.2f}"
            )
    return rows


def compare_alternatives(key: PRNGKeyArray, side: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The variance of d<E>/dT by the heat bath, a site, and its product with the time, for numbers of alternatives."""
    bath, x0, rows = mh.HeatBath.checkerboard(side, side), jnp.ones(side**2), []
    keys, n = jax.random.split(key, _SLOTS_REPEATS), _lengths(_SLOTS_SWEEPS, 8)
    for t in SLOTS_AT:
        for num in _SLOTS:
            mean = mh_expectation(
                log_density, lambda x: energy(x) / side**2, bath, mh.MonotoneSpin(), x0, **n, num_alternatives=num
            )
            slopes = jax.jit(lambda t, keys, mean=mean: jax.lax.map(lambda key: jax.grad(mean)(t, key), keys))
            jax.block_until_ready(slopes(jnp.asarray(t), keys))  # compiles
            start = time.perf_counter()
            found = np.asarray(slopes(jnp.asarray(t), keys), float)
            variance, seconds = float(found.var(ddof=1)), (time.perf_counter() - start) / _SLOTS_REPEATS
            rows.append(
                {"temperature": t, "alternatives": num, "variance": variance, "work": variance * seconds}
                | {"slope": float(found.mean()), "error": (variance / _SLOTS_REPEATS) ** 0.5}
                | {"exact": exact_heat(t, side)[0] / side**2}
            )
            say(
                "T = {temperature}, {alternatives} alternatives: d<E>/dT {slope:.3f} +- {error:.3f} a site (exact "
                "{exact:.3f}), variance {variance:.2g}, times seconds {work:.2g}".format(**rows[-1])
            )
    return rows


def ascend(key: PRNGKeyArray, side: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """From T = 6 to the largest specific heat by Adam, a few runs at once, by both gradients."""
    sites, exact, rows = side**2, maximum(side)["temperature"], []
    f = Moments(jnp.asarray(-(2**0.5) * sites))  # the infinite lattice, where C is largest
    what, x0 = (log_density, f, mh.HeatBath.checkerboard(side, side)), jnp.ones(sites)
    n = _lengths(RUN_SWEEPS, _RUN_CHAINS // 2)
    through = mh_expectation(*what, mh.MonotoneSpin(), x0, **n, num_alternatives=_ALTERNATIVES)
    plain = mh.covariance_expectation(*what, x0, **n)
    for name, expectation in {"through the chain": through, "covariance": plain}.items():

        def one(t: Array, keys: Array, expectation: Any = expectation) -> Array:
            return heat(t, jax.vmap(lambda key: expectation(t, key))(keys), sites) / sites

        def objective(temperatures: Array, key: PRNGKeyArray, one: Any = one) -> Array:
            # Adam goes by coordinates: of a sum, each run is by itself.
            return jnp.sum(jax.vmap(one)(temperatures, jax.random.split(key, (_RUNS, 2))))

        adam, path = optax.adam(optax.cosine_decay_schedule(0.05, ITERATIONS), b2=0.99), [[_START] * _RUNS]
        counts = np.unique(np.linspace(0, ITERATIONS, 13).astype(int)).tolist()
        with tempfile.TemporaryDirectory() as folder:
            settings: dict[str, Any] = {"window": 10, "num_evaluations": 2, "checkpoint": folder, "progress": False}
            for count in counts[1:]:  # a run that is gone on with is the run: so its path is seen
                trained = fit(key, objective, jnp.full(_RUNS, _START), adam, count, **settings)
                path.append(np.asarray(trained.last_params, float).tolist())
        mean, error = float(np.mean(path[-1])), float(np.std(path[-1], ddof=1) / _RUNS**0.5)
        row = {"gradient": name, "iterations": counts, "temperatures": path, "temperature": mean, "error": error}
        rows.append(row | {"z": (mean - exact) / error})
        say(f"ascent, {name}: T = {mean:.3f} +- {error:.3f} after {ITERATIONS} iterations (exact {exact:.3f})")
    return rows


def draw(result: dict[str, Any]) -> Figure:
    """Four panels: the specific heat, its derivative, the variances of couplings, and the ascents."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    side, at = result["side"], np.array([row["temperature"] for row in result["curve"]])
    fine = np.linspace(at[0], at[-1], 120)
    exact = np.array([exact_heat(t, side) for t in fine])
    for panel, column in zip(panels, exact.T):
        panel.plot(fine, column, color="black", lw=1.2, label="exact (Kaufman)")
    marks = {"specific_heat": (0, "C0o", "estimated"), "slope": (1, "C0o", "through the chain")}
    for name, (panel, mark, label) in (marks | {"slope_by_covariance": (1, "C1s", "covariance")}).items():
        values, errors = (np.array([row[name][key] for row in result["curve"]]) for key in ("value", "error"))
        panels[panel].errorbar(at + 0.02 * (mark == "C1s"), values, errors, fmt=mark, ms=4, capsize=3, label=label)
    for i, name in enumerate(_COUPLINGS):
        rows = [row for row in result["couplings"] if row["coupling"] == name]
        x, y, error = ([row[key] for row in rows] for key in ("temperature", "variance", "variance_error"))
        panels[2].errorbar(x, y, error, fmt="o-", ms=5, capsize=3, color=f"C{i}", label=name)
    for i, row in enumerate(result["ascents"]):
        lines = panels[3].plot(row["iterations"], row["temperatures"], color=f"C{i}", lw=1.2)
        lines[0].set_label(row["gradient"])
    best = result["maximum"]["temperature"]
    panels[3].axhline(best, color="black", lw=1, ls="--", label=f"exact, {best:.3f}")
    axes = (
        (f"specific heat, {side} x {side}", "temperature T", "C of the whole lattice"),
        ("its derivative, with one standard error", "temperature T", "dC/dT"),
        (f"gradient of the energy, {2 * _COMPARED_SWEEPS} sweeps", "temperature T", "variance of d<E>/dT, a chain"),
        ("ascent to the largest C", "iteration", "temperature T"),
    )
    for panel, (title, x, y) in zip(panels, axes):
        panel.set(title=title, xlabel=x, ylabel=y)
        panel.legend(frameon=False)
    # An error bar near the critical temperature may be longer than all else.
    low, high = exact[:, 1].min(), exact[:, 1].max()
    panels[1].set_ylim(2 * low - high, 2 * high - low)
    panels[2].set_yscale("log")
    return figure
