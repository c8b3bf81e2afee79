"""How near the estimators of log evidence come to the truth, at equal work.

    python -m benchmarks.leaderboard [--targets sonar ...] [--estimators lehr ...] [--budgets 1e4 1e5 1e6] [--seeds 10]
        [--json results.json]
    python -m benchmarks.leaderboard --spread [--seeds 50] [--budgets 6e5] [--json results.json]

For each target (`benchmarks/targets`), budget and estimator, over seeds: the mean of estimate - truth with its standard
error, its root mean square, the mean error that the estimator states, the standard deviation of its estimates, the mean
work and the median seconds. With `--json` every run is written to the file as it ends, and what is there already is
not run again.

- **lehr**: `lehr.evidence` with a tolerance that it cannot reach, so that it spends its budget.
- **blackjax**: adaptive tempered SMC, see `TemperedSMC`.
- **lehr-laplace**, **blackjax-laplace**: either from one and the same Gaussian base, that of the curvature at the mode
  (`lehr.bases`), in the coordinates in which it is N(0, I): what then differs is the sampler, not the base.
- **dynesty**: static nested sampling, see `nested`.

Work is gradients of the target, and for dynesty values of it. It holds what finds bases, temperatures and step sizes;
it does not hold the trial runs from which BlackJAX's number of particles and dynesty's number of live points are
chosen so that a run takes its budget, nor values without a gradient: BlackJAX takes two a particle and temperature.
Seconds are of the run itself: of lehr with everything, of the others without those trials, and without the base.

With `--spread`: sonar and ionosphere, without dynesty, and the ratio of BlackJAX's standard deviation to that of lehr
at equal work (the variance of either falls as 1 / work, and what their mean works differ by is taken out), with its
standard error for normal estimates.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import Normal, StandardNormal
from jaxtyping import Array, PRNGKeyArray
from rich.console import Console
from rich.table import Column, Table

from benchmarks.targets import NAMES, target
from lehr import bases
from lehr.path import Problem
from lehr.reference import Reference
from lehr.transport import PulledBack

#: nats; no run gets there, so that each spends its budget
UNREACHABLE = 1e-6


class Estimate(NamedTuple):
    """log Z as estimated, the error stated by the estimator (None if it states none), and the work it took."""

    log_evidence: float
    error: float | None
    work: int


class Skipped(Exception):
    """Why an estimator does not run on a target."""


Run = Callable[[int], Estimate]


class Laplace(NamedTuple):
    """A problem from the base of the curvature at its modes, and the gradients that it took to find them."""

    problem: Problem
    work: int


@functools.cache
def laplace(name: str) -> Laplace:
    """Modes are searched from four draws of the base."""
    problem = target(name).problem
    modes, work = bases.find_modes(problem.log_target, problem.base.sample(jax.random.key(0), (4,)))
    standard = Normal(jnp.zeros(problem.position.shape[0]), 1.0)
    return Laplace(Problem(standard, PulledBack(problem.log_target, bases.laplace(modes))), work)


def lehr_evidence(problem: Problem, budget: int) -> Run:
    import lehr

    def run(seed: int) -> Estimate:
        found = lehr.evidence(
            jax.random.key(seed), problem, tolerance=UNREACHABLE, max_gradients=budget, progress=False
        )
        return Estimate(float(found.log_evidence), float(found.standard_error), found.num_gradients)

    return run


class TemperedSMC(NamedTuple):
    """BlackJAX's adaptive tempered SMC with HMC moves, tuned with BlackJAX's own tools.

    `blackjax.inner_kernel_tuning` around `blackjax.adaptive_tempered_smc`: systematic resampling; the next temperature
    leaves an effective sample size of `target_ess`; `num_moves` HMC moves of `num_leapfrog` gradients each. After each
    temperature the particles give the inverse mass (their variances, `inverse_mass_matrix_from_particles`; Buchholz,
    Chopin, Jacob 2021), and the mean acceptance moves the step size (`update_scale_from_acceptance_rate`) towards
    `target_acceptance`. Each particle has a step size of its own, up to the share `jitter` off, against resonances of
    a fixed trajectory in a nearly Gaussian density. The prior is the base, the likelihood target / base.

    The defaults had the smallest geometric mean of RMS error at equal work over sonar and ionosphere, each from its
    base and from the Laplace base, among some forty settings (N = 256, 24 seeds): effective sizes 0.5 to 0.98, moves x
    leapfrogs from 1 x 2 to 10 x 4, acceptances 0.65 to 0.9, jitter 0 to 0.5. A full covariance for the inverse mass was
    worse (biased by several nats on sonar).

    A run of N particles over T temperatures takes N T (1 + num_moves num_leapfrog) gradients: one to start a chain.
    """

    target_ess: float = 0.9
    num_moves: int = 1
    num_leapfrog: int = 4
    target_acceptance: float = 0.8
    jitter: float = 0.5
    max_temperatures: int = 1000

    @property
    def gradients(self) -> int:
        """A particle's at a temperature."""
        return 1 + self.num_moves * self.num_leapfrog

    def prepare(self, problem: Problem, budget: int) -> Run:
        """Finds the number of particles whose run takes the budget, by trial runs from few upwards."""
        num_particles, num_temperatures = 0, 20.0
        for _ in range(3):
            tried, num_particles = num_particles, max(8, round(budget / (num_temperatures * self.gradients)))
            if abs(num_particles / max(tried, 1) - 1) < 0.05:
                num_particles = tried
                break
            run = self.compiled(problem, num_particles)
            num_temperatures = float(np.mean([int(run(jax.random.key(1000 + i))[1]) for i in range(3)]))
        run = self.compiled(problem, num_particles)

        def estimate(seed: int) -> Estimate:
            log_evidence, temperatures, finished = run(jax.random.key(seed))
            if not finished:
                raise FloatingPointError(f"not at temperature 1 after {temperatures} steps")
            return Estimate(float(log_evidence), None, num_particles * int(temperatures) * self.gradients)

        return estimate

    def compiled(self, problem: Problem, num_particles: int) -> Callable[[PRNGKeyArray], tuple[Array, Array, Array]]:
        """A run: its log evidence, its number of temperatures, and whether it reached the last."""
        import blackjax
        from blackjax.smc import extend_params, resampling
        from blackjax.smc.tuning.from_kernel_info import update_scale_from_acceptance_rate
        from blackjax.smc.tuning.from_particles import inverse_mass_matrix_from_particles

        hmc = functools.partial(blackjax.hmc.build_kernel(), num_integration_steps=self.num_leapfrog)
        dimension = problem.position.shape[0]
        # The step size that keeps the acceptance constant in the dimension, in units of the particles' scale.
        first_step = 0.8 * dimension**-0.25

        def parameters(key: PRNGKeyArray, step_size: Array, particles: Array) -> dict[str, Array]:
            factor = jax.random.uniform(key, (num_particles,), particles.dtype, 1 - self.jitter, 1 + self.jitter)
            # The documented matrix is diagonal; as a vector it costs less to multiply by.
            inverse_mass = jnp.diagonal(inverse_mass_matrix_from_particles(particles))
            return {"step_size": factor * step_size, **extend_params({"inverse_mass_matrix": inverse_mass})}

        def adapted(step_size: Array, info: Any) -> Array:
            acceptance = jnp.mean(info.update_info.acceptance_rate, keepdims=True)[0]
            return update_scale_from_acceptance_rate(step_size, acceptance, self.target_acceptance)

        @jax.jit
        def run(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
            key_base, key_start, key_steps = jax.random.split(key, 3)
            particles = problem.base.sample(key_base, (num_particles,))
            step_size = jnp.full(1, first_step, particles.dtype)
            start = parameters(key_start, step_size, particles)

            def build(step_size: Array):
                def update(key: PRNGKeyArray, state: Any, info: Any) -> dict[str, Array]:
                    return parameters(key, adapted(step_size, info), state.particles)

                return blackjax.inner_kernel_tuning(
                    blackjax.adaptive_tempered_smc,
                    problem.log_base,
                    lambda x: problem.log_prob(x) - problem.log_base(x),
                    hmc,
                    blackjax.hmc.init,
                    resampling.systematic,
                    mcmc_parameter_update_fn=update,
                    initial_parameter_value=start,
                    num_mcmc_steps=self.num_moves,
                    target_ess=self.target_ess,
                )

            def step(carry: Any) -> Any:
                i, state, step_size, log_evidence = carry
                state, info = build(step_size).step(jax.random.fold_in(key_steps, i), state)
                return i + 1, state, adapted(step_size, info), log_evidence + info.log_likelihood_increment

            def unfinished(carry: Any) -> Array:
                return (carry[0] < self.max_temperatures) & (carry[1].sampler_state.tempering_param < 1)

            state = build(step_size).init(particles)
            state = jax.tree.map(lambda leaf: jnp.asarray(leaf, particles.dtype), state)
            carry = (0, state, step_size, jnp.zeros((), particles.dtype))
            i, state, _, log_evidence = jax.lax.while_loop(unfinished, step, carry)
            return log_evidence, i, state.sampler_state.tempering_param >= 1

        return run


def nested(problem: Problem, budget: int) -> Run:
    """dynesty's static nested sampling, with its defaults but for two.

    Below ten dimensions it walks, as it does by default from ten to twenty (above which it slices): its default there
    is uniform draws from ellipsoids, which it warns against on the mixture. The number of live points is what a
    run to dlogz = 0.01 has budget for (its length is proportional to it), by a trial run with the fewest live points,
    at least 50 and 2 a dimension. A run that the budget stops is an estimate with what is left in the live points, and
    its error is that which dynesty states.
    """
    import dynesty
    from scipy.special import ndtri

    base_dist = getattr(problem.base, "base_dist", None)
    if not isinstance(base_dist, StandardNormal):
        raise Skipped("its prior transform is written only for a normal base")
    (dimension,), dtype = problem.position.shape, problem.position.dtype
    log_ratio = jax.jit(lambda x: problem.log_prob(x) - problem.log_base(x))
    # The base is an affine map of N(0, I): in NumPy, because a call of JAX for each point costs more than the map.
    loc = np.asarray(problem.base.bijection.transform(jnp.zeros(dimension)), np.float64)
    columns = np.asarray(jax.vmap(problem.base.bijection.transform)(jnp.eye(dimension)), np.float64).T - loc[:, None]

    def sample(seed: int, num_live: int) -> tuple[Any, bool]:
        sampler = dynesty.NestedSampler(
            lambda x: float(log_ratio(x.astype(dtype))),
            lambda u: loc + columns @ ndtri(u),
            dimension,
            nlive=num_live,
            sample="rwalk" if dimension <= 20 else "rslice",
            rstate=np.random.default_rng(seed),
        )
        sampler.run_nested(dlogz=0.01, maxcall=budget, print_progress=False)
        return sampler.results, int(np.sum(sampler.results.ncall)) < budget

    fewest = max(50, 2 * dimension)
    if budget < 10 * fewest:
        raise Skipped(f"{budget} values are too few for {fewest} live points")
    trial, finished = sample(1000, fewest)
    num_live = fewest
    if finished:
        num_live = int(np.clip(0.9 * fewest * budget / np.sum(trial.ncall), fewest, 5000))

    def run(seed: int) -> Estimate:
        results, _ = sample(seed, num_live)
        return Estimate(float(results.logz[-1]), float(results.logzerr[-1]), int(np.sum(results.ncall)))

    return run


def from_laplace(prepare: Callable[[Problem, int], Run]) -> Callable[[str, int], Run]:
    """The same estimator from the Laplace base, whose gradients are part of the budget."""

    def prepared(name: str, budget: int) -> Run:
        problem, work = laplace(name)
        if work > budget / 2:
            raise Skipped(f"the base alone takes {work} gradients")
        run = prepare(problem, budget - work)

        def added(seed: int) -> Estimate:
            estimate = run(seed)
            return estimate._replace(work=estimate.work + work)

        return added

    return prepared


def from_base(prepare: Callable[[Problem, int], Run]) -> Callable[[str, int], Run]:
    return lambda name, budget: prepare(target(name).problem, budget)


ESTIMATORS: dict[str, Callable[[str, int], Run]] = {
    "lehr": from_base(lehr_evidence),
    "lehr-laplace": from_laplace(lehr_evidence),
    "blackjax": from_base(TemperedSMC().prepare),
    "blackjax-laplace": from_laplace(TemperedSMC().prepare),
    "dynesty": from_base(nested),
}

#: estimators that `--spread` compares, the first of a pair over the second
PAIRS = (("blackjax", "lehr"), ("blackjax-laplace", "lehr-laplace"), ("blackjax-laplace", "lehr"))


class Rows:
    """Results by key, in a JSON file that is replaced as a whole after each: a run may stop anywhere and go on."""

    def __init__(self, path: Path | None, keys: tuple[str, ...]):
        self.path, self.keys = path, keys
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path is not None and path.exists() else []

    def find(self, *key: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if tuple(row.get(k) for k in self.keys) == key), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            temporary = self.path.with_name(self.path.name + ".part")
            temporary.write_text(json.dumps(self.rows, indent=1, allow_nan=False) + "\n")
            os.replace(temporary, self.path)


def measure(rows: Rows, name: str, estimator: str, budget: int, seeds: Iterable[int], console: Console) -> None:
    """Runs the seeds that are not among the rows."""
    missing = [seed for seed in seeds if rows.find(name, estimator, budget, seed) is None]
    if not missing:
        return
    try:
        run = ESTIMATORS[estimator](name, budget)
    except Skipped as reason:
        console.print(f"{name}, {estimator}, {budget}: skipped, {reason}", soft_wrap=True)
        return
    for seed in missing:
        row = {"target": name, "estimator": estimator, "budget": budget, "seed": seed}
        started = time.perf_counter()
        try:
            log_evidence, error, work = run(seed)
            if not np.isfinite(log_evidence):
                raise FloatingPointError(f"the estimate is {log_evidence}")
            error = None if error is None or not np.isfinite(error) else error
            row |= {"log_evidence": log_evidence, "error": error, "work": work}
        except (ArithmeticError, ValueError, RuntimeError) as fault:
            # One failure is a result: it is counted in the table, and its reason is in the file.
            row |= {"fault": f"{type(fault).__name__}: {fault}"}
            console.print(f"{name}, {estimator}, {budget}, seed {seed}: {row['fault']}", markup=False, soft_wrap=True)
        rows.add(row | {"seconds": time.perf_counter() - started})


class Summary(NamedTuple):
    """Over the seeds that gave an estimate; `spread` is their standard deviation."""

    count: int
    failed: int
    mean_error: float
    rms_error: float
    stated: float | None
    spread: float
    work: float
    seconds: float


def summarise(found: list[dict[str, Any]], truth: float) -> Summary | None:
    good = [row for row in found if "fault" not in row]
    if not good:
        return None
    error = np.array([row["log_evidence"] for row in good]) - truth
    stated = [row["error"] for row in good if row["error"] is not None]
    return Summary(
        len(good),
        len(found) - len(good),
        float(error.mean()),
        float(np.sqrt(np.mean(error**2))),
        float(np.mean(stated)) if stated else None,
        float(error.std(ddof=1)) if len(good) > 1 else float("nan"),
        float(np.mean([row["work"] for row in good])),
        float(np.median([row["seconds"] for row in good])),
    )


def show(console: Console, name: str, truth: Reference, summaries: dict[tuple[int, str], Summary]) -> None:
    table = Table(
        "budget",
        Column("estimator", no_wrap=True),
        *(
            Column(head, justify="right", no_wrap=True)
            for head in ("runs", "mean error", "RMS error", "stated", "spread", "work", "seconds")
        ),
        title=f"{name}: log Z = {truth.log_evidence:.5f} +- {truth.error}, {truth.how}",
    )
    for (budget, estimator), s in summaries.items():
        table.add_row(
            f"{budget:.0e}",
            estimator,
            f"{s.count}" + (f" ({s.failed} failed)" if s.failed else ""),
            f"{s.mean_error:+.4f} +- {s.spread / s.count**0.5:.4f}",
            f"{s.rms_error:.4f}",
            "none" if s.stated is None else f"{s.stated:.4f}",
            f"{s.spread:.4f}",
            f"{s.work:,.0f}",
            f"{s.seconds:.1f}",
        )
    console.print(table)


def show_ratios(console: Console, name: str, summaries: dict[tuple[int, str], Summary]) -> None:
    for budget in dict.fromkeys(budget for budget, _ in summaries):
        for theirs, ours in PAIRS:
            one, other = summaries.get((budget, theirs)), summaries.get((budget, ours))
            if one is None or other is None or min(one.count, other.count) < 2:
                continue
            ratio = one.spread / other.spread
            equal = ratio * (one.work / other.work) ** 0.5
            relative = (1 / (2 * (one.count - 1)) + 1 / (2 * (other.count - 1))) ** 0.5
            console.print(
                f"{name}, {budget:.0e}: sd of {theirs} / sd of {ours} = {ratio:.2f} +- {ratio * relative:.2f}; "
                f"at equal work {equal:.2f} +- {equal * relative:.2f}",
                soft_wrap=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=NAMES, metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--estimators", nargs="+", choices=[*ESTIMATORS])
    parser.add_argument("--budgets", nargs="+", type=lambda text: int(float(text)))
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0")
    parser.add_argument("--json", type=Path, help="results are kept here, and not measured again")
    parser.add_argument("--spread", action="store_true", help="compare standard deviations, see above")
    options = parser.parse_args()
    targets = options.targets or (["sonar", "ionosphere"] if options.spread else NAMES)
    estimators = options.estimators or [name for name in ESTIMATORS if not (options.spread and name == "dynesty")]
    budgets = options.budgets or ([600_000] if options.spread else [10_000, 100_000, 1_000_000])

    console = Console()
    console.width = max(console.width, 130)
    rows = Rows(options.json, ("target", "estimator", "budget", "seed"))
    for name in targets:
        truth = target(name)
        summaries = {}
        for budget in budgets:
            for estimator in estimators:
                measure(rows, name, estimator, budget, range(options.seeds), console)
                found = [rows.find(name, estimator, budget, seed) for seed in range(options.seeds)]
                summary = summarise([row for row in found if row is not None], truth.log_evidence)
                if summary is not None:
                    summaries[budget, estimator] = summary
        show(console, name, truth, summaries)
        if options.spread:
            show_ratios(console, name, summaries)


if __name__ == "__main__":
    main()
