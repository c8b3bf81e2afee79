"""Many parameters: the gradient of an expectation under an energy that is a network, and what it costs."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from rich.console import Console

import lehr
from lehr.errors import InputError
from lehr.mh_gradient import MaximalReflection, RandomWalk, covariance_expectation
from lehr.mh_gradient.births import STRENGTHS
from lehr.studies.output import write

if TYPE_CHECKING:
    from lehr.mh_studies import Dimension

_DIMENSION, _NUM_STEPS, _BURN_IN, _REPEATS = 10, 100, 20, 5
#: kept at once, to compare
_ALTERNATIVES = (1, 2, 4, 8, 16)
#: a small network, 2-32-32-1 without the last bias, has 1,184 parameters
_SMALL_DIMENSION, _SMALL_WIDTH, _SMALL_STEPS, _SMALL_BURN_IN = 2, 32, 200, 50


class Energy(eqx.Module):
    """log p(x) = network(x) - |x|^2 / 2: a Gaussian, bent by two hidden layers of tanh.

    (The last bias would have a gradient of zero.)
    """

    network: eqx.nn.MLP

    def __init__(self, key: Array, dimension: int, width: int):
        self.network = eqx.nn.MLP(dimension, "scalar", width, 2, jnp.tanh, use_final_bias=False, key=key)

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        return self.network(x) - jnp.sum(x**2) / 2


def dimension(options: "Dimension") -> int:
    """Runs the study, writes mh-dimension.json and mh-dimension.png; returns the exit code."""
    if options.num_chains < 2 or options.largest < 1000:
        raise InputError("dimension needs at least 2 chains and 1,000 parameters: give larger numbers")
    say = partial(Console(stderr=True).print, highlight=False, soft_wrap=True)
    widths = [round(size**0.5) for size in (1e3, 1e4, 1e5, 1e6) if size <= options.largest]
    settings = options.num_chains, options.num_repeats, options.seed
    rows = []
    with warnings.catch_warnings():
        # A hundred steps in ten dimensions are few beside those that alternatives take to meet.
        warnings.filterwarnings("ignore", "in .* of the chains the alternative", RuntimeWarning)
        for width in widths:
            rows.append(measure(width, *settings))
            say(in_words(rows[-1]))
        strengths, alternatives = by_strength(*settings), by_alternatives(widths[0], *settings)
    say(
        f"{strengths['num_parameters']:,} parameters, positions of {_SMALL_DIMENSION} numbers, variance over that of "
        "the covariance gradient: "
        + ", ".join(f"{name} {ratio:.1f}" for name, ratio in strengths["variance_ratio"].items())
    )
    say(
        f"{rows[0]['num_parameters']:,} parameters, variance over that of the covariance gradient, and time: "
        + ", ".join(
            f"{r['alternatives']} at once {r['variance_ratio']:.2f}, {1e3 * r['seconds']:.1f} ms" for r in alternatives
        )
    )
    result = {
        "num_chains": options.num_chains,
        "num_steps": _NUM_STEPS,
        "burn_in": _BURN_IN,
        "rows": rows,
        "strengths": strengths,
        "alternatives": alternatives,
    }
    write(options.out, "mh-dimension", result, draw(result), to_stdout=options.json)
    return 0


def measure(width: int, num_chains: int, num_repeats: int, seed: int) -> dict[str, Any]:
    """For one size of network: agreement with the covariance gradient, variances, and times."""
    key_net, key = jax.random.split(jax.random.key(seed))
    params, log_density = network(key_net, _DIMENSION, width)
    walk, x0 = RandomWalk(2.38 / _DIMENSION**0.5), jnp.zeros(_DIMENSION)
    settings: dict[str, Any] = {"num_steps": _NUM_STEPS, "burn_in": _BURN_IN, "num_chains": num_chains}
    coupled = lehr.mh_expectation(log_density, _f, walk, MaximalReflection(), x0, **settings)
    covariance = covariance_expectation(log_density, _f, walk, x0, **settings)
    value = jax.jit(coupled)
    gradients = [jax.jit(lambda p, k, of=of: ravel_pytree(jax.grad(of)(p, k))[0]) for of in (coupled, covariance)]
    found = [Moments.of(lambda k, g=g: g(params, k), jax.random.split(key, num_repeats)) for g in gradients]
    used = births(coupled, params, key)
    one = jax.jit(lambda p, x: jax.grad(lambda p: jnp.sum(jax.vmap(lambda x: log_density(p, x))(x)))(p))
    batch = jax.random.normal(key, (used, _DIMENSION))
    chain, gradient, births_alone = (
        _seconds(call)
        for call in (lambda: value(params, key), lambda: gradients[0](params, key), lambda: one(params, batch))
    )
    mine, other = found
    return {
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "cosine": mine.cosine(other),
        "variance_ratio": mine.variance / other.variance,
        "signal_to_noise": float(np.sum(mine.mean**2) ** 0.5 / (mine.variance / num_repeats) ** 0.5),
        "births": used / (num_chains * _NUM_STEPS),
        "seconds_chain": chain,
        "seconds_gradient": gradient,
        "seconds_births": births_alone,
        "ratio": gradient / chain,
        "ratio_beyond": (gradient - births_alone) / chain,
    }


def by_strength(num_chains: int, num_repeats: int, seed: int) -> dict[str, Any]:
    """On a small network, the variance of the gradient over that of the covariance's, for each pruning strength."""
    key_net, key = jax.random.split(jax.random.key(seed))
    params, log_density = network(key_net, _SMALL_DIMENSION, _SMALL_WIDTH)
    walk, x0 = RandomWalk(2.38 / _SMALL_DIMENSION**0.5), jnp.zeros(_SMALL_DIMENSION)
    settings: dict[str, Any] = {"num_steps": _SMALL_STEPS, "burn_in": _SMALL_BURN_IN, "num_chains": num_chains}

    def variance(expectation: Any) -> float:
        gradient = jax.jit(lambda key: ravel_pytree(jax.grad(expectation)(params, key))[0])
        return Moments.of(gradient, jax.random.split(key, num_repeats)).variance

    covariance = variance(covariance_expectation(log_density, _f, walk, x0, **settings))
    coupled = {
        strength: lehr.mh_expectation(log_density, _f, walk, MaximalReflection(), x0, strength=strength, **settings)
        for strength in STRENGTHS
    }
    return {
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "num_steps": _SMALL_STEPS,
        "burn_in": _SMALL_BURN_IN,
        "variance_ratio": {name: variance(each) / covariance for name, each in coupled.items()},
    }


def by_alternatives(width: int, num_chains: int, num_repeats: int, seed: int) -> list[dict[str, Any]]:
    """The variance over that of the covariance's, and the time of a gradient, for numbers of alternatives."""
    key_net, key = jax.random.split(jax.random.key(seed))
    params, log_density = network(key_net, _DIMENSION, width)
    walk, x0 = RandomWalk(2.38 / _DIMENSION**0.5), jnp.zeros(_DIMENSION)
    settings: dict[str, Any] = {"num_steps": _NUM_STEPS, "burn_in": _BURN_IN, "num_chains": num_chains}

    def measured(expectation: Any) -> tuple[float, float]:
        gradient = jax.jit(lambda key: ravel_pytree(jax.grad(expectation)(params, key))[0])
        variance = Moments.of(gradient, jax.random.split(key, num_repeats)).variance
        return variance, _seconds(lambda: gradient(key))

    covariance, _ = measured(covariance_expectation(log_density, _f, walk, x0, **settings))
    rows = []
    for num in _ALTERNATIVES:
        coupled = lehr.mh_expectation(log_density, _f, walk, MaximalReflection(), x0, num_alternatives=num, **settings)
        variance, seconds = measured(coupled)
        rows.append({"alternatives": num, "variance_ratio": variance / covariance, "seconds": seconds})
    return rows


def network(key: Array, dimension: int, width: int) -> tuple[Any, Callable[[Any, Array], Array]]:
    """Parameters, and the log density that is a function of them."""
    params, static = eqx.partition(Energy(key, dimension, width), eqx.is_inexact_array)
    return params, lambda params, x: eqx.combine(params, static)(x)


def _f(x: Array) -> Array:
    return jnp.mean(jnp.abs(x))


class Moments:
    """Mean and total variance of a gradient over keys; two means of disjoint halves, for cosines without bias."""

    def __init__(self, rows: np.ndarray):
        self.mean, self.variance = rows.mean(axis=0), float(rows.var(axis=0, ddof=1).sum())
        self.halves = rows[::2].mean(axis=0), rows[1::2].mean(axis=0)

    @classmethod
    def of(cls, gradient: Callable[[Array], Array], keys: Array) -> "Moments":
        """Of one gradient for each key."""
        return cls(np.stack([np.asarray(gradient(key), np.float64) for key in keys]))

    def cosine(self, other: "Moments") -> float:
        """Between what the two estimate: the noise of either adds to its length, which that of two halves does not."""
        product = sum(a @ b for a in self.halves for b in other.halves) / 4
        squares = [halves[0] @ halves[1] for halves in (self.halves, other.halves)]
        return float(product / np.sqrt(squares[0] * squares[1])) if min(squares) > 0 else float("nan")


def births(expectation: Any, params: Any, key: Array) -> int:
    """How many steps, of all chains, carry a birth that counts: of these the gradient needs that of the log density."""
    return int(np.count_nonzero(np.asarray(expectation.weights(params, key)).any(axis=-1)))


def _seconds(call: Callable[[], Any]) -> float:
    """The least of a few runs, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)


def in_words(row: dict[str, Any]) -> str:
    """A line."""
    return (
        f"{row['num_parameters']:,} parameters: cosine with the covariance gradient {row['cosine']:.3f}, "
        f"{row['variance_ratio']:.1f} times its variance; a gradient takes {row['ratio']:.2f} passes of the chain, "
        f"{row['ratio_beyond']:.2f} beyond one gradient of the log density at each of the {row['births']:.0%} of the "
        "steps that carry a birth"
    )


def draw(result: dict[str, Any]) -> Figure:
    """Cost against the number of parameters, and agreement with the covariance."""
    rows = result["rows"]
    sizes = [row["num_parameters"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    cost, quality = figure.subplots(1, 2)
    for name, label in (("ratio", "gradient"), ("ratio_beyond", "beyond births' gradients")):
        cost.plot(sizes, [row[name] for row in rows], "o-", label=label)
    cost.axhline(3.5, color="gray", ls=":", lw=1)
    top = 1.1 * max(3.5, *(row["ratio"] for row in rows))
    cost.set(xscale="log", xlabel="parameters", ylabel="time, in passes of the chain", ylim=(0, top))
    cost.legend(frameon=False)
    quality.plot(sizes, [row["cosine"] for row in rows], "o-", label="cosine with the covariance gradient")
    quality.set(xscale="log", xlabel="parameters", ylabel="cosine", ylim=(0, 1.2))
    other = quality.twinx()
    other.plot(sizes, [row["variance_ratio"] for row in rows], "s--", color="C1", label="variance over covariance's")
    other.set(ylabel="variance ratio", ylim=(0, 1.2 * max(row["variance_ratio"] for row in rows)))
    lines = [*quality.get_lines(), *other.get_lines()]
    quality.legend(lines, [str(line.get_label()) for line in lines], frameon=False, loc="lower left")
    return figure
