"""Objectives: lower bounds of the log evidence, to be maximised with `jax.grad` and `optax`.

Each is a function `(base or annealer, log_target, key, *, options) -> scalar`, a bound in nats for one data set (for
one image); what is trained comes first, for `jax.grad`. `aiwae` returns its particles too, for `has_aux=True`.
`jax.vmap` runs them over many data sets.
"""

from lehr.objectives.aiwae import aiwae
from lehr.objectives.annealed import davi
from lehr.objectives.control_variates import davi_control_variate, elbo_control_variate, iwae_control_variate
from lehr.objectives.elbo import elbo, elbo_exact_entropy, elbo_exact_kl
from lehr.objectives.gradient_rules import davi_dreg, davi_stl, elbo_stl, iwae_dreg, iwae_stl
from lehr.objectives.multisample import iwae

__all__ = [
    "aiwae",
    "davi",
    "davi_control_variate",
    "davi_dreg",
    "davi_stl",
    "elbo",
    "elbo_control_variate",
    "elbo_exact_entropy",
    "elbo_exact_kl",
    "elbo_stl",
    "iwae",
    "iwae_control_variate",
    "iwae_dreg",
    "iwae_stl",
]
