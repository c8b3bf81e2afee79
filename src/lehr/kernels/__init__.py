"""Transition kernels: a move (Hamiltonian, Langevin, random walk); `Metropolis` and `LearnedReverse` wrap one."""

from lehr.kernels.affine_in_beta import AffineInBeta
from lehr.kernels.contract import AbstractKernel, AbstractMove, State, Transition
from lehr.kernels.hamiltonian import Hamiltonian
from lehr.kernels.langevin import Langevin
from lehr.kernels.learned_reverse import LearnedReverse, linear_drift, network_drift
from lehr.kernels.metropolis import Metropolis
from lehr.kernels.random_walk import RandomWalk

__all__ = [
    "AbstractKernel",
    "AbstractMove",
    "AffineInBeta",
    "Hamiltonian",
    "Langevin",
    "LearnedReverse",
    "Metropolis",
    "RandomWalk",
    "State",
    "Transition",
    "linear_drift",
    "network_drift",
]
