"""How long a step of the gradient of the annealed bound takes, in units of one batched gradient of the same density.

    python benchmarks/gradient.py [--quick] [--json PATH]        (peers: pip install "lehr[benchmark]")

The two densities of `speed.py`. On each, value and gradient of the bound, per step, of

- the unit: `lax.scan` over x <- x + 1e-6 grad log f(x), as in `speed.py`;
- lehr: `davi` with `Hamiltonian`, differentiated in base, schedule, step size, momentum scale and persistence, with
  each `memory` (the limits are those of "store": the others run the chain once more by design);
- NumPyro: `AutoDAIS`, its ELBO differentiated in the parameters of its guide, on the same density, and with its own
  likelihood.

The density itself has no trained parameters here. All have the same rows and steps, in float32 on the default device;
compiled first, then run in rounds; a ratio is the median over the rounds of two times of the same round. Exits with 1
if a limit is missed. A peer that is not installed is left out.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

import lehr
from benchmarks.speed import (
    GRADIENT,
    PERSISTENCE,
    STEP_SIZE,
    Claim,
    Run,
    Task,
    autodais,
    gradient,
    logistic_regression,
    machine,
    time_rounds,
    vae_posterior,
    verdict,
)

#: of the gradient that repeats nothing, per step
LIMITS = {"VAE": 3.3, "logistic": 3.2}
STORE = "lehr, store"


def lehr_davi(memory: str) -> Callable[[Task], Run]:
    def contestant(task: Task) -> Run:
        kernel = lehr.Hamiltonian(STEP_SIZE, PERSISTENCE, np.ones(task.dimension))
        annealer = lehr.Annealer(task.base, lehr.Schedule.linear(task.num_steps), kernel)

        @eqx.filter_jit
        @eqx.filter_value_and_grad
        def bound(annealer, key):
            return lehr.objectives.davi(annealer, task.density, key, num_particles=task.num_rows, memory=memory)

        return lambda key: _flat(bound(annealer, key))

    return contestant


def numpyro_dais(own_likelihood: bool) -> Callable[[Task], Run]:
    def contestant(task: Task) -> Run:
        loss, parameters = autodais(task, own_likelihood=own_likelihood)
        run = jax.jit(jax.value_and_grad(loss))
        return lambda key: _flat(run(parameters, key))

    return contestant


def _flat(value_and_gradient):
    return jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(value_and_gradient)])


CONTESTANTS: dict[str, Callable[[Task], Run]] = {
    GRADIENT: gradient,
    STORE: lehr_davi("store"),
    "lehr, checkpoint": lehr_davi("checkpoint"),
    "lehr, reversible": lehr_davi("reversible"),
    "AutoDAIS, our density": numpyro_dais(own_likelihood=False),
    "AutoDAIS, own likelihood": numpyro_dais(own_likelihood=True),
}


@dataclass(frozen=True)
class Timing:
    """One contestant on one density, per step; `ratio` is in units of one gradient."""

    density: str
    contestant: str
    microseconds: float
    ratio: float


def main(quick: bool = False, json: Path | None = None) -> int:
    """Runs the benchmark.

    Args:
        quick: few rounds; the ratios are then rough.
        json: where to write the results, with the versions and the machine.
    """
    console, timings, claims = Console(), [], []
    facts = machine()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), soft_wrap=True)
    for task in (vae_posterior(), logistic_regression()):
        runs = {}
        for name, contestant in CONTESTANTS.items():
            try:
                runs[name] = contestant(task)
            except ModuleNotFoundError as error:
                console.print(f"left out {name}: {error.name} is not installed", markup=False)
        with console.status(task.name):
            seconds = time_rounds(runs, task.rounds // 3 if quick else task.rounds)
        for name, row in seconds.items():
            ratio = float(np.median(row / seconds[GRADIENT]))
            timings.append(Timing(task.name, name, 1e6 * float(np.median(row)) / task.num_steps, ratio))
            if name == STORE:
                claims.append(Claim(task.name, f"{name} / {GRADIENT}", ratio, at_most=LIMITS[task.name]))
    table = Table("density", "contestant", *(Column(name, justify="right") for name in ("us/step", "ratio")))
    for t in timings:
        table.add_row(t.density, t.contestant, f"{t.microseconds:.1f}", f"{t.ratio:.2f}")
    console.print(table)
    for c in claims:
        console.print(f"{c.density}: {c.ratio} {c.measured:.2f}, limit {c.limit}: {'pass' if c.holds else 'FAIL'}")
    return verdict(json, {"machine": facts, "timings": timings}, claims)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
