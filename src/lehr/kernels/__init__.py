"""Transition kernels: a move (Hamiltonian, Langevin, random walk), or a move made exact by `Metropolis`."""

from lehr.kernels.contract import AbstractKernel, AbstractMove, State, Transition
from lehr.kernels.hamiltonian import Hamiltonian
from lehr.kernels.langevin import Langevin
from lehr.kernels.metropolis import Metropolis
from lehr.kernels.random_walk import RandomWalk

__all__ = [
    "AbstractKernel",
    "AbstractMove",
    "Hamiltonian",
    "Langevin",
    "Metropolis",
    "RandomWalk",
    "State",
    "Transition",
]
