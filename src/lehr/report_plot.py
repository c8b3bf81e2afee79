"""Pictures: of an evidence estimate (what it started from, how it went, where it ended), and of a comparison."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from lehr.comparison import Comparison
from lehr.report import Evidence, in_words

_LOWER, _UPPER, _BAND = "C0", "C3", "0.9"


def draw_evidence(evidence: Evidence, path: str | Path | None = None) -> Figure:
    """Four panels: barrier and schedule, acceptance, the populations' estimates, the rounds with the bracket.

    Arguments:
        evidence: the result of an estimation.
        path: where to write the picture, in the format of its suffix; not written if None.
    """
    # Figure itself, not pyplot: no global state, no display.
    figure = Figure(figsize=(10.0, 7.2), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    (barrier, acceptance), (populations, rounds) = figure.subplots(2, 2)
    _draw_barrier(barrier, evidence)
    _draw_acceptance(acceptance, evidence)
    _draw_populations(populations, evidence)
    _draw_rounds(rounds, evidence)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    state = "" if evidence.converged else "   NOT CONVERGED"
    text = in_words(float(evidence.log_evidence), float(evidence.standard_error))
    figure.suptitle(f"log evidence {text} nats{state}")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def draw_comparison(comparison: Comparison, path: str | Path | None = None) -> Figure:
    """Two panels, the best model on top: log evidences with their 95 % brackets, and posterior probabilities.

    Arguments:
        comparison: of models.
        path: where to write the picture, in the format of its suffix; not written if None.
    """
    models = comparison.models
    figure = Figure(figsize=(10.0, 1.6 + 0.45 * len(models)), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    left, right = figure.subplots(1, 2, sharey=True)
    place = np.arange(len(models))
    for at, model in zip(place, models):
        low, high = (end if np.isfinite(end) else model.log_evidence for end in model.bracket)
        left.plot([low, high], [at, at], color=_LOWER, linewidth=4, alpha=0.45, solid_capstyle="butt")
        left.plot(model.log_evidence, at, "|", color=_LOWER, markersize=14)
        right.plot(model.probability_interval, [at, at], color="0.2", linewidth=1.5)
    right.barh(place, [model.probability for model in models], height=0.5, color=_LOWER, alpha=0.45)
    left.set_yticks(place, [model.name + ("" if model.converged else "\n(not converged)") for model in models])
    left.set(xlabel="log evidence with its 95 % bracket, nats", ylim=(len(models) - 0.5, -0.5))
    left.ticklabel_format(axis="x", useOffset=False)
    left.xaxis.set_major_locator(MaxNLocator(5))
    right.set(xlabel="posterior probability with its 95 % interval", xlim=(0, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _draw_barrier(axes: Axes, evidence: Evidence) -> None:
    betas, barrier = np.asarray(evidence.betas), np.asarray(evidence.barrier)
    axes.plot(betas, barrier, color=_LOWER, linewidth=1)
    axes.plot(betas, barrier, "|", color=_LOWER, markersize=9, label=f"temperatures, K = {len(betas) - 1}")
    axes.set(ylabel="barrier from the base", title=f"path and schedule: barrier {barrier[-1]:.2f}", ylim=(0, None))
    axes.legend(loc="lower right")
    _set_temperature_axis(axes, betas)


def _draw_acceptance(axes: Axes, evidence: Evidence) -> None:
    betas, acceptance = np.asarray(evidence.betas), np.asarray(evidence.acceptance)
    axes.plot(betas[1:], acceptance, color=_LOWER, marker=".", markersize=5)
    axes.set(ylabel="mean acceptance probability", ylim=(0, 1.03), title="acceptance by temperature")
    _set_temperature_axis(axes, betas)


def _draw_populations(axes: Axes, evidence: Evidence) -> None:
    """Both estimates of each population: they overlap if log Z is between them."""
    centre = float(evidence.log_evidence)
    estimates = [("forward", evidence.forward, _LOWER), ("backward", evidence.backward, _UPPER)]
    values = [np.asarray(value, np.float64) for _, value, _ in estimates]
    # Relative to the estimate: ticks such as -12345.678 hide what they differ in.
    values = [value[np.isfinite(value)] - centre for value in values]
    both = np.concatenate(values)
    if len(both) and np.isfinite(centre):
        bins = np.histogram_bin_edges(both, bins=int(np.clip(2 * np.sqrt(len(both)), 6, 40)))
        for (name, _, colour), value in zip(estimates, values):
            axes.hist(value, bins=bins.tolist(), color=colour, alpha=0.45, label=name)
        for bound, colour, name in ((evidence.lower, _LOWER, "lower"), (evidence.upper, _UPPER, "upper")):
            axes.axvline(bound.value - centre, color=colour, linestyle="--", linewidth=1, label=f"{name}, all together")
        axes.legend(fontsize="small")
    axes.set(
        xlabel=f"log Z by each population, nats from {centre:.2f}",
        ylabel="populations",
        title=f"estimates of the populations, R = {len(evidence.forward)}",
    )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _draw_rounds(axes: Axes, evidence: Evidence) -> None:
    """Estimates with their errors as the work doubled, and the bracket at the end."""
    low, high = evidence.bracket
    if np.isfinite(low) and np.isfinite(high):
        axes.axhspan(low, high, color=_BAND, label="95 % bracket")
    gradients = np.array([round.num_gradients for round in evidence.rounds], np.float64)
    upper_name = "upper" if evidence.exact_upper else "upper (approximate)"
    for side, colour, name in (("lower", _LOWER, "lower = log evidence"), ("upper", _UPPER, upper_name)):
        value = np.array([getattr(round, side).value for round in evidence.rounds], np.float64)
        error = np.array([getattr(round, side).error for round in evidence.rounds], np.float64)
        known = np.isfinite(value)
        axes.plot(gradients[known], value[known], color=colour, marker="o", markersize=4, label=name)
        known &= np.isfinite(error)
        axes.fill_between(
            gradients[known], (value - error)[known], (value + error)[known], color=colour, alpha=0.25, linewidth=0
        )
    axes.set(xlabel="gradients of the target, so far", ylabel="log Z, nats", title="rounds, ± one standard error")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(fontsize="small")


def _set_temperature_axis(axes: Axes, betas: np.ndarray) -> None:
    """Linear, or logarithmic down to the first step where that is short: from a wide prior most steps are near 0."""
    axes.set_xlabel("inverse temperature")
    short = 0 < betas[1] < 0.01
    axes.set_xlim(0, 1.1 if short else 1.02)
    if short:
        axes.set_xscale("symlog", linthresh=float(betas[1]), linscale=0.5)
        lowest = int(np.ceil(np.log10(betas[1]) - 1e-6))
        every = -(-(1 - lowest) // 6)
        decades = list(range(0, lowest - 1, -every))
        axes.set_xticks([0, *(10.0**n for n in decades)], ["0", *(f"$10^{{{n}}}$" if n else "1" for n in decades)])
        axes.minorticks_off()
