"""The test likelihoods of two or more evaluated runs, each compared with the next on the same images.

    python benchmarks/paired.py runs/mnist-vae runs/mnist-iwae5 ...

Reads evaluation-ais.json of each (`lehr evaluate RUN --method ais`). The error of a difference is over images; much of
what one image differs from another in is common to the runs, and cancels.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np


def log_likelihoods(run: Path) -> np.ndarray:
    return np.array(json.loads((run / "evaluation-ais.json").read_text())["log_likelihood_by_image"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = parser.parse_args().runs
    for one, other in itertools.pairwise(runs):
        difference = log_likelihoods(other) - log_likelihoods(one)
        error = difference.std(ddof=1) / len(difference) ** 0.5
        pair = f"NLL of {one.name} - {other.name}"
        print(f"{pair}: {difference.mean():+.3f} +- {error:.3f} nats, {len(difference)} images")


if __name__ == "__main__":
    main()
