"""How long a step of a chain takes, in units of one batched gradient of the same density.

    python benchmarks/speed.py [--quick] [--json PATH]        (peers: pip install "lehr[benchmark]")

Two densities: the posterior of a VAE (decoder 50-200-200-784, tanh; 128 chains, 200 steps), and a logistic regression
(1000 observations, 30 coefficients; 16 chains, 500 steps). On each, the time per step of

- the unit: `lax.scan` over x <- x + 1e-6 grad log f(x), one vmapped `jax.grad` a step and nothing else;
- DAIS in lehr: `anneal` with `Hamiltonian`;
- DAIS in NumPyro: `AutoDAIS`, its ELBO without gradient, on our density, and with its own Bernoulli likelihood;
- AIS in lehr: `anneal` with `Metropolis(Hamiltonian(num_leapfrog=1))`;
- AIS in TFP: `sample_annealed_importance_chain` with `HamiltonianMonteCarlo`, one leapfrog.

All have the same rows, steps and leapfrogs, in float32 on the default device. They are compiled first, then run in
rounds, one after the other; a ratio is the median over the rounds of two times of the same round.

The columns "gradients" and "values" are counted, by callbacks from a density: how often a chain asks it for a gradient
(with or without the value in the same pass), and for a value alone, per step. It is one gradient for all of them; TFP
asks for the value once more, for its weights, so its ratio depends on the price of a value, which compilers change.
The base, which costs next to nothing, is not counted.

Exits with 1 if a limit is missed. A peer that is not installed is left out. Other work on the machine blurs the ratios.
"""

import contextlib
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from json import dumps
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
from lehr.numerics import bernoulli_log_prob
from lehr.vae.model import VAE, DiagonalGaussian

STEP_SIZE, PERSISTENCE = 0.01, 0.9
LIMIT_TFP = 1.8

Run = Callable[[PRNGKeyArray], Any]


class Bernoulli(eqx.Module):
    """Both densities: sum_j log Bernoulli(data_j | sigmoid(logits(z)_j)) + log N(z; 0, I), but for a constant."""

    logits: Callable[[Array], Array]
    data: Float[Array, " n"]

    def __call__(self, z: Float[Array, " dim"]) -> Float[Array, ""]:
        return -jnp.sum(z**2) / 2 + jnp.sum(bernoulli_log_prob(self.logits(z), self.data))


@dataclass(frozen=True)
class Task:
    """A density, and how many rows (chains) and steps to run on it."""

    name: str
    density: Bernoulli
    dimension: int
    num_rows: int
    num_steps: int
    rounds: int
    limit_dais: float

    @property
    def base(self) -> DiagonalGaussian:
        return DiagonalGaussian(jnp.zeros(self.dimension), jnp.zeros(self.dimension))


def vae_posterior() -> Task:
    key_model, key_image = jax.random.split(jax.random.key(0))
    model = VAE(key_model, np.full(784, 0.2, np.float32))
    image = jax.random.bernoulli(key_image, 0.2, (784,)).astype(jnp.float32)
    density = Bernoulli(model.decoder, image)
    return Task("VAE", density, 50, num_rows=128, num_steps=200, rounds=15, limit_dais=1.15)


def logistic_regression() -> Task:
    key_features, key_weights, key_labels = jax.random.split(jax.random.key(1), 3)
    features = jax.random.normal(key_features, (1000, 30))
    logits = features @ jax.random.normal(key_weights, (30,))
    labels = jax.random.bernoulli(key_labels, jax.nn.sigmoid(logits)).astype(jnp.float32)
    density = Bernoulli(jax.tree_util.Partial(linear, features), labels)
    return Task("logistic", density, 30, num_rows=16, num_steps=500, rounds=60, limit_dais=1.4)


def linear(features: Float[Array, "n dim"], z: Float[Array, " dim"]) -> Float[Array, " n"]:
    # Not features @ z: under vmap that puts the rows last, and the gradient takes 1.5 times as long on a CPU.
    return z @ features.T


def gradient(task: Task) -> Run:
    @eqx.filter_jit
    def run(key: PRNGKeyArray, density: Bernoulli) -> Array:
        def step(x, _):
            return x + 1e-6 * jax.vmap(jax.grad(density))(x), None

        return jax.lax.scan(step, task.base.sample(key, (task.num_rows,)), length=task.num_steps)[0]

    return lambda key: run(key, task.density)


def lehr_dais(task: Task) -> Run:
    return _lehr(task, lehr.Hamiltonian(STEP_SIZE, PERSISTENCE))


def lehr_ais(task: Task) -> Run:
    return _lehr(task, lehr.Metropolis(lehr.Hamiltonian(STEP_SIZE)))


def _lehr(task: Task, kernel: Any) -> Run:
    annealer = lehr.Annealer(task.base, lehr.Schedule.linear(task.num_steps), kernel)
    return lambda key: lehr.anneal(key, annealer, task.density, task.num_rows).log_weights


def numpyro_dais(task: Task) -> Run:
    return _numpyro(task, own_likelihood=False)


def numpyro_dais_own_likelihood(task: Task) -> Run:
    return _numpyro(task, own_likelihood=True)


def _numpyro(task: Task, *, own_likelihood: bool) -> Run:
    loss, parameters = autodais(task, own_likelihood=own_likelihood)
    run = jax.jit(loss)
    return lambda key: run(parameters, key)


def autodais(task: Task, *, own_likelihood: bool) -> tuple[Callable[[Any, PRNGKeyArray], Array], Any]:
    """NumPyro's loss, a function of the parameters of its guide and a key, and these parameters."""
    import numpyro
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO, init_to_value
    from numpyro.infer.autoguide import AutoDAIS

    def our_density():
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (task.dimension,)))
        numpyro.factor("log_density", task.density(z))

    def its_likelihood():
        z = numpyro.sample("z", dist.Normal(0, 1).expand([task.dimension]).to_event(1))
        numpyro.sample("data", dist.Bernoulli(logits=task.density.logits(z)), obs=task.density.data)

    model = its_likelihood if own_likelihood else our_density
    start = init_to_value(values={"z": jnp.zeros(task.dimension)})
    guide = AutoDAIS(
        model, K=task.num_steps, eta_init=STEP_SIZE, gamma_init=PERSISTENCE, init_loc_fn=start, init_scale=1.0
    )
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=task.num_rows))
    state = svi.init(jax.random.key(0))

    def loss(parameters: Any, key: PRNGKeyArray) -> Array:
        return svi.loss.loss(key, svi.constrain_fn(parameters), model, guide)

    return loss, svi.optim.get_params(state.optim_state)


def tfp_ais(task: Task) -> Run:
    from tensorflow_probability.substrates import jax as tfp

    @eqx.filter_jit
    def run(key: PRNGKeyArray, density: Bernoulli) -> Array:
        key_base, key_chain = jax.random.split(key)
        _, log_weights, _ = tfp.mcmc.sample_annealed_importance_chain(
            num_steps=task.num_steps,
            proposal_log_prob_fn=jax.vmap(task.base.log_prob),
            target_log_prob_fn=jax.vmap(density),
            current_state=task.base.sample(key_base, (task.num_rows,)),
            make_kernel_fn=lambda f: tfp.mcmc.HamiltonianMonteCarlo(f, step_size=STEP_SIZE, num_leapfrog_steps=1),
            seed=key_chain,
        )
        return log_weights

    return lambda key: run(key, task.density)


GRADIENT, LEHR_DAIS, LEHR_AIS, TFP_AIS = "one gradient", "lehr DAIS", "lehr AIS", "TFP AIS"
CONTESTANTS: dict[str, Callable[[Task], Run]] = {
    GRADIENT: gradient,
    LEHR_DAIS: lehr_dais,
    "AutoDAIS, our density": numpyro_dais,
    "AutoDAIS, own likelihood": numpyro_dais_own_likelihood,
    LEHR_AIS: lehr_ais,
    TFP_AIS: tfp_ais,
}


@dataclass(frozen=True)
class Timing:
    """One contestant on one density, per step; `ratio` is in units of one gradient."""

    density: str
    contestant: str
    gradients: float
    values: float
    microseconds: float
    ratio: float


@dataclass(frozen=True)
class Claim:
    """What is promised of the ratio of two contestants, and what was measured."""

    density: str
    ratio: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def limit(self) -> str:
        return f"<= {self.at_most}" if self.at_least is None else f">= {self.at_least}"

    @property
    def holds(self) -> bool:
        return self.measured <= self.at_most if self.at_least is None else self.measured >= self.at_least


def measure(task: Task, calls: dict[str, dict[str, float]], rounds: int) -> tuple[list[Timing], list[Claim]]:
    """Times the contestants in `calls`, and checks the claims that their times allow."""
    times = time_rounds({name: CONTESTANTS[name](task) for name in calls}, rounds)

    def ratio(name: str, unit: str) -> float:
        return float(np.median(times[name] / times[unit]))

    def microseconds(name: str) -> float:
        return 1e6 * float(np.median(times[name])) / task.num_steps

    timings = [
        Timing(task.name, name, **calls[name], microseconds=microseconds(name), ratio=ratio(name, GRADIENT))
        for name in calls
    ]
    claims = [Claim(task.name, f"{LEHR_DAIS} / {GRADIENT}", ratio(LEHR_DAIS, GRADIENT), at_most=task.limit_dais)]
    if TFP_AIS in calls:
        claims.append(Claim(task.name, f"{TFP_AIS} / {LEHR_AIS}", ratio(TFP_AIS, LEHR_AIS), at_least=LIMIT_TFP))
    return timings, claims


def time_rounds(runs: dict[str, Run], rounds: int) -> dict[str, Float[np.ndarray, " rounds"]]:
    """The seconds of each run in each round, after one round that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for seed in range(rounds + 1):
        key = jax.random.key(seed)
        for name, run in runs.items():
            start = time.perf_counter()
            result = jax.block_until_ready(run(key))
            seconds[name].append(time.perf_counter() - start)
            if not np.all(np.isfinite(result)):
                raise FloatingPointError(f"{name} is not finite, so its time says nothing: {result}")
    return {name: np.array(row[1:]) for name, row in seconds.items()}


def count_calls(contestant: Callable[[Task], Run], num_steps: int = 500) -> dict[str, float]:
    """How often a chain of one row asks the density for a gradient, and for a value alone, per step."""
    ticks: Counter[str] = Counter()

    def tick(what: str) -> None:
        jax.debug.callback(lambda: ticks.update([what]))

    @jax.custom_vjp
    def logits(z: Array) -> Array:
        tick("values")
        return z

    def backward(_, cotangent: Array) -> tuple[Array]:
        tick("gradients")
        return (cotangent,)

    logits.defvjp(lambda z: (z, None), backward)
    density = Bernoulli(logits, jnp.ones(3))
    run = contestant(Task("counted", density, dimension=3, num_rows=1, num_steps=num_steps, rounds=1, limit_dais=1))
    jax.effects_barrier()
    ticks.clear()
    jax.block_until_ready(run(jax.random.key(0)))
    jax.effects_barrier()
    return {what: ticks[what] / num_steps for what in ("gradients", "values")}


def machine() -> dict[str, Any]:
    versions = {}
    for package in ("lehr", "jax", "jaxlib", "numpyro", "tfp-nightly"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions,
    }


def show(timings: list[Timing], claims: list[Claim], console: Console) -> None:
    table = Table(
        "density",
        "contestant",
        *(Column(name, justify="right") for name in ("gradients", "values", "us/step", "ratio")),
    )
    for t in timings:
        row = (f"{t.gradients:.2f}", f"{t.values:.2f}", f"{t.microseconds:.1f}", f"{t.ratio:.2f}")
        table.add_row(t.density, t.contestant, *row)
    console.print(table)
    table = Table("density", "claim", *(Column(name, justify="right") for name in ("limit", "measured", "verdict")))
    for c in claims:
        table.add_row(c.density, c.ratio, c.limit, f"{c.measured:.2f}", "pass" if c.holds else "FAIL")
    console.print(table)


def verdict(json: Path | None, results: dict[str, Any], claims: list[Claim]) -> int:
    """The exit code: 0 if all claims hold. Writes the results and the claims to a file, if there is one."""
    if json is not None:
        results = results | {"claims": [{**asdict(claim), "holds": claim.holds} for claim in claims]}
        json.write_text(dumps(results, indent=2, default=asdict) + "\n")
    return 0 if all(claim.holds for claim in claims) else 1


def main(quick: bool = False, json: Path | None = None) -> int:
    """Runs the benchmark.

    Args:
        quick: few rounds; the ratios are then rough.
        json: where to write the results, with the versions and the machine.
    """
    console = Console()
    facts = machine()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), soft_wrap=True)
    calls = {}
    for name, contestant in CONTESTANTS.items():
        try:
            calls[name] = count_calls(contestant)
        except ModuleNotFoundError as error:
            reason = f'{error.name} is not installed (pip install "lehr[benchmark]")'
            console.print(f"left out {name}: {reason}", markup=False, soft_wrap=True)
    timings, claims = [], []
    for task in (vae_posterior(), logistic_regression()):
        rounds = task.rounds // 3 if quick else task.rounds
        with console.status(f"{task.name}: compiling, then {rounds} rounds"):
            more_timings, more_claims = measure(task, calls, rounds)
        timings += more_timings
        claims += more_claims
    show(timings, claims, console)
    return verdict(json, {"machine": facts, "timings": timings}, claims)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
