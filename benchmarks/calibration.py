"""Whether the errors and brackets that `lehr.evidence` states are right, over seeds on targets of known evidence.

    python -m benchmarks.calibration [--seeds 100] [--first-seed 0] [--targets log-gamma ...] [--max-gradients 1e6]
        [--tolerance 0.05] [--json calibration.json]

For each target, z = (log_evidence - truth) / standard_error over seeds: its mean and standard deviation with their
errors (0 and 1 if the errors are right), the share of seeds whose `bracket` holds the truth (at least the 95 % that it
states) with its binomial error, the share that converged, and the medians of the stated error, of the bracket's width
and of the gradients. A run that raises, or states no finite error, counts as a bracket that misses.

log Z is known to 1e-4 nats at best in float32, so this is added to the stated error in z and to both ends of the
bracket. Where the stated error is below it the estimate is exact (the base found is the target: a Gaussian); the
standard deviation of z then says nothing, and is not judged.

Exits with 1 if of any target the mean of z is above 0.3 or below -0.3, its standard deviation is outside [0.8, 1.25],
or the coverage is below 95 % by more than two binomial errors. (The standard error comes from R populations, so that z
has the tails of Student's t with R - 1 degrees of freedom, and an sd of sqrt((R - 1) / (R - 3)) where all is right.)

With `--json` every run is written to the file as it ends, and what is there already is not run again.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Column, Table

import lehr
from benchmarks.leaderboard import Rows
from benchmarks.targets import CALIBRATION, NAMES, target

STATED = 0.95
LARGEST_MEAN, SD_RANGE = 0.3, (0.8, 1.25)

#: nats; what float32 leaves of a log density of the size of these
ROUNDING = 1e-4


def measure(name: str, seed: int, max_gradients: int, tolerance: float) -> dict[str, Any]:
    """One run, as a row. The problem is the same object for all seeds, so that only the first compiles."""
    started = time.perf_counter()
    try:
        found = lehr.evidence(
            jax.random.key(seed),
            target(name).problem,
            tolerance=tolerance,
            max_gradients=max_gradients,
            progress=False,
        )
        low, high = found.bracket
        row = {
            "log_evidence": float(found.log_evidence),
            "error": float(found.standard_error),
            "low": float(low),
            "high": float(high),
            "gradients": int(found.num_gradients),
        }
        if not np.all(np.isfinite(list(row.values()))):
            raise FloatingPointError(f"not finite: {row}")
        row["converged"] = bool(found.converged)
    except (ArithmeticError, ValueError, RuntimeError) as fault:
        row = {"fault": f"{type(fault).__name__}: {fault}"}
    return row | {"seconds": time.perf_counter() - started}


class Calibration(NamedTuple):
    """Of one target, over seeds; errors are of the mean, the standard deviation and the share beside them."""

    count: int
    failed: int
    mean: float
    mean_error: float
    sd: float
    sd_error: float
    coverage: float
    coverage_error: float
    converged: float
    stated: float
    width: float
    gradients: float

    @property
    def holds(self) -> bool:
        centred = abs(self.mean) <= LARGEST_MEAN
        covers = self.coverage >= STATED - 2 * (STATED * (1 - STATED) / self.count) ** 0.5
        spread = self.exact or SD_RANGE[0] <= self.sd <= SD_RANGE[1]
        return centred and spread and covers

    @property
    def exact(self) -> bool:
        return self.stated < ROUNDING


def calibrate(rows: list[dict[str, Any]], truth: float) -> Calibration:
    good = [row for row in rows if "fault" not in row]
    log_evidence, error, low, high, gradients, converged = (
        np.array([row[name] for row in good], float)
        for name in ("log_evidence", "error", "low", "high", "gradients", "converged")
    )
    n = len(good)
    if n < 3:
        return Calibration(len(rows), len(rows) - n, *[float("nan")] * 10)
    z = (log_evidence - truth) / np.hypot(error, ROUNDING)
    coverage = float(np.sum((low - ROUNDING <= truth) & (truth <= high + ROUNDING))) / len(rows)
    sd = float(z.std(ddof=1))
    # The error of a standard deviation, with the kurtosis that z has: it is not normal.
    kurtosis = float(np.mean((z - z.mean()) ** 4)) / z.var() ** 2
    return Calibration(
        len(rows),
        len(rows) - n,
        float(z.mean()),
        sd / n**0.5,
        sd,
        sd * (max(kurtosis - 1, 0) / (4 * n)) ** 0.5,
        coverage,
        (STATED * (1 - STATED) / len(rows)) ** 0.5,
        float(converged.mean()),
        float(np.median(error)),
        float(np.median(high - low)),
        float(np.median(gradients)),
    )


def show(console: Console, results: dict[str, Calibration]) -> None:
    heads = ("runs", "mean z", "sd z", "coverage", "converged", "stated error", "bracket", "gradients", "verdict")
    table = Table("target", *(Column(head, justify="right", no_wrap=True) for head in heads))
    for name, c in results.items():
        table.add_row(
            name,
            f"{c.count}" + (f" ({c.failed} failed)" if c.failed else ""),
            f"{c.mean:+.2f} +- {c.mean_error:.2f}",
            f"{c.sd:.2f} +- {c.sd_error:.2f}",
            f"{c.coverage:.1%} +- {c.coverage_error:.1%}",
            f"{c.converged:.0%}",
            "exact" if c.exact else f"{c.stated:.4f}",
            f"{c.width:.4f}",
            f"{c.gradients:,.0f}",
            "pass" if c.holds else "FAIL",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds that no setting was chosen on: from 100")
    parser.add_argument("--targets", nargs="+", choices=NAMES, default=CALIBRATION, metavar="TARGET")
    parser.add_argument("--max-gradients", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--tolerance", type=float, default=0.05, help="nats")
    parser.add_argument("--json", type=Path, help="results are kept here, and not measured again")
    options = parser.parse_args()

    console = Console()
    console.width = max(console.width, 150)
    rows = Rows(options.json, ("target", "max_gradients", "tolerance", "seed"))
    results = {}
    for name in options.targets:
        found = []
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            if seed % 25 == 0:
                # Hundreds of compiled programs exhaust the memory maps that a process may have.
                jax.clear_caches()
            key = (name, options.max_gradients, options.tolerance, seed)
            if (row := rows.find(*key)) is None:
                row = dict(zip(rows.keys, key)) | measure(name, seed, options.max_gradients, options.tolerance)
                rows.add(row)
                if "fault" in row:
                    console.print(f"{name}, seed {seed}: {row['fault']}", markup=False, soft_wrap=True)
            found.append(row)
        results[name] = calibrate(found, target(name).log_evidence)
    show(console, results)
    return 0 if all(result.holds for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
