"""The options of the studies of differentiable Metropolis-Hastings."""

import dataclasses
import importlib
from pathlib import Path
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class _Study:
    name: ClassVar[str]

    seed: int = 0
    """of every random number of the study"""
    json: bool = False
    """print the result as JSON too"""

    def run(self, arguments: list[str]) -> int:
        """Runs the study; returns the exit code."""
        del arguments
        return getattr(importlib.import_module(f"lehr.studies.mh_{self.name}"), self.name)(self)


@dataclasses.dataclass(frozen=True)
class Gaussian(_Study):
    """One Gaussian: how alternatives leave a chain and meet it, and the variance of every scheme and baseline."""

    name: ClassVar[str] = "gaussian"

    out: Path = Path("runs/mh-gaussian")
    """folder for mh-gaussian.json and mh-gaussian.png"""
    num_chains: int = 10_000
    """chains of each gradient"""


@dataclasses.dataclass(frozen=True)
class Mixture(_Study):
    """Entropy of a discrete posterior: its curve, its gradient, and the ascent to its maximum."""

    name: ClassVar[str] = "mixture"

    out: Path = Path("runs/mh-mixture")
    """folder for mh-mixture.json and mh-mixture.png"""
    num_chains: int = 64
    """chains of each gradient"""


@dataclasses.dataclass(frozen=True)
class Ising(_Study):
    """The Ising model: specific heat, its derivative, and the ascent in temperature to its maximum."""

    name: ClassVar[str] = "ising"

    out: Path = Path("runs/mh-ising")
    """folder for mh-ising.json and mh-ising.png"""
    side: int = 12
    """of the lattice, even"""
    num_chains: int = 64
    """chains of each gradient"""


@dataclasses.dataclass(frozen=True)
class Proposal(_Study):
    """Proposals tuned by the gradient of the autocorrelation: random walk in one and two dimensions, and MALA."""

    name: ClassVar[str] = "proposal"

    out: Path = Path("runs/mh-proposal")
    """folder for mh-proposal.json and mh-proposal.png"""
    num_chains: int = 8192
    """chains of each gradient"""


@dataclasses.dataclass(frozen=True)
class Couplings(_Study):
    """Every coupling over dimension and shape of the target: variance times cost, and meeting times."""

    name: ClassVar[str] = "couplings"

    out: Path = Path("runs/mh-couplings")
    """folder for mh-couplings.json and mh-couplings.png"""
    num_chains: int = 500
    """chains of each gradient"""


@dataclasses.dataclass(frozen=True)
class Dimension(_Study):
    """Many parameters: an energy that is a network of a thousand to a million of them, and what a gradient costs."""

    name: ClassVar[str] = "dimension"

    out: Path = Path("runs/mh-dimension")
    """folder for mh-dimension.json and mh-dimension.png"""
    num_chains: int = 64
    """chains of each gradient"""
    num_repeats: int = 48
    """gradients, for their variance"""
    largest: int = 1_000_000
    """parameters, about, of the largest network"""


STUDIES = {kind.name: kind for kind in (Gaussian, Mixture, Ising, Proposal, Couplings, Dimension)}
