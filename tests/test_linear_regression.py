"""The exact analysis of DAIS on linear regression: against equation (16), against enumeration, against the engine."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import lehr
from lehr import InputError
from lehr.linear_regression import (
    AdditiveNoise,
    LinearRegression,
    MiniBatchNoise,
    dais_gap,
    perfect_gap,
)
from tests.statistics import THRESHOLD, z_score


def regression(seed=0, n=30, d=3, *, correlated=True):
    """A prior with correlations that are not the data's, unless they shall commute."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d)) / 2
    prior = {"prior_mean": rng.normal(size=d), "prior_precision": root @ root.T + np.eye(d)} if correlated else {}
    design = rng.normal(size=(n, d)) * rng.uniform(0.2, 0.6, d)
    return LinearRegression(design, design @ np.ones(d) + rng.normal(size=n), 0.9, **prior)


def betas(num_steps, power=1.5):
    return np.linspace(0, 1, num_steps + 1) ** power


def test_evidence_is_the_density_of_the_data():
    r = regression()
    covariance = r.design @ np.linalg.inv(r.prior_precision) @ r.design.T + r.noise_scale**2 * np.eye(len(r.y))
    truth = multivariate_normal(r.design @ r.prior_mean, covariance).logpdf(r.y)
    assert r.log_evidence == pytest.approx(truth, abs=1e-10)


def test_its_problem_is_prior_times_likelihood(x64):
    r, theta = regression(), np.array([0.3, -1.0, 0.5])
    prior = multivariate_normal(r.prior_mean, np.linalg.inv(r.prior_precision)).logpdf(theta)
    likelihood = multivariate_normal(r.design @ theta, r.noise_scale**2 * np.eye(len(r.y))).logpdf(r.y)
    assert float(r.problem.log_base(jnp.asarray(theta))) == pytest.approx(prior, abs=1e-10)
    assert float(r.problem.log_prob(jnp.asarray(theta))) == pytest.approx(prior + likelihood, abs=1e-10)


def by_equation_16(r, betas, step_sizes, gamma, scale=1.0, noise=None):
    """Joint mean and covariance of (theta, v), and the bound, by the matrices of the paper, with M = scale^2 I."""
    d, identity = r.dimension, np.eye(r.dimension)
    mean = np.concatenate([r.prior_mean, np.zeros(d)])
    covariance = np.block(
        [[np.linalg.inv(r.prior_precision), np.zeros((d, d))], [np.zeros((d, d)), scale**2 * identity]]
    )
    bound, m_inverse = 0.0, scale**-2

    def kinetic(mean, covariance):
        return m_inverse * (mean[d:] @ mean[d:] + np.trace(covariance[d:, d:])) / 2

    for beta, e in zip(betas[1:], step_sizes):
        L, m = r.precision(beta), r.mean(beta)
        A = np.block(
            [
                [identity - e**2 / 2 * m_inverse * L, m_inverse * (e * identity - e**3 / 4 * m_inverse * L)],
                [-e * L, identity - e**2 / 2 * m_inverse * L],
            ]
        )
        shift = np.concatenate([e**2 / 2 * m_inverse * L @ m, e * L @ m])
        injected = np.zeros((2 * d, 2 * d))
        if noise is not None:
            gain = np.concatenate([e**2 / 2 * m_inverse * identity, e * identity])
            injected = beta**2 * gain @ noise @ gain.T
        before = kinetic(mean, covariance)
        mean, covariance = A @ mean + shift, A @ covariance @ A.T + injected
        bound -= kinetic(mean, covariance) - before
        refresh = np.concatenate([np.ones(d), np.full(d, gamma)])
        mean, covariance = refresh * mean, refresh[:, None] * covariance * refresh
        covariance[d:, d:] += (1 - gamma**2) * scale**2 * identity
    end = mean[:d] - r.mean()
    log_target = (
        r.log_evidence
        + np.linalg.slogdet(r.precision())[1] / 2
        - (end @ r.precision() @ end + np.trace(r.precision() @ covariance[:d, :d])) / 2
    )
    log_base = np.linalg.slogdet(r.prior_precision)[1] / 2 - d / 2
    return mean, covariance, bound + log_target - log_base


@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize(("gamma", "scale"), [(0.0, 1.0), (0.9, 1.0), (0.6, 1.7)])
def test_moments_and_bound_are_those_of_equation_16(correlated, gamma, scale):
    r, num_steps = regression(correlated=correlated), 7
    sizes = np.linspace(0.1, 0.4, num_steps)
    noise = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]])
    for covariance in (None, noise):
        gap = dais_gap(
            r,
            betas(num_steps),
            sizes[:, None],
            persistence=gamma,
            momentum_scale=scale,
            noise=None if covariance is None else AdditiveNoise(covariance),
        )
        mean, joint, bound = by_equation_16(r, betas(num_steps), sizes, gamma, scale, covariance)
        np.testing.assert_allclose(gap.mean, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gap.covariance, joint, rtol=1e-9, atol=1e-12)
        assert gap.bound == pytest.approx(bound, abs=1e-9)


def test_shapes_of_parameters_that_mean_the_same_agree():
    r = regression(correlated=False)
    one = dais_gap(r, betas(9), 0.3, persistence=0.7, momentum_scale=1.5).total
    for sizes in (np.full(3, 0.3), np.full((9, 1), 0.3), np.full((9, 3), 0.3)):
        for gamma in (np.full(9, 0.7), np.full((9, 1), 0.7)):
            same = dais_gap(r, betas(9), sizes, persistence=gamma, momentum_scale=np.full(3, 1.5)).total
            assert same == pytest.approx(one, rel=1e-12)


def test_one_direction_at_a_time_is_all_at_once():
    # Noise of no size makes it take the other way.
    r = regression(correlated=False)
    for sizes in (0.3, np.array([0.1, 0.3, 0.2]), np.linspace(0.1, 0.3, 9)[:, None]):
        fast = dais_gap(r, betas(9), sizes, persistence=0.7)
        slow = dais_gap(r, betas(9), sizes, persistence=0.7, noise=AdditiveNoise(np.zeros((3, 3))))
        np.testing.assert_allclose(fast.covariance, slow.covariance, rtol=1e-10, atol=1e-13)
        assert fast.total == pytest.approx(slow.total, rel=1e-10)


def test_rounding_does_not_grow_in_long_chains():
    """An antisymmetric part of a covariance would: both ways must agree after many steps near the limit."""
    for seed, correlated in ((0, False), (1, True)):
        r = regression(seed, correlated=correlated)
        limit = 2 / np.sqrt(np.linalg.eigvalsh(r.precision())[-1])
        coarse, fine = (dais_gap(r, np.linspace(0, 1, k + 1), 0.8 * limit, persistence=0.5) for k in (3000, 12_000))
        # The gap falls as 1/K, to the leapfrog's own error.
        assert 0 < fine.total < coarse.total < 1
        np.testing.assert_allclose(fine.covariance, fine.covariance.T, atol=1e-14)
        zero = AdditiveNoise(np.zeros((3, 3)))
        slow = dais_gap(r, np.linspace(0, 1, 12_001), 0.8 * limit, persistence=0.5, noise=zero)
        assert slow.total == pytest.approx(fine.total, rel=1e-6)
        np.testing.assert_allclose(slow.covariance, fine.covariance, atol=1e-10)


def test_the_engine_agrees_at_ten_random_settings():
    """10^5 particles each; the moments of the last positions too."""
    rng, total, total_of_others = np.random.default_rng(5), 0.0, 0.0
    for seed in range(10):
        d, num_steps = [(2, 4), (3, 9)][seed % 2]
        r = regression(seed, d=d, correlated=seed % 4 < 2)
        stable = 2 / np.sqrt(np.linalg.eigvalsh(r.precision())[-1])
        sizes = stable * rng.uniform(0.3, 0.8, [(), (d,), (num_steps, 1), (num_steps, d)][seed % 4])
        gamma, scale = [0.0, rng.uniform(0.2, 0.9)][seed % 2], rng.uniform(1.0, 1.5, d)
        path = betas(num_steps, rng.uniform(1, 2))
        kernel = lehr.Hamiltonian(sizes, gamma, scale)
        annealer = lehr.Annealer(r.problem.base, lehr.Schedule.from_betas(path), kernel)
        found = lehr.anneal(jax.random.key(seed), annealer, r.problem.log_target, 100_000)
        gap = dais_gap(r, path, sizes, persistence=gamma, momentum_scale=scale)
        log_weights = np.asarray(found.log_weights, np.float64)
        z = z_score(log_weights, gap.bound)
        assert abs(z) < THRESHOLD, f"setting {seed}: {log_weights.mean()} is {z:.1f} errors from {gap.bound}"
        x = np.asarray(found.positions, np.float64)
        centred = (x - gap.mean[:d]) / np.sqrt(np.diag(gap.covariance)[:d])
        for i in range(d):
            assert abs(z_score(centred[:, i], 0.0)) < THRESHOLD
            assert abs(z_score(centred[:, i] ** 2, 1.0)) < THRESHOLD
        total += z**2
        other = dais_gap(r, path, 1.03 * sizes, persistence=gamma, momentum_scale=scale)
        total_of_others += z_score(log_weights, other.bound) ** 2
    assert total < 40, "ten z-scores are too far from zero together"
    assert total_of_others > 400, "step sizes that are 3 % off should be seen"


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("n", [6, 40])
def test_mini_batch_noise_is_that_of_all_batches(n, replace):
    """Every batch of two, and theta on points of the given mean and covariance: quadratics are averaged exactly."""
    r = regression(n=n, d=2)
    mean, covariance = np.array([0.4, -0.3]), np.array([[0.5, 0.1], [0.1, 0.2]])
    root = np.sqrt(2) * np.linalg.cholesky(covariance)
    batches = list(itertools.product(range(n), repeat=2) if replace else itertools.combinations(range(n), 2))
    truth = np.zeros((2, 2))
    for theta in (mean + root[:, 0], mean - root[:, 0], mean + root[:, 1], mean - root[:, 1]):
        each = r.design * (r.y - r.design @ theta)[:, None] / r.noise_scale**2
        estimates = np.array([n / 2 * each[list(batch)].sum(axis=0) for batch in batches])
        np.testing.assert_allclose(estimates.mean(axis=0), each.sum(axis=0), rtol=1e-10)
        truth += np.cov(estimates.T, bias=True) / 4
    noise = MiniBatchNoise.of(r, 2, replace=replace)
    assert (noise.fourth is None) == (n == 6)
    with jax.enable_x64(True):
        found = noise.at(jnp.asarray(mean), jnp.asarray(covariance))
    np.testing.assert_allclose(found, truth, rtol=1e-9)


def test_all_data_without_replacement_is_no_noise():
    r = regression()
    assert dais_gap(r, betas(8), 0.2, noise=MiniBatchNoise.of(r, 30, replace=False)).total == pytest.approx(
        dais_gap(r, betas(8), 0.2).total, rel=1e-10
    )


def test_perfect_transitions_have_a_gap_of_order_one_over_k():
    r = regression()

    def divergence(a, b):
        """KL(p_a || p_b) of Gaussians."""
        P, Q, shift = r.precision(a), r.precision(b), r.mean(b) - r.mean(a)
        ratio = Q @ np.linalg.inv(P)
        return (np.trace(ratio) - len(shift) - np.linalg.slogdet(ratio)[1] + shift @ Q @ shift) / 2

    path = betas(12)
    assert perfect_gap(r, path) == pytest.approx(sum(map(divergence, path[:-1], path[1:])), rel=1e-9)
    gaps = [num_steps * perfect_gap(r, np.linspace(0, 1, num_steps + 1)) for num_steps in (10**3, 10**4, 10**5)]
    assert gaps[1] == pytest.approx(gaps[2], rel=2e-3)
    assert gaps[0] == pytest.approx(gaps[2], rel=2e-2)


def test_the_parts_of_a_gap_vanish_as_a_chain_keeps_up():
    r = regression()
    coarse, fine = (dais_gap(r, np.linspace(0, 1, k + 1), 0.3 * (k / 10) ** -0.25) for k in (10, 10**5))
    for part in ("mean_lag", "covariance_lag", "kinetic"):
        assert abs(getattr(fine, part)) < 0.1 * abs(getattr(coarse, part))
    assert 0 < fine.total < 0.1 * coarse.total


@pytest.mark.parametrize("c", [1 / 4, 1 / 3, 0.4, 1 / 2])
def test_the_rate_is_that_of_theorem_1(c):
    """gap = O(K^(2c - 1)) for step sizes of order K^-c, c in [1/4, 1/2]; where the gap falls, K is large."""
    r = regression(correlated=False)
    ks = np.array([10**5, 10**6])
    gaps = [dais_gap(r, np.linspace(0, 1, k + 1), 0.4 * (k / 10) ** -c, persistence=0.9).total for k in ks]
    slope = np.diff(np.log(gaps))[0] / np.diff(np.log(ks))[0]
    assert slope == pytest.approx(2 * c - 1, abs=0.03)


def test_with_noise_no_step_size_takes_the_gap_to_zero():
    """Theorem 2: the least gap over step sizes has a floor, which without noise it has not."""
    r = regression(correlated=False)
    noise = MiniBatchNoise.of(r, 5)

    def least(num_steps, noise):
        sizes = 0.1 * np.geomspace(1e-3, 1, 16)
        return min(dais_gap(r, np.linspace(0, 1, num_steps + 1), e, noise=noise).total for e in sizes)

    noisy, exact = ([least(k, which) for k in (10**3, 10**4)] for which in (noise, None))
    assert noisy[1] > 0.9 * noisy[0]
    assert exact[1] < 0.5 * exact[0]


BAD = {
    "no data": lambda: LinearRegression(np.zeros((0, 2)), np.zeros(0)),
    "shapes": lambda: LinearRegression(np.ones((4, 2)), np.ones(3)),
    "rank": lambda: LinearRegression(np.ones((4, 2)), np.ones(4)),
    "more columns than data": lambda: LinearRegression(np.eye(2, 3), np.ones(2)),
    "not finite": lambda: LinearRegression(np.array([[1.0], [np.nan]]), np.ones(2)),
    "noise scale": lambda: LinearRegression(np.eye(2), np.ones(2), 0.0),
    "prior": lambda: LinearRegression(np.eye(2), np.ones(2), prior_precision=-1.0),
    "not symmetric": lambda: LinearRegression(
        np.eye(2), np.ones(2), prior_precision=np.array([[1.0, 0.5], [0.0, 1.0]])
    ),
    "prior mean": lambda: LinearRegression(np.eye(2), np.ones(2), prior_mean=np.ones(3)),
    "betas": lambda: dais_gap(regression(), np.array([0, 0.5, 0.5, 1]), 0.1),
    "step size": lambda: dais_gap(regression(), betas(3), 0.0),
    "step shape": lambda: dais_gap(regression(), betas(3), np.ones((2, 1))),
    "momentum scale": lambda: dais_gap(regression(), betas(3), 0.1, momentum_scale=-1.0),
    "persistence": lambda: dais_gap(regression(), betas(3), 0.1, persistence=1.0),
    "batch of none": lambda: MiniBatchNoise.of(regression(), 0),
    "batch over n": lambda: MiniBatchNoise.of(regression(), 31),
    "noise shape": lambda: AdditiveNoise(np.ones(3)),
    "noise sign": lambda: AdditiveNoise(-np.eye(2)),
    "noise of nothing": lambda: AdditiveNoise(np.zeros((0, 0))),
    "small and not symmetric": lambda: AdditiveNoise(np.array([[3e-9, 2e-9], [-2e-9, 3e-9]])),
    "noise scale too small": lambda: LinearRegression(np.eye(2), np.ones(2), 1e-200),
    "noise of others": lambda: dais_gap(regression(), betas(3), 0.1, noise=MiniBatchNoise.of(regression(d=2), 3)),
    "persistence shape": lambda: dais_gap(regression(), betas(3), 0.1, persistence=np.zeros(7)),
    "noise dimension": lambda: dais_gap(regression(), betas(3), 0.1, noise=AdditiveNoise(np.eye(2))),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name):
    with pytest.raises(InputError) as caught:
        BAD[name]()
    assert "\n" not in str(caught.value)


def test_a_step_size_beyond_stability_is_told_the_limit():
    r = regression(correlated=False)
    limit = 2 / np.sqrt(np.linalg.eigvalsh(r.precision())[-1])
    assert np.isfinite(dais_gap(r, betas(50), 0.999 * limit).total)
    with pytest.raises(InputError, match=f"{limit:.4g}"):
        dais_gap(r, betas(50), 1.001 * limit)
    # Early steps may be longer than the last.
    sizes = 0.9 * 2 / np.sqrt([np.linalg.eigvalsh(r.precision(b))[-1] for b in betas(50)[1:]])
    assert sizes[0] > limit
    assert np.isfinite(dais_gap(r, betas(50), sizes[:, None]).total)


def test_noise_that_makes_moments_diverge_is_told():
    """Beyond a step size that the mini-batches set, second moments grow without end."""
    r = regression(correlated=False)
    with pytest.raises(InputError, match="diverge"):
        dais_gap(r, np.linspace(0, 1, 2001), 0.5, noise=MiniBatchNoise.of(r, 1))
    assert dais_gap(r, np.linspace(0, 1, 2001), 0.1, noise=MiniBatchNoise.of(r, 1)).total > 0
