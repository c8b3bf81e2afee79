"""The bound against the number of gradients, from the base that others use and from lehr's own, beside their numbers.

    python -m benchmarks.published [--targets brownian ...] [--methods ULA MCD UHA LDVI best] [--gradients 8 16 ...]
        [--seeds 3] [--iterations 2000] [--json published.json] [--plot published.png] [--show]

Each method starts from the mean-field Gaussian that maximises its own bound (the same for all four), is tuned
(`lehr.tune`), and trained (`lehr.fit`): base, schedule, step sizes by step and dimension, persistence, and the reverse
drift where there is one. With `--refine` a row starts from the trained one with half the steps instead, which is to be
run in the same call. `best` is LDVI from the base that `lehr.evidence` would take, trained further by
its own bound. The score is the gap to the verified log Z of the mean of log w over fresh chains, with its error.

K counts gradients of the target along one chain: K drift-kick-drift steps, or K - 1 Langevin steps, which need the
gradient at both ends. The published rows count steps; their UHA and LDVI take two gradients a step.

The published numbers are those of `shared/specs`: the printed outputs of the notebook of Vargas, Padhy, Blessing,
Nuesken 2024 (CMCD), and, marked r, recalled from Geffner, Domke 2023 and not verified again.

With `--json` every row is written to the file as it ends, and what is there already is not run again.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flowjax.bijections import Affine, TriangularAffine
from flowjax.distributions import Normal, StandardNormal
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from paramax import non_trainable, unwrap
from rich.console import Console
from rich.table import Column, Table

import lehr
from benchmarks.leaderboard import Rows
from benchmarks.targets import target
from lehr.bases import find_modes
from lehr.fitting import find_base
from lehr.flows import near_identity
from lehr.kernels import network_drift
from lehr.objectives import elbo_stl
from lehr.path import Problem
from lehr.transport import PulledBack, gaussian_map

GRADIENTS = (8, 16, 32, 64, 128, 256)
METHODS = ("ULA", "MCD", "UHA", "LDVI", "best")
TARGETS = ("brownian", "ionosphere", "sonar", "seeds", "lorenz")

#: K = 8 ... 256, steps; None where nothing is printed
PUBLISHED: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("brownian", "ULA"): (-2.03, -1.55, -1.08, -0.73, None, -0.05),
    ("brownian", "MCD"): (-1.45, -0.90, -0.45, -0.12, 0.25, 0.48),
    ("brownian", "UHA"): (-1.63, -1.03, -0.46, 0.00, 0.37, 0.61),
    ("brownian", "LDVI"): (-1.24, -0.29, 0.07, 0.50, 0.75, 0.85),
    ("brownian", "CMCD"): (-0.75, -0.21, 0.15, 0.38, 0.58, 0.72),
    ("brownian", "CMCD-UHA"): (-0.62, -0.11, 0.28, 0.53, 0.71, 0.83),
    ("seeds", "UHA"): (-74.9, -74.6, -74.2, -74.1, -73.8, -73.7),
    ("seeds", "LDVI"): (-74.9, -74.5, -74.1, -73.9, -73.7, -73.6),
    ("seeds", "CMCD-UHA"): (-74.53, -74.22, -73.96, -73.78, -73.68, None),
    ("ionosphere", "UHA"): (-115.6, -114.4, -113.4, -112.8, -112.3, -112.1),
    ("ionosphere", "LDVI"): (-114.4, -113.1, -112.4, -112.1, -111.9, -111.7),
    ("sonar", "UHA"): (-120.1, -116.8, -113.9, -111.9, -110.6, -109.7),
    ("sonar", "LDVI"): (-116.3, -112.6, -110.6, -109.7, -109.1, -108.9),
}

_BATCH, _BASE_ITERATIONS, _BASE_BATCH = 16, 3000, 32
#: of the search for a base
_FIND_GRADIENTS, _FLOW_LAYERS = 100_000, 4


class LogWeight(eqx.Module):
    """The sum over seeds of the mean log weight of a batch of chains: what is maximised."""

    #: with a leading axis of seeds, or one for all
    log_targets: Any
    same: bool = eqx.field(static=True)

    def __call__(self, annealers: lehr.Annealer, key: Any) -> Any:
        def bound(annealer, log_target, key):
            return jnp.mean(lehr.anneal(key, annealer, log_target, _BATCH, memory="store").log_weights)

        keys = jax.random.split(key, annealers.schedule.logits.shape[0])
        axes = (eqx.if_array(0), None if self.same else eqx.if_array(0), 0)
        return jnp.sum(eqx.filter_vmap(bound, in_axes=axes)(annealers, self.log_targets, keys))


class BaseBound(eqx.Module):
    """The bound of a base alone."""

    log_target: Any

    def __call__(self, base: Any, key: Any) -> Any:
        return elbo_stl(base, self.log_target, key, num_samples=_BASE_BATCH)


class PulledBackBound(eqx.Module):
    """The bound of a standard base under a bijection."""

    log_target: Any
    base: Any

    def __call__(self, bijection: Any, key: Any) -> Any:
        density, z = PulledBack(self.log_target, unwrap(bijection)), self.base.sample(key, (_BASE_BATCH,))
        return jnp.mean(jax.vmap(lambda z: density(z) - self.base.log_prob(z))(z))


def optimiser(rate: float, num_iterations: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, num_iterations // 20, num_iterations)
    return optax.chain(optax.clip_by_global_norm(30.0), optax.adam(schedule, b2=0.99))


def of_each(single: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser of its own for each entry of the leading axis."""
    return optax.GradientTransformation(
        jax.vmap(single.init), lambda updates, state, params=None: jax.vmap(single.update)(updates, state)
    )


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *trees)


def alike(trees: list[Any]) -> bool:
    """Whether they can be stacked."""
    arrays = [eqx.filter(tree, eqx.is_array) for tree in trees]
    shapes = [(jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]) for tree in arrays]
    return all(shape == shapes[0] for shape in shapes)


@functools.cache
def mean_field(name: str) -> tuple[Problem, str, int]:
    """The problem in the coordinates of the best mean-field Gaussian, and the gradients that took."""
    problem = target(name).problem
    starts = problem.base.sample(jax.random.key(0), (4,))
    modes = find_modes(problem.log_target, starts)
    mode = modes.modes[0]
    scale = np.sqrt(1 / np.diag(np.linalg.inv(mode.covariance)))
    base = Normal(jnp.asarray(mode.loc, jnp.float32), jnp.asarray(scale, jnp.float32))
    trained = lehr.fit(
        jax.random.key(1),
        BaseBound(problem.log_target),
        base,
        optimiser(1e-2, _BASE_ITERATIONS),
        _BASE_ITERATIONS,
        progress=False,
    ).params
    density = PulledBack(problem.log_target, unwrap(gaussian_map(trained.loc, trained.scale)))
    gradients = modes.num_gradients + _BASE_ITERATIONS * _BASE_BATCH
    return Problem(StandardNormal(problem.position.shape), density), "mean field", gradients


@functools.cache
def best_base(name: str, seed: int) -> tuple[Problem, str, int]:
    """A full-rank Gaussian or a coupling flow, whichever has the best bound.

    They start at the base of `lehr.evidence`, which covers the target, and are trained by their own bounds, which want
    to be inside of it; one more flow starts at the mean-field Gaussian, for a search that ended at a narrow mode.
    """
    key_find, *keys = jax.random.split(jax.random.key(seed), 4)
    fitted = find_base(key_find, target(name).problem, max_gradients=_FIND_GRADIENTS)
    problem, bijection = fitted.best.problem, fitted.best.bijection
    (dimension,) = problem.position.shape
    if "flow" in fitted.best.name:
        flow = target(name).problem.log_target, jax.tree.map(_fixed, bijection, is_leaf=_is_affine)
    else:
        flow = problem.log_target, near_identity(dimension, _FLOW_LAYERS, problem.position.dtype)
    gaussian = problem.log_target, gaussian_map(jnp.zeros(dimension), jnp.eye(dimension))
    own, _, own_gradients = mean_field(name)
    other = own.log_target, near_identity(dimension, _FLOW_LAYERS, problem.position.dtype)
    starts = ("Gaussian", 1e-2, gaussian), ("coupling flow", 2e-3, flow), ("coupling flow", 2e-3, other)
    found = []
    for key, (kind, rate, (density, start)) in zip(keys, starts):
        objective, steps = PulledBackBound(density, problem.base), optimiser(rate, _BASE_ITERATIONS)
        trained = lehr.fit(key, objective, start, steps, _BASE_ITERATIONS, progress=False)
        bound = trained.bound.value
        found.append((bound, f"{kind}, bound {bound:.2f}", PulledBack(density, unwrap(trained.params))))
    _, kind, density = max(found, key=lambda candidate: candidate[0])
    gradients = fitted.num_gradients + own_gradients + len(found) * _BASE_ITERATIONS * _BASE_BATCH
    return Problem(problem.base, density), kind, gradients


def _is_affine(node: Any) -> bool:
    return isinstance(node, (Affine, TriangularAffine))


def _fixed(node: Any) -> Any:
    return non_trainable(node) if _is_affine(node) else node


def annealer(method: str, problem: Problem, num_gradients: int) -> lehr.Annealer:
    """Everything trainable: a mean-field correction of the base, and step sizes by step and dimension."""
    (dimension,) = problem.position.shape
    base = Normal(jnp.zeros(dimension), jnp.ones(dimension))
    langevin = method in ("ULA", "MCD")
    num_steps = num_gradients - 1 if langevin else num_gradients
    sizes = jnp.full((num_steps, dimension), 0.1)
    kernel: Any = lehr.Langevin(sizes) if langevin else lehr.Hamiltonian(sizes, np.full((num_steps, 1), 0.8))
    if method in ("MCD", "LDVI"):
        drift = network_drift(jax.random.key(5), dimension, momentum=not langevin, width=32, linear=True)
        kernel = lehr.LearnedReverse(kernel, drift)
    return lehr.Annealer(base, lehr.Schedule.linear(num_steps), kernel)


def refined(key: Any, annealer: lehr.Annealer, problem: Problem, num_steps: int) -> tuple[lehr.Annealer, int]:
    """One with each step of a trained annealer divided in two, to `num_steps` of them, and the gradients that it took.

    What that asks of step sizes, persistence and drift is found on a small grid, by the bound.
    """
    old = annealer.schedule.num_steps
    rows = np.arange(num_steps) * old // num_steps
    increments = annealer.schedule.logits[rows]
    learned = isinstance(annealer.kernel, lehr.LearnedReverse)
    best: Any = None
    grid = list(itertools.product((1.0, 0.84, 0.71), (1.0, 0.7, 0.5), (1.0, 0.5) if learned else (1.0,)))
    for size, power, drift in grid:

        def changed(kernel: Any, size: float = size, power: float = power) -> Any:
            log_sizes = kernel.log_step_size[rows] + math.log(size)
            kernel = eqx.tree_at(lambda k: k.log_step_size, kernel, log_sizes)
            if getattr(kernel, "logit_persistence", None) is None:
                return kernel
            gamma = kernel.persistence[rows] ** power
            return eqx.tree_at(lambda k: k.logit_persistence, kernel, jnp.log(gamma) - jnp.log1p(-gamma))

        kernel: Any = annealer.kernel
        if learned:
            weaker = eqx.tree_at(
                lambda d: (d.network.layers[-1], d.linear),
                kernel.drift,
                replace_fn=lambda part, drift=drift: jax.tree.map(lambda leaf: drift * leaf, part),
            )
            kernel = lehr.LearnedReverse(changed(kernel.kernel), weaker)
        else:
            kernel = changed(kernel)
        candidate = lehr.Annealer(annealer.base, lehr.Schedule(increments), kernel)
        bound = np.nan_to_num(_bound(key, candidate, problem, 500).mean(), nan=-np.inf)
        if best is None or bound > best[0]:
            best = bound, candidate
    return best[1], len(grid) * 500 * len(increments)


def measure(
    method: str,
    problems: list[Problem],
    num_gradients: int,
    seeds: list[int],
    num_iterations: int,
    before: list[lehr.Annealer] | None = None,
    rate: float = 1e-2,
) -> tuple[list[dict[str, Any]], list[lehr.Annealer]]:
    """Tunes, trains and scores an annealer for each seed, all at once where their problems are alike.

    With `before`, trained annealers of half as many steps, these are refined in place of tuning.

    The seeds have keys, optimisers and updates of their own, so that training them together changes no number but the
    iterate that `lehr.fit` takes in the end, and how much it skips.
    """
    same = all(problem is problems[0] for problem in problems)
    if not same and not alike(problems):
        each = [
            measure(method, [p], num_gradients, [seed], num_iterations, None if before is None else [before[i]], rate)
            for i, (p, seed) in enumerate(zip(problems, seeds))
        ]
        return [rows[0] for rows, _ in each], [trained[0] for _, trained in each]
    started = time.perf_counter()
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in seeds]
    if before is None:
        starts = [
            lehr.tune(key[0], annealer(method, problem, num_gradients), problem.log_target)
            for key, problem in zip(keys, problems)
        ]
    else:
        num_steps = annealer(method, problems[0], num_gradients).schedule.num_steps
        starts = [refined(key[0], coarse, problem, num_steps) for key, coarse, problem in zip(keys, before, problems)]
    trained = lehr.fit(
        keys[0][1],
        LogWeight(problems[0].log_target if same else stacked([p.log_target for p in problems]), same),
        stacked([start for start, _ in starts]),
        # Short runs start where tuning ended, and stay near.
        of_each(optimiser(min(1e-2 if before is None else rate, 1e-5 * num_iterations), num_iterations)),
        num_iterations,
        progress=False,
    )
    rows, chosen = [], []
    for i, (seed, key, problem, (start, spent)) in enumerate(zip(seeds, keys, problems, starts)):
        own = jax.tree.map(lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf, trained.params)  # noqa: B023
        # Short training may lose what tuning had: chosen on chains of its own, and scored on others.
        key_choose, key_score = jax.random.split(key[2])
        better = max((start, own), key=lambda which: _bound(key_choose, which, problem).mean())
        scores = {}
        for stage, which in (("tuned", start), ("bound", better)):
            log_weights = _bound(key_score, which, problem)
            scores[stage], scores[stage + "_error"] = log_weights.mean(), log_weights.std() / len(log_weights) ** 0.5
        rows.append({"seed": seed} | scores | {"training": num_iterations * _BATCH * num_gradients + spent})
        chosen.append(better)
    common = {
        "skipped": int(trained.num_skipped),
        "warnings": list(trained.warnings),
        "seconds": (time.perf_counter() - started) / len(seeds),
    }
    return [row | common for row in rows], chosen


def _bound(key: Any, annealer: lehr.Annealer, problem: Problem, num_particles: int = 4000) -> np.ndarray:
    """Log weights, whose mean is the bound."""
    return np.asarray(lehr.anneal(key, annealer, problem.log_target, num_particles).log_weights, np.float64)


def cell(rows: list[dict[str, Any]], truth: float) -> str:
    """Over seeds: the mean bound with its standard error, and the gap."""
    bounds = np.array([row["bound"] for row in rows])
    error = max(float(np.mean([row["bound_error"] for row in rows])), bounds.std() if len(bounds) > 1 else 0.0)
    return f"{bounds.mean():.2f} +- {error / len(bounds) ** 0.5:.2f} ({truth - bounds.mean():.2f})"


def show(console: Console, rows: Rows, names: list[str], gradients: list[int]) -> None:
    for name in names:
        truth = target(name).log_evidence
        table = Table("method", *(Column(f"{k}", justify="right", no_wrap=True) for k in gradients))
        table.title = f"{name}: bound (gap), log Z = {truth:.3f}"
        for method in METHODS:
            found = [
                [r for r in rows.rows if (r["target"], r["method"], r["gradients"]) == (name, method, k)]
                for k in gradients
            ]
            if any(found):
                table.add_row(f"lehr {method}", *(cell(group, truth) if group else "-" for group in found))
        for (of, method), values in PUBLISHED.items():
            if of == name:
                by_k: dict[int, float | None] = dict(zip(GRADIENTS, values))
                shown = (by_k.get(k) for k in gradients)
                table.add_row(
                    f"published {method}", *("-" if v is None else f"{v:.2f} ({truth - v:.2f})" for v in shown)
                )
        console.print(table)


def draw(path: Path, rows: Rows, names: list[str]) -> None:
    """The gap against the number of gradients, a panel a target: lehr solid, published dashed."""
    colours = {method: f"C{i}" for i, method in enumerate((*METHODS, "CMCD", "CMCD-UHA"))}
    num_columns = min(3, len(names) + 1)
    num_rows = -(-(len(names) + 1) // num_columns)  # one panel more, for the legend
    figure = Figure(figsize=(4.2 * num_columns, 3.8 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, name in zip(axes, names):
        truth = target(name).log_evidence
        for method in METHODS:
            mine = [row for row in rows.rows if (row["target"], row["method"]) == (name, method)]
            ks = sorted({row["gradients"] for row in mine})
            gaps = [truth - np.mean([row["bound"] for row in mine if row["gradients"] == k]) for k in ks]
            if ks:
                axis.plot(ks, np.maximum(gaps, 1e-3), "o-", ms=4, color=colours[method], label=f"lehr {method}")
        for (of, method), values in PUBLISHED.items():
            shown = [(k, truth - v) for k, v in zip(GRADIENTS, values) if of == name and v is not None]
            if shown:
                axis.plot(*zip(*shown), "x--", ms=4, lw=1, color=colours[method], label=f"published {method}")
        axis.set(title=name, xlabel="gradients a chain (published: steps)", xscale="log", yscale="log")
        axis.set_xticks(GRADIENTS, [str(k) for k in GRADIENTS])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_ylabel("log Z - bound (nats)")
    for axis in axes[len(names) :]:
        axis.axis("off")
    entries = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    axes[len(names)].legend(entries.values(), entries, loc="center", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--gradients", nargs="+", type=int, choices=GRADIENTS, default=list(GRADIENTS), metavar="K")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--iterations", type=int, default=2000, help="of training, for each row")
    parser.add_argument("--refine", action="store_true", help="start from the row with half the steps")
    parser.add_argument("--rate", type=float, default=1e-2, help="largest learning rate of refined rows")
    parser.add_argument("--json", type=Path, help="results are kept here, and not measured again")
    parser.add_argument("--plot", type=Path, help="a PNG of the gaps")
    parser.add_argument("--show", action="store_true", help="measure nothing: show what is in the file")
    options = parser.parse_args()

    console = Console()
    console.width = max(console.width, 170)
    rows = Rows(options.json, ("target", "method", "gradients", "seed", "iterations"))
    for name in options.targets if not options.show else []:
        for method in options.methods:
            bases: dict[int, tuple[Problem, str, int]] = {}
            before: dict[int, lehr.Annealer] = {}
            for k in options.gradients:
                missing = [
                    seed
                    for seed in range(options.seeds)
                    if rows.find(name, method, k, seed, options.iterations) is None
                ]
                if not missing:
                    continue
                for seed in missing:
                    if seed not in bases:
                        bases[seed] = best_base(name, seed) if method == "best" else mean_field(name)
                kind = "LDVI" if method == "best" else method
                coarse = [before[seed] for seed in missing] if all(seed in before for seed in missing) else None
                problems = [bases[seed][0] for seed in missing]
                found, trained = measure(kind, problems, k, missing, options.iterations, coarse, options.rate)
                if options.refine:
                    before = dict(zip(missing, trained))
                for row in found:
                    _, base, fitting = bases[row["seed"]]
                    what = {"target": name, "method": method, "gradients": k, "iterations": options.iterations}
                    what["refined"] = coarse is not None
                    rows.add(what | {"base": base, "fitting": fitting} | row)
                jax.clear_caches()
    show(console, rows, options.targets, options.gradients)
    if options.plot is not None:
        draw(options.plot, rows, options.targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
