"""What must stand beside a gradient through Metropolis-Hastings: whether the alternatives met the chain again."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lehr.mh_gradient.alternatives import Run
from lehr.mh_gradient.trace import Trace, largest_kappas

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
    #: largest |W|: the norm of an alternative's weight, in all parameters; NaN where positions move with these, and a
    #: decision has no gradient of its own
    largest_weight: Float[Array, ""]
    #: largest number kappa in front of the gradient of a flip's log ratio
    largest_kappa: Float[Array, ""]
    #: steps that alternatives lived which met the chain: median, 90 %, 99 %, longest; NaN if none did
    meeting_times: Float[Array, "4"]
    #: alternatives that met the chain, a chain
    num_meetings: Float[Array, ""]
    #: share of the chains that end with an alternative older than half of the run (with several slots, of all slots)
    unmet: Float[Array, ""]
    num_steps: int = eqx.field(static=True)
    value_error: Any = None
    gradient_error: Any = None

    @property
    def warning(self) -> str | None:
        """What is wrong, if anything is: of a result that has values."""
        return _in_words(float(self.unmet), self.num_steps)


def diagnose(run: Run, num_steps: int, largest_weight: Array) -> Diagnostics:
    """From the runs of chains which recorded the lives of their alternatives."""
    num_chains = len(run.acceptance)
    age_met = _ages_met(run.trace)
    met = jnp.where(age_met > 0, age_met.astype(jnp.float32), jnp.nan)
    return Diagnostics(
        acceptance=jnp.mean(run.acceptance),
        alive_fraction=jnp.mean((run.trace.lives.strength > 0).astype(jnp.float32)),
        num_births=jnp.sum(run.trace.taken) / num_chains,
        largest_weight=largest_weight,
        largest_kappa=jnp.max(jnp.abs(largest_kappas(run.trace))),
        meeting_times=jnp.nanquantile(met, jnp.asarray(_QUANTILES)),
        num_meetings=jnp.sum(age_met > 0) / num_chains,
        unmet=_unmet(run.ages, num_steps),
        num_steps=num_steps,
    )


def _ages_met(trace: Trace) -> Array:
    """After each step, by chain and slot: the age at which an alternative met the chain; 0 if none did."""
    taken = trace.taken
    steps = jnp.arange(len(taken)).reshape(-1, *(1 for _ in taken.shape[1:]))
    born = jax.lax.cummax(jnp.where(taken, steps, -1), axis=0)
    before = jnp.concatenate([jnp.full_like(born[:1], -1), born[:-1]])
    return jnp.where(trace.lives.met, steps - before, 0)


def _unmet(ages: Array, num_steps: int) -> Float[Array, ""]:
    return jnp.mean((ages > num_steps / 2).astype(jnp.float32))


def warned_of_unmet(x: Array, ages: Array, num_steps: int) -> Array:
    """The same x: to compute it warns where alternatives do not meet their chains, also from compiled code.

    `ages` are those of the alternatives at the end, 0 for a slot that is empty. Nobody is warned if x is not used.

    (A callback that nothing waits for would be an effect, and a function with effects is called through Python: that
    takes 0.1 ms a call, as long as a short run of chains.)
    """
    if num_steps < _SHORTEST:
        return x

    def warn(share: Any) -> Any:
        text = _in_words(float(share), num_steps)
        if text is not None:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return share

    # Of a batch the largest: a callback for each entry would be compiled one by one.
    @jax.custom_batching.custom_vmap
    def said(share: Array) -> Array:
        like = jax.ShapeDtypeStruct((), share.dtype)
        return jax.lax.cond(share > _WORTH_A_WARNING, lambda: jax.pure_callback(warn, like, share), lambda: share)

    @said.def_vmap
    def _(axis_size: int, in_batched: list[bool], share: Array) -> tuple[Array, bool]:
        del axis_size, in_batched
        return said(jnp.max(share)), False

    # No share is more than 1; but the compiler does not know.
    return jnp.where(said(_unmet(ages, num_steps)) > 1, jnp.nan, x)


def _in_words(share: float, num_steps: int) -> str | None:
    if num_steps < _SHORTEST or not share > _WORTH_A_WARNING:
        return None
    return (
        f"in {share:.0%} of the chains the alternative has not met the chain for half of its {num_steps} steps, so "
        "that the gradient is noisier than its error says: take a coupling that meets (MaximalReflection, "
        "MonotoneSpin), or accept more"
    )
