"""Which coupling: variance times cost of a gradient through Metropolis-Hastings, by dimension and shape of target."""

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from rich.console import Console

from lehr.errors import InputError
from lehr.mh_gradient import (
    MALA,
    CommonRandomNumbers,
    FullKernelMaximal,
    GCRefl,
    MaximalReflection,
    RandomWalk,
    mh_expectation,
)
from lehr.mh_gradient.sampler import ProposalGradient
from lehr.studies.output import write

if TYPE_CHECKING:
    from lehr.mh_studies import Couplings

DIMENSIONS = (1, 2, 5, 10, 20, 50)
#: degrees of freedom of Student's t
_DF = 5.0


class Shifted(eqx.Module):
    """A log density around a shift: independent coordinates z = W (x - shift), all Gaussian or all Student's t."""

    whitening: Float[Array, "dim dim"]
    heavy: Float[Array, ""]

    def __call__(self, shift: Any, x: Float[Array, " dim"]) -> Float[Array, ""]:
        z = self.whitening @ (x - shift)
        # One program serves all shapes.
        return -jnp.sum(jnp.where(self.heavy > 0, (_DF + 1) / 2 * jnp.log1p(z**2 / _DF), z**2 / 2))


class Shape(NamedTuple):
    """A target, draws of it for a shift of 0, and what the scales of proposals go by."""

    target: Shifted
    draws: Callable[[np.random.Generator, int], np.ndarray]
    #: mean over axes of the inverse scale to these powers; scale^-2 is E[(d log p)^2]
    second: float
    sixth: float


def shapes(dim: int) -> dict[str, Shape]:
    """Standard Gaussian; Gaussian of condition number 10 along random axes; a product of Student's t."""
    scales = np.ones(1) if dim == 1 else 10 ** (np.arange(dim) / (dim - 1) / 2)
    axes = np.linalg.qr(np.random.default_rng(dim).normal(size=(dim, dim)))[0]
    one, identity = jnp.zeros(()), jnp.eye(dim)
    # Of Student's t: E[(d log p)^2] = (df + 1) / (df + 3).
    rough = (_DF + 1) / (_DF + 3)
    return {
        "Gaussian": Shape(Shifted(identity, one), lambda rng, n: rng.normal(size=(n, dim)), 1.0, 1.0),
        "correlated Gaussian": Shape(
            Shifted(jnp.asarray((axes / scales).T, jnp.float32), one),
            lambda rng, n: rng.normal(size=(n, dim)) @ (axes * scales).T,
            float(np.mean(scales**-2)),
            float(np.mean(scales**-6)),
        ),
        "Student's t, df 5": Shape(
            Shifted(identity, one + 1), lambda rng, n: rng.standard_t(_DF, size=(n, dim)), rough, rough**3
        ),
    }


class Method(NamedTuple):
    """A proposal for a shape, a coupling, and how a drift is differentiated.

    Along the path, the drift of MALA carries a shift of the target through every step: where the chain has forgotten
    its start, no decision depends on the shift, and no coupling is needed. By the score one is.
    """

    proposal: Callable[[Shape, int], Any]
    coupling: Any
    proposal_gradient: ProposalGradient = "pathwise"


def _walk(shape: Shape, dim: int) -> RandomWalk:
    return RandomWalk(jnp.asarray(2.38 / (dim * shape.second) ** 0.5))


def _langevin(shape: Shape, dim: int) -> MALA:
    return MALA(jnp.asarray(1.65 / (dim * shape.sixth) ** (1 / 6)))


METHODS = {
    "common random numbers": Method(_walk, CommonRandomNumbers()),
    "reflection": Method(_walk, MaximalReflection()),
    "GCRefl": Method(_walk, GCRefl()),
    "full-kernel maximal": Method(_walk, FullKernelMaximal()),
    "MALA, reflection": Method(_langevin, MaximalReflection(), "score"),
}


def mean_coordinate(x: Float[Array, " dim"]) -> Float[Array, ""]:
    """f: its expectation moves with the shift, one to one."""
    return jnp.mean(x)


def couplings(options: "Couplings") -> int:
    """Runs the study, writes mh-couplings.json and mh-couplings.png; returns the exit code."""
    if options.num_chains < 4:
        raise InputError(f"num_chains must be at least 4, for errors, but it is {options.num_chains}")
    console, rows = Console(stderr=True), []
    for dim in DIMENSIONS:
        for name, method in METHODS.items():
            found = [measure(name, method, s, shape, dim, options) for s, shape in shapes(dim).items()]
            text = "; ".join(
                f"{row['gradient']:.3f} +- {row['error']:.3f}, unmet {row['unmet']:.2f}, work {row['work']:.2g} s"
                for row in found
            )
            console.print(f"dimension {dim}, {name}: {text}", highlight=False, soft_wrap=True)
            rows += found
    result = {"num_chains": options.num_chains, "rows": rows, "best": best(rows)}
    for row in result["best"]:
        text = f"{row['target']}, dimension {row['dimension']}: least work {row['coupling']}, {row['work']:.2g} s"
        console.print(text, highlight=False, soft_wrap=True)
    write(options.out, "mh-couplings", result, draw(result), to_stdout=options.json)
    return 0


def length(dim: int) -> int:
    """Steps of a chain, half of them burn-in.

    A walk forgets a Gaussian in about 1.5 dim steps: a step of 2.38 / sqrt(dim), accepted once in four, shrinks its
    mean by 0.66 / dim; in the widest direction of the correlated target, in six dim.
    """
    return 400 + 60 * dim


def measure(name: str, method: Method, target: str, shape: Shape, dim: int, options: "Couplings") -> dict[str, Any]:
    """The gradient in the shift (1, where the chain has forgotten its start), its variance, time, and meetings."""
    num, num_steps = options.num_chains, length(dim)
    rng = np.random.default_rng((options.seed, dim))
    x0 = jnp.asarray(shape.draws(rng, num), jnp.float32)
    expectation = mh_expectation(
        shape.target, mean_coordinate, method.proposal(shape, dim), method.coupling, x0,
        num_steps=num_steps, burn_in=num_steps // 2, num_chains=num, has_aux=True,
        proposal_gradient=method.proposal_gradient,
    )  # fmt: skip
    run = jax.value_and_grad(expectation, has_aux=True)
    key = jax.random.key(options.seed)
    with warnings.catch_warnings():
        # What they say, that alternatives did not meet the chain, is counted here.
        warnings.filterwarnings("ignore", "in .* of the chains the alternative", RuntimeWarning)
        if target == "Gaussian":  # compiles
            jax.block_until_ready(run(jnp.zeros(()), key))
        began = time.perf_counter()
        (_, aux), gradient = jax.block_until_ready(run(jnp.zeros(()), key))
        seconds = (time.perf_counter() - began) / num
    error = float(aux.gradient_error)
    meetings = [float(each) for each in aux.meeting_times]
    return {
        "target": target,
        "dimension": dim,
        "coupling": name,
        "num_steps": num_steps,
        "gradient": float(gradient),
        "error": error,
        "z": (float(gradient) - 1) / error,
        "variance": num * error**2,
        "microseconds_a_step": 1e6 * seconds / num_steps,
        "work": num * error**2 * seconds,
        "acceptance": float(aux.acceptance),
        "meeting_median": meetings[0],
        "meeting_99": meetings[2],
        "unmet": float(aux.unmet),
        "largest_kappa": float(aux.largest_kappa),
    }


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each target and dimension the coupling with the least work."""
    cells = dict.fromkeys((row["target"], row["dimension"]) for row in rows)
    found = [min((r for r in rows if (r["target"], r["dimension"]) == c), key=lambda r: r["work"]) for c in cells]
    return [{name: row[name] for name in ("target", "dimension", "coupling", "work")} for row in found]


def draw(result: dict[str, Any]) -> Figure:
    """A column a target: seconds times variance, and the steps until alternatives met the chain."""
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    targets = list(dict.fromkeys(row["target"] for row in result["rows"]))
    panels = figure.subplots(2, len(targets), sharex=True, sharey="row")
    for (top, bottom), target in zip(panels.T, targets):
        for i, name in enumerate(METHODS):
            rows = [row for row in result["rows"] if (row["target"], row["coupling"]) == (target, name)]
            dims = [row["dimension"] for row in rows]
            top.plot(dims, [row["work"] for row in rows], "o-", ms=4, lw=1.3, color=f"C{i}", label=name)
            # Of alternatives that met. Where many did not, these are the quick ones, and say nothing.
            met = [row for row in rows if row["unmet"] < 0.05]
            for key, style in (("meeting_99", "o-"), ("meeting_median", "o:")):
                bottom.plot([row["dimension"] for row in met], [row[key] for row in met], style, ms=4, color=f"C{i}")
        top.set(title=target, xscale="log", yscale="log")
        bottom.set(xlabel="dimension", yscale="log")
        ticks = sorted({row["dimension"] for row in result["rows"]})
        bottom.set_xticks(ticks, [str(tick) for tick in ticks])
        bottom.minorticks_off()
    panels[0, 0].set_ylabel("variance x seconds of a chain")
    panels[1, 0].set_ylabel("steps to meet: median (dotted), 99 %\n(where 95 % of the chains met)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
