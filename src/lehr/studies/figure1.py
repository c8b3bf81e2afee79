"""Figure 1 of the DAIS paper: the gap of the bound on linear regression against the number of steps, and its rates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from lehr.annealer import Annealer
from lehr.annealing import anneal
from lehr.errors import InputError
from lehr.gradient_noise import noise_gap
from lehr.kernels import Hamiltonian
from lehr.linear_regression import LinearRegression, MiniBatchNoise, dais_gap, perfect_gap
from lehr.path import Schedule
from lehr.studies.output import write
from lehr.studies.regression_data import per_datum
from lehr.subsampled import Subsampled

if TYPE_CHECKING:
    from lehr.commands import Figure1

#: step sizes are of order K^-c; the theorem is of c from 1/4 to 1/2
EXPONENTS = (1 / 8, 1 / 4, 1 / 3, 0.4, 1 / 2)
#: name, persistence, batch size, and the step size at K = 10 over the stability limit (noise needs smaller ones)
SETTINGS = (
    ("full refreshment", 0.0, None, 0.95),
    ("persistence 0.9", 0.9, None, 0.95),
    ("batches of 100", 0.0, 100, 0.3),
)
_NUM_DATA, _DIMENSION = 10_000, 10


def figure1(options: "Figure1") -> int:
    """Runs the study, writes figure1.json and figure1.png; returns the exit code."""
    if options.num_chains < 2 or options.max_steps < 1000:
        raise InputError("figure1 needs at least 2 chains and 1,000 steps: give larger numbers")
    console = Console(stderr=True)
    regression = problem(options.seed)
    counts = [k for k in (round(10 ** (i / 2)) for i in range(2, 17)) if k <= options.max_steps]
    curves = [curve(regression, setting, c, counts, options.num_chains) for setting in SETTINGS for c in EXPONENTS]
    result = {
        "num_data": _NUM_DATA,
        "dimension": _DIMENSION,
        "log_evidence": regression.log_evidence,
        "num_chains": options.num_chains,
        "curves": curves,
        "perfect": _perfect(regression, counts),
        "least": least(regression, [k for k in counts[2::2] if k <= 100_000]),
        "predicted": predicted(regression, 1000),
    }
    for line in in_words(result):
        console.print(line, highlight=False, soft_wrap=True)
    write(options.out, "figure1", result, draw(result), to_stdout=options.json)
    return 0


def problem(seed: int) -> LinearRegression:
    """10,000 observations of noise, 10 columns of N(0, 0.01), and theta ~ N(0, I)."""
    rng = np.random.default_rng(seed)
    design = rng.normal(0, 0.1, (_NUM_DATA, _DIMENSION))
    return LinearRegression(design, rng.normal(size=_NUM_DATA))


def step_size(regression: LinearRegression, num_steps: int, c: float, first: float) -> float:
    """Of order K^-c, and `first` times the stability limit at K = 10."""
    limit = 2 / np.sqrt(np.linalg.eigvalsh(regression.precision())[-1])
    return float(first * limit * (num_steps / 10) ** -c)


def curve(
    regression: LinearRegression,
    setting: tuple[str, float, int | None, float],
    c: float,
    counts: Sequence[int],
    num_chains: int,
) -> dict[str, Any]:
    """The gap at every number of steps, simulated at some, and the slope that it ends with."""
    name, persistence, batch_size, first = setting
    noise = None if batch_size is None else MiniBatchNoise.of(regression, batch_size)
    # Each number of steps is a program to compile, and batches take long to draw.
    simulated = (100, 1000, 10_000) if batch_size is None else (100, 1000)
    exact, dots = [], []
    # A step with batches is a hundred times the work of one direction at a time.
    for k in (k for k in counts if noise is None or k <= 100_000):
        path, size = np.linspace(0, 1, k + 1), step_size(regression, k, c, first)
        gap = dais_gap(regression, path, size, persistence=persistence, noise=noise)
        exact.append(
            {
                "num_steps": k,
                "gap": gap.total,
                "mean_lag": gap.mean_lag,
                "covariance_lag": gap.covariance_lag,
                "kinetic": gap.kinetic,
            }
        )
        if k in simulated:
            found = _simulated(regression, k, size, persistence, batch_size, num_chains)
            gaps = regression.log_evidence - found
            error = gaps.std(ddof=1) / num_chains**0.5
            dots.append({"num_steps": k, "gap": gaps.mean(), "error": error, "z": (gaps.mean() - gap.total) / error})
    slope, error = _slope(exact[-5:])
    theory = 1 - 2 * c if noise is not None else 2 * c - 1 if c >= 0.25 else None
    found = {"setting": name, "c": c, "theory": theory, "slope": slope, "slope_error": error}
    return found | {"exact": exact, "simulated": dots}


def _simulated(
    regression: LinearRegression, num_steps: int, size: float, persistence: float, batch_size: int | None, num: int
) -> np.ndarray:
    """Log weights of `lehr.anneal`."""
    problem = regression.problem
    target = problem.log_target if batch_size is None else in_batches(regression, batch_size)
    annealer = Annealer(problem.base, Schedule.linear(num_steps), Hamiltonian(size, persistence))
    return np.asarray(anneal(jax.random.key(num_steps), annealer, target, num).log_weights, np.float64)


def in_batches(regression: LinearRegression, batch_size: int) -> Subsampled:
    """The regression as a sum over data."""
    prior = regression.problem.base.log_prob
    data = regression.design.astype(np.float32), regression.y.astype(np.float32)
    return Subsampled(prior, per_datum, data, batch_size, check=False)


def _slope(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Of log gap over log K, by least squares, with the error that the curve's bend makes."""
    x, y = np.log([row["num_steps"] for row in rows]), np.log([row["gap"] for row in rows])
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(covariance[0, 0] ** 0.5)


def _perfect(regression: LinearRegression, counts: Sequence[int]) -> dict[str, Any]:
    rows = [{"num_steps": k, "gap": perfect_gap(regression, np.linspace(0, 1, k + 1))} for k in counts]
    slope, error = _slope(rows[-5:])
    return {"theory": -1.0, "slope": slope, "slope_error": error, "exact": rows}


def least(regression: LinearRegression, counts: Sequence[int]) -> list[dict[str, Any]]:
    """With batches and without, the least gap over step sizes: what no scheme of one size for all steps can beat."""
    noise = MiniBatchNoise.of(regression, 100)
    sizes = step_size(regression, 10, 0.0, 1.0) * np.geomspace(3e-4, 0.1, 8)
    rows = []
    for k in counts:
        path = np.linspace(0, 1, k + 1)
        gaps = {}
        for name, which in (("gap", noise), ("without_noise", None)):
            gaps[name] = min(dais_gap(regression, path, size, noise=which).total for size in sizes)
        rows.append({"num_steps": k} | gaps)
    return rows


def predicted(regression: LinearRegression, num_steps: int) -> dict[str, Any]:
    """The gap that batches of 100 make, as `lehr.noise_gap` measures it, beside the exact one, for c = 1/2."""
    size, path = step_size(regression, num_steps, 0.5, 0.3), np.linspace(0, 1, num_steps + 1)
    annealer = Annealer(regression.problem.base, Schedule.linear(num_steps), Hamiltonian(size))
    gap = noise_gap(jax.random.key(0), annealer, in_batches(regression, 100))
    noise = MiniBatchNoise.of(regression, 100)
    exact = dais_gap(regression, path, size, noise=noise).total - dais_gap(regression, path, size).total
    return {"num_steps": num_steps, "predicted": gap.value, "error": gap.error, "exact": exact}


def in_words(result: dict[str, Any]) -> list[str]:
    """The slopes, the floor and the prediction, a line each."""
    lines = []
    for row in result["curves"]:
        z = max((abs(dot["z"]) for dot in row["simulated"]), default=0.0)
        theory = "no theorem" if row["theory"] is None else f"theory {row['theory']:+.3f}"
        slope = f"slope {row['slope']:+.3f} +- {row['slope_error']:.3f} ({theory})"
        lines.append(f"{row['setting']}, c = {row['c']:.3f}: {slope}, largest |z| of the simulation {z:.1f}")
    perfect = result["perfect"]
    lines.append(f"perfect transitions: slope {perfect['slope']:+.3f} +- {perfect['slope_error']:.3f} (theory -1)")
    floors = ", ".join(f"{row['gap']:.0f} (without noise {row['without_noise']:.2f})" for row in result["least"])
    lines.append(f"least gap over step sizes with batches of 100, as K grows: {floors}")
    told = result["predicted"]
    lines.append(f"gap by batches: predicted {told['predicted']:.1f} +- {told['error']:.1f}, exact {told['exact']:.1f}")
    return lines


def draw(result: dict[str, Any]) -> Figure:
    """A panel a setting: the gap against K, exact, simulated, and the slope of the theorem."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, len(SETTINGS))
    for panel, (name, _, batch_size, _) in zip(panels, SETTINGS):
        for i, row in enumerate(row for row in result["curves"] if row["setting"] == name):
            _draw_curve(panel, row, f"C{i}")
        if batch_size is None:
            rows = result["perfect"]["exact"]
            panel.plot(*_points(rows), ":", color="black", label="perfect transitions")
        else:
            panel.plot(*_points(result["least"]), "s", mfc="none", color="black", label="best step size")
        panel.set(title=name, xscale="log", yscale="log", xlabel="steps K")
    panels[0].set_ylabel("log Z - bound (nats)")
    handles = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw_curve(axes: Axes, row: dict[str, Any], colour: str) -> None:
    ks, gaps = _points(row["exact"])
    axes.plot(ks, gaps, "-", color=colour, lw=1.4, label=f"c = {row['c']:.3g}")
    dots = row["simulated"]
    if dots:
        errors = [dot["error"] for dot in dots]
        axes.errorbar(*_points(dots), yerr=errors, fmt="o", ms=4, color=colour, capsize=2)
    if row["theory"] is not None:
        axes.plot(ks[3:], gaps[-1] * (ks[3:] / ks[-1]) ** row["theory"], "--", color=colour, lw=0.9)


def _points(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row["num_steps"] for row in rows]), np.array([row["gap"] for row in rows])
