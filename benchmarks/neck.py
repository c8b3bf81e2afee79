"""The log evidence of brownian by quadrature, and how much of its mass lies in its neck.

    LEHR_DATA=FOLDER python -m benchmarks.neck

Given both log scales the path is Gaussian, and the Kalman filter integrates it out; the trapezoid rule does the rest,
on grids that grow until nothing changes. The neck: a small observation scale pins twenty coordinates to the data.
"""

import os
from pathlib import Path

import numpy as np


def log_marginal(log_innovation: np.ndarray, log_noise: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """log p(observed, log scales), the path integrated out, for arrays of both log scales."""
    innovation, noise = np.exp(2 * log_innovation), np.exp(2 * log_noise)
    mean, variance, total = (np.zeros_like(log_noise) for _ in range(3))
    for y in observed:
        variance = variance + innovation
        if np.isnan(y):
            continue
        predicted, residual = variance + noise, y - mean
        total -= (np.log(2 * np.pi * predicted) + residual**2 / predicted) / 2
        mean, variance = mean + variance / predicted * residual, variance * noise / predicted
    # The scales are LogNormal(0, 2).
    return total - (log_innovation**2 + log_noise**2) / 8 - np.log(2 * np.pi * 4)


def main() -> None:
    file = Path(os.environ["LEHR_DATA"]) / "bayes" / "brownian.csv"
    observed = np.genfromtxt(file, delimiter=",", skip_header=1)[:, 1]
    for low, high, size in ((-8, 4, 1201), (-14, 6, 2001), (-20, 8, 2801)):
        grid, step = np.linspace(low, high, size, retstep=True)
        mass = np.exp(log_marginal(*np.meshgrid(grid, grid, indexing="ij"), observed)) * step**2
        print(f"log scales from {low} to {high}: log Z = {np.log(mass.sum()):.5f}")
    by_noise = mass.sum(axis=0) / mass.sum()
    for limit in (-3, -3.5, -4, -5):
        print(f"log observation scale below {limit}: {by_noise[grid < limit].sum():.2%} of the mass")


if __name__ == "__main__":
    main()
