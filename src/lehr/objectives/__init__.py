"""Objectives: lower bounds of the log evidence, to be maximised with `jax.grad` and `optax`.

Each is a function `(what is trained..., key, *, options) -> scalar`, a bound in nats for one data set (for one image);
`jax.vmap` runs it over many.
"""

from lehr.objectives.aiwae import aiwae
from lehr.objectives.annealed import davi
from lehr.objectives.elbo import elbo
from lehr.objectives.multisample import iwae

__all__ = ["aiwae", "davi", "elbo", "iwae"]
