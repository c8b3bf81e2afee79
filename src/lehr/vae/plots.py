"""The pictures of a run. Each function draws one and writes one PNG."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw_bounds(path: Path, metrics: list[dict[str, Any]], objective: str) -> None:
    """The bound on train and test over the epochs."""
    figure, axes = _figure(6.4, 4.0)
    epochs = [row["epoch"] for row in metrics]
    # The first epochs fall by a hundred nats; the rest is what is to be seen.
    for name, label in (("train_bound", "train, mean over the epoch"), ("test_bound", "test, fixed binarisation")):
        values = [row[name] for row in metrics]
        axes.plot(epochs, values, label=label, marker="." if len(epochs) < 40 else None)
    later = [row[name] for row in metrics[len(metrics) // 20 :] for name in ("train_bound", "test_bound")]
    later = [value for value in later if np.isfinite(value)]
    if len(metrics) > 20 and later:
        margin = 0.05 * (max(later) - min(later)) + 1e-3
        axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.set(xlabel="epoch", ylabel="bound of log p(x), nats per image", title=f"objective {objective}")
    axes.legend(loc="lower right")
    _save(figure, path)


def draw_reconstructions(path: Path, images: np.ndarray, means: np.ndarray, image_shape: tuple[int, int]) -> None:
    """Images `(n, pixels)` in the upper row of each pair, E[x | z] at the posterior mean in the lower."""
    columns = 10
    rows = []
    for start in range(0, len(images), columns):
        rows += [images[start : start + columns], means[start : start + columns]]
    _draw_grid(
        path, np.concatenate(rows), image_shape, columns, "binarised test images, and below each its reconstruction"
    )


def draw_samples(path: Path, means: np.ndarray, image_shape: tuple[int, int]) -> None:
    """E[x | z] for z drawn from the prior, `(n, pixels)`."""
    _draw_grid(path, means, image_shape, 10, "samples: pixel means for z from the prior")


def draw_schedule(path: Path, sampler: dict[str, Any]) -> None:
    """The inverse temperatures, and the step size at each step, as they are at the end of training."""
    figure, (left, right) = _figure(8.0, 3.6, columns=2)
    betas = np.asarray(sampler["betas"])
    steps = np.arange(len(betas))
    left.plot(steps, steps / steps[-1], color="0.7", linestyle="--", label="linear")
    left.plot(steps, betas, marker="o", markersize=4, label="at the end of training")
    left.set(xlabel="annealing step k", ylabel="inverse temperature", title="schedule")
    left.legend()
    scale = np.asarray(sampler["momentum_scale"])
    sizes = np.broadcast_to(np.asarray(sampler["step_size"]).reshape(-1, 1), (len(betas) - 1, 1)) / scale.reshape(1, -1)
    if sizes.shape[1] > 1:
        right.fill_between(steps[1:], sizes.min(axis=1), sizes.max(axis=1), alpha=0.3, label="range over dimensions")
    right.plot(steps[1:], np.median(sizes, axis=1), marker="o", markersize=4, label="median over dimensions")
    right.set(xlabel="annealing step k", ylabel="step size / momentum scale", title="step size", ylim=(0, None))
    right.legend()
    _save(figure, path)


def draw_evaluation(path: Path, result: dict[str, Any]) -> None:
    """Log likelihood by image, the bounds beside each other, tuning by temperature, and the sandwich."""
    figure, axes = _figure(10.0, 7.0, rows=2, columns=2)
    (top_left, top_right), (bottom_left, bottom_right) = axes
    by_image = np.asarray(result["log_likelihood_by_image"])
    top_left.hist(by_image[np.isfinite(by_image)], bins=min(30, len(by_image)), color="C0")
    top_left.set(xlabel="log p(x), nats", ylabel="test images", title=f"{result['method']}, each test image")

    rows = [("ELBO", result["elbo"]), (f"L_{result['num_samples']}", result["importance_bound"])]
    rows.append((result["method"], {key: result["nll"][key] for key in ("mean", "error_over_chains")}))
    names = [name for name, _ in rows]
    values = [-row["mean"] if name == result["method"] else row["mean"] for name, row in rows]
    errors = [row.get("error_over_chains", row.get("error_over_samples")) for _, row in rows]
    top_right.errorbar(range(len(names)), values, yerr=errors, fmt="o", capsize=4)
    top_right.set_xticks(range(len(names)), names)
    top_right.set(
        ylabel="mean log p(x), nats", title="bounds on the same test images\n(errors over samples and chains)"
    )
    top_right.margins(0.2)

    tuning = result["tuning"]
    if tuning is None:
        bottom_left.text(0.5, 0.5, "importance samples: nothing is tuned", ha="center", va="center")
        bottom_left.set_axis_off()
    else:
        if "acceptance" in tuning:
            bottom_left.plot(tuning["beta"], tuning["acceptance"], label="acceptance")
        bottom_left.plot(tuning["beta"], tuning["step_size"], label="step size")
        bottom_left.set(xlabel="inverse temperature", ylim=(0, None), title="tuning, on training images")
        bottom_left.legend()

    bracket = result["simulated"]
    if bracket:
        lower, upper = np.asarray(bracket["lower_by_image"]), np.asarray(bracket["upper_by_image"])
        bottom_right.axhline(0, color="0.7")
        bottom_right.plot(lower, upper - lower, "o", markersize=4)
        bottom_right.set(
            xlabel="lower bound of log p(x), nats",
            ylabel="upper - lower, nats",
            title=f"simulated images: mean gap {bracket['gap']['mean']:.3f} ± {bracket['gap']['error']:.3f}",
        )
    else:
        bottom_right.set_axis_off()
    _save(figure, path)


def _draw_grid(path: Path, images: np.ndarray, image_shape: tuple[int, int], columns: int, title: str) -> None:
    height, width = image_shape
    rows = -(-len(images) // columns)
    sheet = np.ones((rows * (height + 1) + 1, columns * (width + 1) + 1))
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = np.asarray(image).reshape(image_shape)
    # Images of one column would make a picture longer than Matplotlib can write.
    figure, axes = _figure(6.4, min(6.4 * sheet.shape[0] / sheet.shape[1], 20.0) + 0.4)
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    # Figure itself, not pyplot: no global state, no display.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        _tidy(axes)
    figure.savefig(path, dpi=120)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
