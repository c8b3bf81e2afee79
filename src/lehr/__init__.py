"""lehr: evidence you can differentiate. The public names, each imported when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lehr import linear_regression as linear_regression, mh_gradient as mh_gradient, objectives as objectives
    from lehr.adapters.functions import from_function as from_function
    from lehr.adapters.numpyro import from_numpyro as from_numpyro
    from lehr.adapters.pymc import from_pymc as from_pymc
    from lehr.annealer import Annealer as Annealer
    from lehr.annealing import anneal as anneal, anneal_reverse as anneal_reverse
    from lehr.comparison import Comparison as Comparison, compare as compare
    from lehr.errors import InputError as InputError
    from lehr.estimation import evidence as evidence
    from lehr.gaussian import Gaussian as Gaussian
    from lehr.gradient_noise import noise_gap as noise_gap
    from lehr.greedy import tune as tune
    from lehr.kernels import (
        AffineInBeta as AffineInBeta,
        Hamiltonian as Hamiltonian,
        Langevin as Langevin,
        LearnedReverse as LearnedReverse,
        Metropolis as Metropolis,
        RandomWalk as RandomWalk,
    )
    from lehr.mh_gradient.expectation import mh_expectation as mh_expectation
    from lehr.optimisation import fit as fit
    from lehr.path import Problem as Problem, Schedule as Schedule
    from lehr.report import Evidence as Evidence
    from lehr.reversible import Reversible as Reversible
    from lehr.simulation import SimulationCheck as SimulationCheck, simulate_check as simulate_check
    from lehr.subsampled import Subsampled as Subsampled
    from lehr.trained import Trained as Trained
    from lehr.weighted import WeightedParticles as WeightedParticles

_HOME = {
    "Annealer": "lehr.annealer",
    "anneal": "lehr.annealing",
    "anneal_reverse": "lehr.annealing",
    "Comparison": "lehr.comparison",
    "compare": "lehr.comparison",
    "InputError": "lehr.errors",
    "evidence": "lehr.estimation",
    "Evidence": "lehr.report",
    "from_function": "lehr.adapters.functions",
    "from_numpyro": "lehr.adapters.numpyro",
    "from_pymc": "lehr.adapters.pymc",
    "Gaussian": "lehr.gaussian",
    "noise_gap": "lehr.gradient_noise",
    "Reversible": "lehr.reversible",
    "SimulationCheck": "lehr.simulation",
    "simulate_check": "lehr.simulation",
    "AffineInBeta": "lehr.kernels",
    "Hamiltonian": "lehr.kernels",
    "Langevin": "lehr.kernels",
    "LearnedReverse": "lehr.kernels",
    "Metropolis": "lehr.kernels",
    "RandomWalk": "lehr.kernels",
    "mh_expectation": "lehr.mh_gradient.expectation",
    "fit": "lehr.optimisation",
    "tune": "lehr.greedy",
    "Problem": "lehr.path",
    "Schedule": "lehr.path",
    "Subsampled": "lehr.subsampled",
    "Trained": "lehr.trained",
    "WeightedParticles": "lehr.weighted",
}

_SUBPACKAGES = ("linear_regression", "mh_gradient", "objectives")

__all__ = [*_HOME, *_SUBPACKAGES]  # pyright: ignore[reportUnsupportedDunderAll]


# JAX takes more than a second to import, and `lehr --help` must not wait for it.
def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"lehr.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lehr' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
