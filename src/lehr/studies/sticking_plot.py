"""The picture of `lehr study sticking`."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

#: colour, marker and line of each rule
_STYLE = {
    "plain": ("tab:gray", "s", "-"),
    "STL": ("tab:blue", "o", "-"),
    "STL (biased)": ("tab:blue", "o", ":"),
    "control variate": ("tab:orange", "^", "-"),
    "DReG": ("tab:green", "D", "-"),
}


def draw(result: dict[str, Any]) -> Figure:
    """A column a bound; rows: the variance for either target, and the signal-to-noise for the first."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["setting"] for row in rows))
    kinds = list(dict.fromkeys(row["target"] for row in rows))
    quantities = [*((kind, "variance") for kind in kinds), (kinds[0], "signal_to_noise")]
    figure = Figure(figsize=(2.9 * len(names) + 0.6, 2.9 * len(quantities)), layout="constrained")
    axes = figure.subplots(len(quantities), len(names), squeeze=False)
    handles: dict[str, Any] = {}
    for column, name in enumerate(names):
        for panel, (kind, quantity) in zip(axes[:, column], quantities):
            chosen = [row for row in rows if row["setting"] == name and row["target"] == kind]
            handles |= _draw_panel(panel, chosen, quantity)
            if column == 0:
                what = "variance of the gradient" if quantity == "variance" else "signal-to-noise"
                panel.set_ylabel(f"{kind}\n{what}")
        axes[0, column].set_title(name, fontsize=11)
        axes[-1, column].set_xlabel("iteration")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _draw_panel(axes: Axes, rows: list[dict[str, Any]], quantity: str) -> dict[str, Any]:
    """One line a rule, over iterates at equal distances; returns the handles of the legend."""
    places = list(dict.fromkeys((row["iteration"], row["exact"]) for row in rows))
    handles, zeros = {}, []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        mine = [row for row in rows if row["rule"] == rule]
        values = np.array([np.nan if row[quantity] is None else row[quantity] for row in mine], float)
        error = np.array([row["variance_error"] for row in mine]) if quantity == "variance" else None
        where = [places.index((row["iteration"], row["exact"])) for row in mine]
        colour, marker, line = _STYLE[rule]
        handles[rule] = axes.errorbar(
            where, values, yerr=error, markersize=5, linewidth=1.3, color=colour, marker=marker, linestyle=line
        )
        zeros += [(place, rule) for place, value in zip(where, values) if value == 0]
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    if zeros:
        # A logarithmic axis has no place for what is exactly zero.
        text = f"{' and '.join(rule for _, rule in zeros)}: 0"
        place = (zeros[0][0], 0.02)
        axes.annotate(
            text, place, xycoords=("data", "axes fraction"), rotation=90, ha="center", va="bottom", fontsize=8
        )
    axes.set_xticks(range(len(places)), ["exact" if exact else f"{iteration:,}" for iteration, exact in places])
    axes.tick_params(axis="x", labelsize=8, rotation=45)
    axes.spines[["top", "right"]].set_visible(False)
    return handles
