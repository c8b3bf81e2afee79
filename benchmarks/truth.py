"""The log evidence of a smooth, unimodal reference target, by two methods that share nothing but its density.

    python -m benchmarks.truth breast-cancer sonar [--draws 2000000] [--chains 64] [--length 2000] [--seed 0]

- **Importance sampling** from a multivariate Student-t (30 degrees of freedom), whose location and scale are
  those of the target: at first of the mode, then eight times of weighted draws (their weights flattened while few draws
  carry them). With the share of the draws that is effective, the largest share of the weight that one draw has, and the
  standard error of the mean weight.
- **Bridge sampling** (Meng, Wong 1996) between the target, sampled by BlackJAX's NUTS, and the Gaussian with the
  moments of other chains. Independent groups of chains give independent estimates: their mean, with its standard error.

Everything in float64. The last line of a target combines the two, and says how many errors they differ by.
"""

import argparse
from collections.abc import Callable

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln, logsumexp

from lehr.bases import find_modes
from lehr.path import LogDensity, Problem
from lehr.reference import reference

BATCH, FITS, GROUPS = 20_000, 8, 16

Estimate = tuple[float, float]
Batched = Callable[[np.ndarray], np.ndarray]


def batched(log_density: LogDensity) -> Batched:
    """The log density of each row, with bounded memory."""
    rows = jax.jit(jax.vmap(log_density))
    return lambda x: np.concatenate([np.asarray(rows(x[i : i + BATCH])) for i in range(0, len(x), BATCH)])


def moments(x: np.ndarray, log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean, and the Cholesky factor of the weighted covariance.

    Weights are raised to the largest power 1, 0.9, 0.81, ... that leaves 50 effective draws a dimension.
    """
    while 2 * logsumexp(log_weights) - logsumexp(2 * log_weights) < np.log(50 * x.shape[1]):
        log_weights = 0.9 * log_weights
    weights = np.exp(log_weights - logsumexp(log_weights))
    mean = weights @ x
    return mean, np.linalg.cholesky((x - mean).T @ ((x - mean) * weights[:, None]))


def student(
    rng: np.random.Generator, loc: np.ndarray, scale: np.ndarray, freedom: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of loc + scale t, t multivariate Student-t of identity scale, and their log density."""
    dim = len(loc)
    t = rng.standard_normal((count, dim)) / np.sqrt(rng.chisquare(freedom, (count, 1)) / freedom)
    log_density = gammaln((freedom + dim) / 2) - gammaln(freedom / 2) - dim / 2 * np.log(freedom * np.pi)
    log_density -= (freedom + dim) / 2 * np.log1p(np.sum(t**2, axis=1) / freedom) + np.sum(np.log(np.diag(scale)))
    return loc + t @ scale.T, log_density


def importance(
    problem: Problem, rng: np.random.Generator, draws: int, freedom: float
) -> tuple[Estimate, tuple[np.ndarray, np.ndarray]]:
    """log Z with its error, and the last location and scale (of unit covariance, not of the Student-t)."""
    log_density = batched(problem.log_target)
    mode = find_modes(problem.log_target, jnp.zeros((1, problem.position.shape[0]))).modes[0]
    fit = mode.loc, np.linalg.cholesky(mode.covariance)
    shrink = np.sqrt((freedom - 2) / freedom)

    def weigh(count: int) -> tuple[np.ndarray, np.ndarray]:
        x, log_proposal = student(rng, fit[0], shrink * fit[1], freedom, count)
        return x, log_density(x) - log_proposal

    for _ in range(FITS):
        fit = moments(*weigh(5 * BATCH))
    log_weights = np.concatenate([weigh(BATCH)[1] for _ in range(draws // BATCH)])
    total = logsumexp(log_weights)
    share = np.exp(2 * total - logsumexp(2 * log_weights)) / len(log_weights)
    error = np.sqrt((1 / share - 1) / len(log_weights))
    largest = np.exp(log_weights.max() - total)
    print(
        f"  importance sampling   {total - np.log(len(log_weights)):.5f} +- {error:.5f}   {len(log_weights)} draws, "
        f"{share:.1%} effective, largest weight {largest:.1e} of all",
        flush=True,
    )
    return (float(total - np.log(len(log_weights))), float(error)), fit


def nuts(problem: Problem, key: jax.Array, loc: np.ndarray, scale: np.ndarray, chains: int, length: int) -> np.ndarray:
    """Draws `(chains, length, dim)` after a tenth as warm-up; chains start from N(loc, scale scale^T)."""

    def log_density(z: jax.Array) -> jax.Array:
        return problem.log_target(loc + scale @ z)

    key_step, key_start, key_chains = jax.random.split(key, 3)
    dim = len(loc)
    adapt = blackjax.window_adaptation(blackjax.nuts, log_density, is_mass_matrix_diagonal=True)
    (_, parameters), _ = adapt.run(key_step, jnp.zeros(dim), 1000)
    kernel = blackjax.nuts(log_density, **parameters)

    def one(key: jax.Array, start: jax.Array) -> jax.Array:
        def step(state, key):
            state = kernel.step(key, state)[0]
            return state, state.position

        warm_up = length // 10
        return jax.lax.scan(step, kernel.init(start), jax.random.split(key, warm_up + length))[1][warm_up:]

    starts = jax.random.normal(key_start, (chains, dim))
    z = jax.jit(jax.vmap(one))(jax.random.split(key_chains, chains), starts)
    return loc + np.asarray(z) @ scale.T


def bridge(log_ratio_draws: np.ndarray, log_ratio_proposals: np.ndarray) -> float:
    """log Z from l = log(target / proposal) at draws of either: the fixed point of Meng and Wong's optimal bridge."""
    share = np.log(len(log_ratio_draws) / (len(log_ratio_draws) + len(log_ratio_proposals)))
    rest = np.log1p(-np.exp(share))
    log_z = np.median(log_ratio_draws)
    for _ in range(1000):
        above = logsumexp(log_ratio_proposals - np.logaddexp(share + log_ratio_proposals, rest + log_z))
        below = logsumexp(-np.logaddexp(share + log_ratio_draws, rest + log_z))
        new = above - np.log(len(log_ratio_proposals)) - below + np.log(len(log_ratio_draws))
        if abs(new - log_z) < 1e-10:
            break
        log_z = new
    return float(new)


def bridged(problem: Problem, rng: np.random.Generator, draws: np.ndarray) -> Estimate:
    """The mean over groups of chains, and its standard error. A group's proposal is fitted to the other groups."""
    log_density = batched(problem.log_target)
    groups = draws.reshape(GROUPS, -1, draws.shape[-1])
    estimates = []
    for i, group in enumerate(groups):
        others = np.delete(groups, i, axis=0).reshape(-1, draws.shape[-1])
        loc, scale = moments(others, np.zeros(len(others)))
        log_det = np.sum(np.log(np.diag(scale)))

        def log_ratio(x: np.ndarray, loc=loc, scale=scale, log_det=log_det) -> np.ndarray:
            z = np.linalg.solve(scale, (x - loc).T)
            return log_density(x) + np.sum(z**2, axis=0) / 2 + log_det + len(loc) / 2 * np.log(2 * np.pi)

        proposals = loc + rng.standard_normal(group.shape) @ scale.T
        estimates.append(bridge(log_ratio(group), log_ratio(proposals)))
    mean, error = np.mean(estimates), np.std(estimates, ddof=1) / np.sqrt(GROUPS)
    print(f"  bridge sampling       {mean:.5f} +- {error:.5f}   {GROUPS} groups of {groups.shape[1]} NUTS draws")
    return float(mean), float(error)


def measure(name: str, seed: int, draws: int, freedom: float, chains: int, length: int) -> None:
    target = reference(name)
    print(f"{name}: d = {target.problem.position.shape[0]}, on record {target.log_evidence} +- {target.error}")
    rng = np.random.default_rng(seed)
    (one, error_one), fit = importance(target.problem, rng, draws, freedom)
    (other, error_other) = bridged(
        target.problem, rng, nuts(target.problem, jax.random.key(seed), *fit, chains, length)
    )
    precision = np.array([error_one, error_other]) ** -2.0
    both, error = precision @ [one, other] / precision.sum(), precision.sum() ** -0.5
    z = (one - other) / np.hypot(error_one, error_other)
    print(f"  both                  {both:.5f} +- {error:.5f}   z = {z:+.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=2_000_000)
    parser.add_argument("--freedom", type=float, default=30.0, help="degrees of freedom of the proposal")
    parser.add_argument("--chains", type=int, default=64, help="a multiple of 16")
    parser.add_argument("--length", type=int, default=2000)
    options = vars(parser.parse_args())
    with jax.enable_x64(True):
        for name in options.pop("targets"):
            measure(name, **options)


if __name__ == "__main__":
    main()
