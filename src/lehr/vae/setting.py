"""What decides the numbers of a training run. No heavy import: the command line reads its options from here."""

import dataclasses
import difflib
from collections.abc import Sequence

from lehr.errors import InputError

OBJECTIVES = ("elbo", "iwae", "davi", "davi-adapt", "aiwae")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The objective, its sampler, the network and the optimiser's run; with the data, these decide every number.

    Raises `lehr.errors.InputError` for a value out of range.
    """

    objective: str = "davi"
    """elbo, iwae, davi, davi-adapt (trains the sampler too) or aiwae"""
    num_steps: int = 10
    """annealing steps K of davi, inverse temperatures T of aiwae"""
    num_particles: int = 5
    """samples per image: S of elbo, iwae and davi, K of aiwae"""
    num_leapfrog: int = 5
    """leapfrogs per temperature of aiwae"""
    step_size: float = 0.1
    """the (first) leapfrog step size"""
    persistence: float = 0.9
    """the (first) persistence of davi's momentum, in [0, 1)"""
    latent_dim: int = 50
    """dimension of the latent z"""
    hidden: int = 200
    """units in each hidden layer"""
    epochs: int = 60
    """passes over the training images"""
    batch_size: int = 128
    """images in a batch"""
    seed: int = 0
    """of every random number of the run"""

    def __post_init__(self):
        check_name("objective", self.objective, OBJECTIVES)
        for name in ("num_steps", "num_particles", "num_leapfrog", "latent_dim", "hidden", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        if not 0 < self.step_size < float("inf"):
            raise InputError(f"step_size must be positive and finite, but it is {self.step_size}")
        if not 0 <= self.persistence < 1:
            raise InputError(f"persistence must be in [0, 1), but it is {self.persistence}")
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raises `InputError` for a seed that JAX would fold onto another one."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be in [0, 2^32), but it is {seed}")


def check_name(kind: str, name: str, known: Sequence[str]) -> None:
    """Raises `InputError` for an unknown name, with the nearest known ones."""
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.65)
        guess = f"; did you mean {' or '.join(repr(match) for match in near)}?" if near else "."
        raise InputError(f"unknown {kind} {name!r}{guess} Known: {', '.join(known)}")
