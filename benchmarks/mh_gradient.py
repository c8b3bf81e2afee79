"""The cost of a gradient through Metropolis-Hastings: its time over that of the chains alone, in one run.

    python -m benchmarks.mh_gradient [--chains 64] [--steps 200] [--repeats 15] [--only NAME]

Targets of one parameter each. By random walk and maximal reflection: N(theta, I) in one, three and ten dimensions; a
mixture of eight Gaussians in one; the posterior of a logistic regression of 500 data in ten dimensions, of which the
parameter is the prior's log scale. By uniform proposals: the entropy over three components, of which the parameter is
the observation. Of the Ising model, by the heat bath the specific heat and by single spins the energy, of which it is
the temperature. And some of which the gradient is dearer: proposals and couplings that use gradients or reject, a
parameter of the proposal. Times are medians of interleaved calls. (Networks of a thousand to a million parameters:
`lehr study dimension`.)
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import lehr
from lehr.mh_gradient import (
    MALA,
    DiscreteUniform,
    FullKernelMaximal,
    GCRefl,
    HeatBath,
    MaximalIndependent,
    MaximalReflection,
    MonotoneSpin,
    RandomWalk,
    SpinFlip,
)
from lehr.numerics import bernoulli_log_prob
from lehr.studies import mh_ising, mh_mixture


def gaussian(theta: Any, x: Any) -> Any:
    return -jnp.sum((x - theta) ** 2) / 2


def logistic(num_data: int, dimension: int) -> Callable[[Any, Any], Any]:
    key_x, key_y = jax.random.split(jax.random.key(0))
    design = jax.random.normal(key_x, (num_data, dimension))
    y = jax.random.bernoulli(key_y, jax.nn.sigmoid(design[:, 0] - design[:, 1])).astype(float)

    def log_density(log_scale: Any, w: Any) -> Any:
        prior = -jnp.sum(w**2) * jnp.exp(-2 * log_scale) / 2 - dimension * log_scale
        return prior + jnp.sum(bernoulli_log_prob(design @ w, y))

    return log_density


def mixture(theta: Any, x: Any) -> Any:
    return jax.nn.logsumexp(-((x[0] - theta - jnp.linspace(-3, 3, 8)) ** 2) / 2)


def mean_of_first(
    log_density: Callable[[Any, Any], Any], proposal: Any, coupling: Any, dimension: int, **lengths: int
) -> Callable[[Any, Any], Any]:
    """The mean of the first coordinate."""
    return lehr.mh_expectation(log_density, lambda x: x[0], proposal, coupling, jnp.zeros(dimension), **lengths)


def by_random_walk(
    log_density: Callable[[Any, Any], Any], dimension: int, scale: float
) -> Callable[..., Callable[[Any, Any], Any]]:
    """The same, by random walk and maximal reflection."""
    return partial(mean_of_first, log_density, RandomWalk(scale), MaximalReflection(), dimension)


def entropy(**lengths: int) -> Callable[[Any, Any], Any]:
    """Of the posterior of three components, as in `lehr study mixture`."""
    proposal, coupling, x0 = DiscreteUniform(3), MaximalIndependent(), jnp.ones(1, jnp.int32)
    shares = lehr.mh_expectation(mh_mixture.log_density, mh_mixture.one_hot, proposal, coupling, x0, **lengths)
    return lambda obs, key: mh_mixture.entropy(shares(obs, key))


def specific_heat(side: int, **lengths: int) -> Callable[[Any, Any], Any]:
    """A site's, of the Ising model by the heat bath, as in `lehr study ising`."""

    def f(x: Any) -> Any:
        energy = mh_ising.energy(x) / side
        return jnp.stack([energy, energy**2])

    bath, x0 = HeatBath.checkerboard(side, side), jnp.ones(side * side)
    moments = lehr.mh_expectation(mh_ising.log_density, f, bath, MonotoneSpin(), x0, **lengths)

    def heat(temperature: Any, key: Any) -> Any:
        mean, square = moments(temperature, key)
        return (square - mean**2) / temperature**2

    return heat


def single_spins(dtype: Any, **lengths: int) -> Callable[[Any, Any], Any]:
    """The energy a site of the 12 x 12 Ising model, one spin a step."""
    x0 = jnp.ones(144, dtype)
    return lehr.mh_expectation(
        mh_ising.log_density, lambda x: mh_ising.energy(x) / 144, SpinFlip(), MonotoneSpin(), x0, **lengths
    )


def autocorrelation(**lengths: int) -> Callable[[Any, Any], Any]:
    """Of consecutive states of N(0, 1), as a function of the random walk's scale."""
    return lehr.mh_expectation(
        lambda scale, x: -jnp.sum(x**2) / 2,
        lambda x, x_next: x[0] * x_next[0],
        RandomWalk,
        MaximalReflection(),
        jnp.zeros(1),
        consecutive=True,
        **lengths,
    )


#: of lengths makes a function of (parameter, key); and the parameter
CASES: dict[str, tuple[Callable[..., Callable[[Any, Any], Any]], float]] = {
    "N(theta, 1)": (by_random_walk(gaussian, 1, 2.38), 0.5),
    "mixture of eight": (by_random_walk(mixture, 1, 5.0), 0.5),
    "N(theta, I), d = 3": (by_random_walk(gaussian, 3, 1.37), 0.5),
    "N(theta, I), d = 10": (by_random_walk(gaussian, 10, 0.75), 0.5),
    "logistic, n = 500, d = 10": (by_random_walk(logistic(500, 10), 10, 0.1), 0.5),
    "three components": (entropy, 0.4),
    "Ising, 12 x 12": (partial(specific_heat, 12), 2.6),
    "Ising, 32 x 32": (partial(specific_heat, 32), 2.6),
    "single spins, 12 x 12": (partial(single_spins, jnp.float32), 4.0),
    "the same, int8": (partial(single_spins, jnp.int8), 4.0),
    # What is known to take more than two and a half passes: docs/results.md says why.
    "MALA, d = 3": (partial(mean_of_first, gaussian, MALA(1.0), MaximalReflection(), 3), 0.5),
    "GCRefl, d = 10": (partial(mean_of_first, gaussian, RandomWalk(0.75), GCRefl(), 10), 0.5),
    "FullKernelMaximal, d = 1": (partial(mean_of_first, gaussian, RandomWalk(2.38), FullKernelMaximal(), 1), 0.5),
    "the scale, pathwise": (autocorrelation, 1.5),
}


def measure(name: str, num_chains: int, num_steps: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of the chains alone and of value and gradient, and the median of their ratios."""
    make, value = CASES[name]
    function = make(num_steps=num_steps, burn_in=num_steps // 4, num_chains=num_chains)
    calls = [jax.jit(function), jax.jit(jax.value_and_grad(function))]
    param, keys = jnp.asarray(value), [jax.random.key(i) for i in range(5)]
    for call in calls:
        jax.block_until_ready(call(param, keys[0]))
    rows = []
    for _ in range(repeats):
        times = []
        for call in calls:
            start = time.perf_counter()
            for key in keys:
                jax.block_until_ready(call(param, key))
            times.append((time.perf_counter() - start) / len(keys))
        rows.append(times)
    alone, both = (statistics.median(column) for column in zip(*rows))
    return alone, both, statistics.median(b / a for a, b in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=CASES, help="this target alone")
    options = parser.parse_args()
    for name in [options.only] if options.only else CASES:
        alone, both, ratio = measure(name, options.chains, options.steps, options.repeats)
        each = 1e9 / (options.chains * options.steps)
        print(
            f"{name:26} chains {alone * 1e3:7.2f} ms ({alone * each:4.0f} ns a step)   value and gradient "
            f"{both * 1e3:7.2f} ms ({both * each:4.0f} ns)   ratio {ratio:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
