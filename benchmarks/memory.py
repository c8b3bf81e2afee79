"""What the gradient of the annealed bound keeps, and how long it takes, beside plain reverse mode.

    python benchmarks/memory.py [--tasks logistic wide vae] [--steps 100 1000 10000] [--rounds 5] [--json PATH]

Three targets: a logistic regression (1000 observations, 50 coefficients; 16 chains), a product of 5000 Student
densities (4 chains), the posterior of a VAE (decoder 50-200-200-784, tanh; 128 chains). The gradient of `davi` is taken
in base, schedule, step size, momentum scale, persistence (0.9) and the target's parameters; for K steps, with

- plain: `jax.grad` of a `lax.scan` over the steps with `jax.grad` of the density in it, noise drawn for 100 steps at
  once: what lehr did before it had a choice; written out below;
- store, checkpoint, reversible: `davi(..., memory=...)`.

"compiled" is the temporary memory that the compiler plans, in MB; "resident" what the process' peak grows by in a run,
each in a process of its own (Linux). "time" is the median over rounds of the time over that of plain in the same round,
all compiled first. What needs more than `--limit` GB is only compiled. Exits with 1 if a limit is missed.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from json import dumps, loads
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, PRNGKeyArray
from rich.console import Console
from rich.table import Column, Table

import lehr
from benchmarks.speed import Bernoulli, Claim, linear, machine, verdict
from lehr.annealer import base_draws, prepare
from lehr.vae.model import VAE, DiagonalGaussian
from lehr.weighted import log_mean_exp
from lehr.whole_numbers import rows_of_buffer

PLAIN, STORE, CHECKPOINT, REVERSIBLE = MODES = ("plain", "store", "checkpoint", "reversible")
PERSISTENCE = 0.9


class Students(eqx.Module):
    """A product of Student densities with five degrees of freedom, but for a constant."""

    loc: Float[Array, " dim"]
    log_scale: Float[Array, " dim"]

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        return -jnp.sum(3 * jnp.log1p(((x - self.loc) * jnp.exp(-self.log_scale)) ** 2 / 5) + self.log_scale)


def logistic() -> tuple[Any, int, int]:
    key_features, key_labels = jax.random.split(jax.random.key(1))
    features = np.asarray(jax.random.normal(key_features, (1000, 50)))
    labels = jax.random.bernoulli(key_labels, 0.3, (1000,)).astype(jnp.float32)
    # The features are data: closed over, they are not differentiated.
    return Bernoulli(lambda z: linear(jnp.asarray(features), z), labels), 50, 16


def wide() -> tuple[Any, int, int]:
    return Students(jnp.linspace(-1, 1, 5000), jnp.linspace(-0.5, 0.5, 5000)), 5000, 4


def vae() -> tuple[Any, int, int]:
    key_model, key_image = jax.random.split(jax.random.key(0))
    model = VAE(key_model, np.full(784, 0.2, np.float32))
    return Bernoulli(model.decoder, jax.random.bernoulli(key_image, 0.2, (784,)).astype(jnp.float32)), 50, 128


TASKS = {"logistic": logistic, "wide": wide, "vae": vae}


def plain_davi(annealer: lehr.Annealer, log_target: Any, key: PRNGKeyArray, num_particles: int) -> Array:
    """The value of `davi`, differentiated by nothing but `jax.grad`."""
    problem, annealer = prepare(annealer, log_target)
    kernel, betas = annealer.kernel, annealer.schedule.betas
    num_steps = annealer.schedule.num_steps
    keys, positions = base_draws(key, annealer.base, num_particles)
    size = min(num_steps, 100)

    def chain(key, x):
        key_init, key_noise = jax.random.split(key)

        def step(carry, inputs):
            state, total = carry
            transition = kernel.forwards(problem.at(inputs[0]), state, inputs[1])
            return (transition.state, total + transition.log_ratio), None

        def group(carry, inputs):
            return jax.lax.scan(step, carry, (inputs[1], kernel.noise(inputs[0], size, problem.position)))

        start = kernel.init(key_init, problem.at(betas[0]), x)
        groups = jax.random.split(key_noise, num_steps // size), betas[1:].reshape(-1, size)
        (state, total), _ = jax.lax.scan(group, (start, jnp.zeros(())), groups)
        return total + problem.log_prob(state.point.position) - problem.log_base(x)

    return log_mean_exp(jax.vmap(chain)(keys, positions))


def gradient(task: str, num_steps: int, mode: str) -> tuple[Any, Any]:
    """The compiled value and gradient of the bound, and what it is differentiated in."""
    target, dim, num_particles = TASKS[task]()
    base = DiagonalGaussian(jnp.zeros(dim), jnp.zeros(dim))
    kernel = lehr.Hamiltonian(0.01, PERSISTENCE, np.ones(dim))
    annealer = lehr.Annealer(base, lehr.Schedule.linear(num_steps), kernel)
    trained, rest = eqx.partition((annealer, target), eqx.is_inexact_array)

    def bound(trained, key):
        parts = eqx.combine(trained, rest)
        if mode == PLAIN:
            return plain_davi(*parts, key, num_particles)
        return lehr.objectives.davi(*parts, key, num_particles=num_particles, memory=mode)

    compiled = jax.jit(jax.value_and_grad(bound)).lower(trained, jax.random.key(0)).compile()
    return compiled, trained


def compiled_megabytes(compiled: Any) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def resident_megabytes(run: Callable[[], Any]) -> float:
    """By how much a run raises the peak of the memory in use."""

    def status(name: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return float(line.split()[1]) * 1024 / 1e6

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    jax.block_until_ready(run())
    return status("VmHWM") - before


@dataclass(frozen=True)
class Measured:
    """One way to take the gradient of one target."""

    task: str
    num_steps: int
    mode: str
    compiled: float
    resident: float | None = None
    time: float | None = None
    microseconds: float | None = None


def one_case(task: str, num_steps: int, mode: str, limit: float) -> dict[str, float | None]:
    compiled, trained = gradient(task, num_steps, mode)
    planned = compiled_megabytes(compiled)
    fits = planned < 1e3 * limit
    return {
        "compiled": planned,
        "resident": resident_megabytes(lambda: compiled(trained, jax.random.key(0))) if fits else None,
    }


def times(task: str, num_steps: int, modes: list[str], rounds: int) -> dict[str, Float[np.ndarray, " rounds"]]:
    runs = {mode: gradient(task, num_steps, mode) for mode in modes}
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for seed in range(rounds + 1):
        for mode, (compiled, trained) in runs.items():
            start = time.perf_counter()
            value, _ = jax.block_until_ready(compiled(trained, jax.random.key(seed)))
            seconds[mode].append(time.perf_counter() - start)
            if not np.isfinite(value):
                raise FloatingPointError(f"{task}, {num_steps} steps, {mode}: the bound is {value}")
    return {mode: np.array(row[1:]) for mode, row in seconds.items()}


def measure(task: str, num_steps: int, rounds: int, limit: float) -> Iterator[Measured]:
    """Memory in a process for each mode, times of all in this one."""
    memory = {}
    for mode in MODES:
        command = [sys.executable, __file__, "--case", task, str(num_steps), mode, "--limit", str(limit)]
        memory[mode] = loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
    modes = [mode for mode in MODES if memory[mode]["resident"] is not None]
    timed = times(task, num_steps, modes, rounds) if num_steps <= 1000 else {}
    for mode in MODES:
        ratio = float(np.median(timed[mode] / timed[PLAIN])) if mode in timed and PLAIN in timed else None
        microseconds = 1e6 * float(np.median(timed[mode])) / num_steps if mode in timed else None
        yield Measured(task, num_steps, mode, **memory[mode], time=ratio, microseconds=microseconds)


def claims_of(rows: list[Measured]) -> list[Claim]:
    """What is promised, of what was measured."""
    by_name = {(row.task, row.num_steps, row.mode): row for row in rows}
    claims = []
    for task in TASKS:
        if (task, 10_000, PLAIN) in by_name:
            plain = by_name[task, 10_000, PLAIN].compiled
            part = {mode: plain / by_name[task, 10_000, mode].compiled for mode in MODES}
            claims.append(Claim(task, "plain / checkpoint, MB at 10000", part[CHECKPOINT], at_least=50))
            if task == "wide":
                claims.append(Claim(task, "plain / reversible, MB at 10000", part[REVERSIBLE], at_least=100))
        if (task, 1000, PLAIN) in by_name:
            for mode in (CHECKPOINT, REVERSIBLE):
                ratio = by_name[task, 1000, mode].time
                if ratio is not None:
                    claims.append(Claim(task, f"{mode} / plain, time at 1000", ratio, at_most=1.3))
    for num_steps in sorted({row.num_steps for row in rows}):
        bits = 16 * rows_of_buffer(num_steps, lehr.Reversible().smallest_persistence) / num_steps
        claims.append(Claim("any", f"bits a parameter and step at {num_steps}", bits, at_most=0.17))
    return claims


def show(rows: list[Measured], claims: list[Claim], console: Console) -> None:
    def text(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    table = Table(
        "target", *(Column(name, justify="right") for name in ("K", "mode", "compiled", "resident", "time", "us/step"))
    )
    for row in rows:
        numbers = text(row.compiled, 2), text(row.resident, 1), text(row.time, 2), text(row.microseconds, 0)
        table.add_row(row.task, str(row.num_steps), row.mode, *numbers)
    console.print(table)
    table = Table("target", "claim", *(Column(name, justify="right") for name in ("limit", "measured", "verdict")))
    for c in claims:
        table.add_row(c.density, c.ratio, c.limit, f"{c.measured:.3g}", "pass" if c.holds else "FAIL")
    console.print(table)


def main(
    tasks: tuple[str, ...] = tuple(TASKS),
    steps: tuple[int, ...] = (100, 1000, 10_000),
    rounds: int = 5,
    limit: float = 6.0,
    case: tuple[str, int, str] | None = None,
    json: Path | None = None,
) -> int:
    """Runs the benchmark.

    Args:
        tasks: which targets.
        steps: numbers of steps K; times are taken up to 1000.
        rounds: for the times.
        limit: what needs more GB than this is only compiled.
        case: one target, K and mode in this process: prints its memory.
        json: where to write the results, with the versions and the machine.
    """
    if case is not None:
        print(dumps(one_case(*case, limit)))
        return 0
    console, rows = Console(), []
    facts = machine()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), soft_wrap=True)
    for task in tasks:
        for num_steps in steps:
            with console.status(f"{task}, {num_steps} steps"):
                rows += measure(task, num_steps, rounds, limit)
    claims = claims_of(rows)
    show(rows, claims, console)
    return verdict(json, {"machine": facts, "measured": rows}, claims)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
