"""The cost of a gradient through Metropolis-Hastings: its time over that of the chains alone, in one run.

    python -m benchmarks.mh_gradient [--chains 64] [--steps 200] [--repeats 15]

Targets of one parameter each, by random walk and maximal reflection: N(theta, I) in one, three and ten dimensions; a
mixture of eight Gaussians in one; the posterior of a logistic regression of 500 data in ten dimensions, of which the
parameter is the prior's log scale. Times are medians of interleaved calls. (Networks of a thousand to a million
parameters: `lehr study dimension`.)
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lehr
from lehr.mh_gradient import MaximalReflection, RandomWalk
from lehr.numerics import bernoulli_log_prob


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


TARGETS: dict[str, tuple[Callable[[Any, Any], Any], int, float]] = {
    "N(theta, 1)": (gaussian, 1, 2.38),
    "mixture of eight": (mixture, 1, 5.0),
    "N(theta, I), d = 3": (gaussian, 3, 1.37),
    "N(theta, I), d = 10": (gaussian, 10, 0.75),
    "logistic, n = 500, d = 10": (logistic(500, 10), 10, 0.1),
}


def measure(name: str, num_chains: int, num_steps: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of the chains alone and of value and gradient, and the median of their ratios."""
    log_density, dimension, scale = TARGETS[name]
    expectation = lehr.mh_expectation(
        log_density,
        lambda x: x[0],
        RandomWalk(scale),
        MaximalReflection(),
        jnp.zeros(dimension),
        num_steps=num_steps,
        burn_in=num_steps // 4,
        num_chains=num_chains,
    )
    calls = [jax.jit(expectation), jax.jit(jax.value_and_grad(expectation))]
    for call in calls:
        jax.block_until_ready(call(jnp.asarray(0.5), jax.random.key(0)))
    theta, keys = jnp.asarray(0.5), [jax.random.key(i) for i in range(5)]
    rows = []
    for _ in range(repeats):
        times = []
        for call in calls:
            start = time.perf_counter()
            for key in keys:
                jax.block_until_ready(call(theta, key))
            times.append((time.perf_counter() - start) / len(keys))
        rows.append(times)
    alone, both = (statistics.median(column) for column in zip(*rows))
    return alone, both, statistics.median(b / a for a, b in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    for name in TARGETS:
        alone, both, ratio = measure(name, options.chains, options.steps, options.repeats)
        each = 1e9 / (options.chains * options.steps)
        print(
            f"{name:26} chains {alone * 1e3:7.2f} ms ({alone * each:4.0f} ns a step)   value and gradient "
            f"{both * 1e3:7.2f} ms ({both * each:4.0f} ns)   ratio {ratio:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
