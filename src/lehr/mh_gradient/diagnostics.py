"""What must stand beside a gradient through Metropolis-Hastings: whether the alternatives met the chain again."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lehr.mh_gradient.alternatives import Run, Trace

#: share of the chains whose last alternative has lived for half of the run
_WORTH_A_WARNING = 0.1
#: a shorter run is not judged
_SHORTEST = 20
_QUANTILES = (0.5, 0.9, 0.99, 1.0)


class Diagnostics(eqx.Module):
    """Of one call, over its chains.

    Errors are standard errors over the chains, in the shapes of the value and of its gradient (a leading axis for each
    of the value's); NaN with a single chain.
    """

    #: share of the proposals that were accepted (with `HeatBath`: of the spins that turned over)
    acceptance: Float[Array, ""]
    #: share of the steps, after which an alternative lives
    alive_fraction: Float[Array, ""]
    #: alternatives that were kept when born, a chain
    num_births: Float[Array, ""]
    #: largest |kappa|: the weight of an alternative over the gradient of its flip's log ratio
    largest_weight: Float[Array, ""]
    #: steps that alternatives lived which met the chain: median, 90 %, 99 %, longest; NaN if none did
    meeting_times: Float[Array, "4"]
    #: alternatives that met the chain, a chain
    num_meetings: Float[Array, ""]
    #: share of the chains that end with an alternative older than half of the run
    unmet: Float[Array, ""]
    num_steps: int = eqx.field(static=True)
    value_error: Any = None
    gradient_error: Any = None

    @property
    def warning(self) -> str | None:
        """What is wrong, if anything is: of a result that has values."""
        return _in_words(float(self.unmet), self.num_steps)


def diagnose(run: Run, num_steps: int) -> Diagnostics:
    """From the runs of chains, with a leading axis of chains, which recorded the lives of their alternatives."""
    num_chains = len(run.acceptance)
    alive, kappa, age_met = _lives(run.trace)
    met = jnp.where(age_met > 0, age_met.astype(jnp.float32), jnp.nan)
    return Diagnostics(
        acceptance=jnp.mean(run.acceptance),
        alive_fraction=jnp.mean(alive.astype(jnp.float32)),
        num_births=jnp.sum(run.trace.taken) / num_chains,
        largest_weight=jnp.max(jnp.abs(kappa)),
        meeting_times=jnp.nanquantile(met, jnp.asarray(_QUANTILES)),
        num_meetings=jnp.sum(age_met > 0) / num_chains,
        unmet=_unmet(run.oldest, num_steps),
        num_steps=num_steps,
    )


def _lives(trace: Trace) -> tuple[Array, Array, Array]:
    """After each step, by chain and slot: whether an alternative lives, its kappa, and at which age one met the chain.

    An age of 0 is none.
    """
    taken, lives = trace.taken, trace.lives
    steps = jnp.arange(len(taken)).reshape(-1, *(1 for _ in taken.shape[1:]))
    born = jax.lax.cummax(jnp.where(taken, steps, -1), axis=0)
    before = jnp.concatenate([jnp.full_like(born[:1], -1), born[:-1]])
    coefficient = trace.coefficient.reshape(*trace.coefficient.shape, *(1 for _ in taken.shape[2:]))
    kappa = lives.strength * jnp.take_along_axis(coefficient, jnp.maximum(born, 0), axis=0)
    alive = lives.strength > 0
    return alive, jnp.where(alive, kappa, 0), jnp.where(lives.met, steps - before, 0)


def _unmet(oldest: Array, num_steps: int) -> Float[Array, ""]:
    return jnp.mean((oldest > num_steps / 2).astype(jnp.float32))


def warn_of_unmet(oldest: Array, num_steps: int) -> None:
    """Warns where alternatives do not meet their chains, also from compiled code.

    `oldest` are the ages of chains' last alternatives.
    """
    if num_steps < _SHORTEST:
        return
    share = _unmet(oldest, num_steps)

    def warn(share: Any) -> None:
        text = _in_words(float(np.max(share)), num_steps)
        if text is not None:
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    # Of a batch the largest: a callback for each entry would be compiled one by one.
    @jax.custom_batching.custom_vmap
    def said(share: Array) -> Array:
        jax.lax.cond(share > _WORTH_A_WARNING, lambda: jax.debug.callback(warn, share), lambda: None)
        return share

    @said.def_vmap
    def _(axis_size: int, in_batched: list[bool], share: Array) -> tuple[Array, bool]:
        del axis_size, in_batched
        return said(jnp.max(share)), False

    said(share)


def _in_words(share: float, num_steps: int) -> str | None:
    if num_steps < _SHORTEST or not share > _WORTH_A_WARNING:
        return None
    return (
        f"in {share:.0%} of the chains the alternative has not met the chain for half of its {num_steps} steps, so "
        "that the gradient is noisier than its error says: take a coupling that meets (MaximalReflection, "
        "MonotoneSpin), or accept more"
    )
