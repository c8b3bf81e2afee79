"""Mini-batches: against the exact analysis, and unbiased whatever they are."""

import functools
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import InputError, Subsampled, noise_gap
from lehr.kernels import linear_drift
from lehr.linear_regression import LinearRegression, MiniBatchNoise, dais_gap
from lehr.numerics import bernoulli_log_prob
from tests.statistics import THRESHOLD, assert_unbiased_weights, weight_z_score, z_score

N, D = 40, 2


def regression(n=N, scale=0.4):
    rng = np.random.default_rng(1)
    design = scale * rng.normal(size=(n, D))
    return LinearRegression(design, design @ np.array([1.0, -0.5]) + rng.normal(size=n))


def log_likelihood(x, datum):
    row, y = datum
    return -((y - row @ x) ** 2) / 2 - np.log(2 * np.pi) / 2


def bernoulli(x, datum):
    row, y = datum
    return bernoulli_log_prob(row @ x, y)


def of_regression(r, batch_size, **options):
    return Subsampled(r.problem.base.log_prob, log_likelihood, (r.design, r.y), batch_size, check=False, **options)


def of_classes(batch_size, **options):
    r = regression()
    labels = (r.y > 0.2).astype(float)
    return Subsampled(r.problem.base.log_prob, bernoulli, (2 * r.design, labels), batch_size, check=False, **options)


def log_evidence_of_classes():
    """By quadrature."""
    target = of_classes(1)
    grid = np.linspace(-6, 6, 401)
    points = jnp.asarray(np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2), jnp.float32)
    values = np.asarray(jax.jit(jax.vmap(target))(points), np.float64)
    return float(np.log(np.sum(np.exp(values - values.max()))) + values.max() + 2 * np.log(grid[1] - grid[0]))


def annealer(num_steps=6, step_size=0.2, persistence=0.0, kernel=None):
    kernel = lehr.Hamiltonian(step_size, persistence) if kernel is None else kernel
    return lehr.Annealer(regression().problem.base, lehr.Schedule.linear(num_steps), kernel)


def test_it_is_the_sum_over_all_data():
    r = regression()
    x = jnp.array([0.4, -0.2])
    assert float(of_regression(r, 3)(x)) == pytest.approx(float(r.problem.log_prob(x)), rel=1e-5)


@pytest.mark.parametrize("persistence", [0.0, 0.7])
@pytest.mark.parametrize("replace", [True, False])
def test_the_bound_is_that_of_the_exact_analysis(replace, persistence, key):
    r, size = regression(), 8
    found = lehr.anneal(key, annealer(8, 0.3, persistence), of_regression(r, size, replace=replace), 20_000)
    noise = MiniBatchNoise.of(r, size, replace=replace)
    gap = dais_gap(r, np.linspace(0, 1, 9), 0.3, persistence=persistence, noise=noise)
    log_weights = np.asarray(found.log_weights, np.float64)
    assert abs(z_score(log_weights, gap.bound)) < THRESHOLD
    # Power: noise a fifth smaller would be seen.
    other = MiniBatchNoise.of(r, 10, replace=replace)
    bound = dais_gap(r, np.linspace(0, 1, 9), 0.3, persistence=persistence, noise=other).bound
    assert abs(z_score(log_weights, bound)) > THRESHOLD


KERNELS = {
    "hamiltonian": lambda: lehr.Hamiltonian(0.15),
    "persistent": lambda: lehr.Hamiltonian(0.15, 0.6),
    "two leapfrogs": lambda: lehr.Hamiltonian(0.1, 0.6, num_leapfrog=2),
    "learned reverse": lambda: lehr.LearnedReverse(lehr.Hamiltonian(0.15, 0.5), linear_drift(D, momentum=True)),
}
TARGETS = {
    "plain": lambda: of_classes(20),
    "without replacement": lambda: of_classes(20, replace=False),
    "parts": lambda: of_classes((10, 30)),
    "around, order 1": lambda: of_classes(5).around(jnp.array([0.5, -0.3]), order=1),
    "around, order 2": lambda: of_classes(2).around(jnp.array([0.5, -0.3])),
    "surrogate": lambda: of_classes(5).around(jnp.array([0.5, -0.3])).with_batches(0),
}


@pytest.mark.parametrize("name", KERNELS)
def test_weights_are_unbiased_for_every_kernel(name, key):
    found = lehr.anneal(key, annealer(kernel=KERNELS[name]()), TARGETS["plain"](), 20_000)
    assert_unbiased_weights(found.log_weights, log_evidence_of_classes())


@pytest.mark.parametrize("name", TARGETS)
def test_weights_are_unbiased_for_every_batch(name, key):
    found = lehr.anneal(key, annealer(), TARGETS[name](), 20_000)
    assert_unbiased_weights(found.log_weights, log_evidence_of_classes())


class WithoutTheLast(Subsampled):
    """A planted bug: the end of a chain does not see all data."""

    def __call__(self, x):
        return self.log_prior(x) + self.log_likelihood(x) - bernoulli(x, jax.tree.map(lambda leaf: leaf[-1], self.data))


def test_a_planted_bug_is_seen(key):
    target = of_classes(20)
    parts = target.log_prior, target.log_likelihood_per_datum, target.data, 20
    for kind, is_right in ((Subsampled, True), (WithoutTheLast, False)):
        target = kind(*parts, check=False)  # pyright: ignore[reportCallIssue]
        found = lehr.anneal(key, annealer(), target, 20_000)
        assert (abs(weight_z_score(found.log_weights, log_evidence_of_classes())) < THRESHOLD) == is_right


def test_weights_backwards_are_unbiased(key):
    # So wide a posterior that weights of 1/Z have a finite variance.
    r = regression(scale=0.12)
    rng = np.random.default_rng(4)
    draws = rng.multivariate_normal(r.mean(), np.linalg.inv(r.precision()), 20_000)
    for target in (of_regression(r, 20), of_regression(r, 4).around(jnp.zeros(D), order=1)):
        found = lehr.anneal_reverse(key, annealer(6, 0.3, 0.5), target, jnp.asarray(draws, jnp.float32))
        assert_unbiased_weights(found.log_weights, -r.log_evidence)


@pytest.mark.parametrize("kernel", [lehr.Hamiltonian(0.2), lehr.Hamiltonian(0.2, 0.6, num_leapfrog=2)])
def test_a_step_back_with_the_same_batch_undoes_a_step(kernel, key, x64):
    target = of_classes(3)
    density = lehr.Problem(regression().problem.base, target.on(key, jnp.zeros((), jnp.int32))).at(jnp.asarray(0.7))
    start = kernel.init(key, density, jnp.array([0.3, -0.4]))
    moved = kernel.move(density, start, None)
    back = kernel.move(density, kernel.flip(moved.state), None)
    np.testing.assert_allclose(back.state.point.position, start.point.position, rtol=1e-12)
    np.testing.assert_allclose(back.log_ratio, -moved.log_ratio, rtol=1e-10)


def test_expansions_of_a_quadratic_leave_no_noise(key):
    r = regression()
    for target in (of_regression(r, 3).around(jnp.zeros(D)), of_regression(r, 3).around(jnp.zeros(D)).with_batches(0)):
        log_weights = np.asarray(lehr.anneal(key, annealer(8, 0.3), target, 20_000).log_weights, np.float64)
        assert abs(z_score(log_weights, dais_gap(r, np.linspace(0, 1, 9), 0.3).bound)) < THRESHOLD
        assert noise_gap(key, annealer(8, 0.3), target).value < 1e-6


def test_expansions_are_what_they_say(x64):
    target, x, reference = of_classes(3), jnp.array([0.45, -0.35]), jnp.array([0.5, -0.3])
    datum = jax.tree.map(lambda leaf: leaf[0], target.data)
    for order in (1, 2):
        around = target.around(reference, order=order)
        assert around.taylor is not None
        one = functools.partial(bernoulli, datum=datum)
        delta = x - reference
        truth = one(reference) + jax.grad(one)(reference) @ delta
        truth += delta @ jax.hessian(one)(reference) @ delta / 2 if order == 2 else 0
        np.testing.assert_allclose(around.residual(x, datum), one(x) - truth, atol=1e-13)
        each = [around.residual(x, jax.tree.map(lambda leaf, i=i: leaf[i], target.data)) for i in range(N)]
        total = around.taylor.total(x) + sum(each)
        np.testing.assert_allclose(total, target.log_likelihood(x), rtol=1e-12)


def test_the_likelihood_ratio_of_batches_is_unbiased(key):
    x, target = jnp.array([0.7, 0.1]), of_classes(1).around(jnp.array([0.2, -0.2]))
    truth = float(jnp.exp(target(x) - target.surrogate(x)))
    assert abs(truth - 1) > 0.03
    for size, rate in ((4, 2.0), (1, 5.0)):
        ratio = functools.partial(target.likelihood_ratio, x=x, batch_size=size, rate=rate)
        found = jax.jit(jax.vmap(lambda key, ratio=ratio: ratio(key)))(jax.random.split(key, 20_000))
        assert np.std(found) < 5
        assert abs(z_score(found, truth)) < THRESHOLD
        assert abs(z_score(found, 1.0)) > THRESHOLD
    # Chains to the surrogate, corrected by it, have weights of mean Z.
    key_run, key_ratio = jax.random.split(key)
    run = lehr.anneal(key_run, annealer(), target.surrogate, 20_000)
    keys = jax.random.split(key_ratio, 20_000)
    ratios = jax.vmap(lambda key, x: target.likelihood_ratio(key, x, batch_size=20, rate=4.0))(keys, run.positions)
    weights = np.exp(np.asarray(run.log_weights, np.float64) - log_evidence_of_classes()) * np.asarray(ratios)
    assert weights.std() < 10
    assert abs(z_score(weights, 1.0)) < THRESHOLD


def test_gradients_are_those_of_the_same_batches(key, x64):
    target, start = of_classes(5).around(jnp.zeros(D), order=1), annealer(persistence=0.5)

    def bound(log_step_size, memory: Any = "checkpoint"):
        moved = eqx.tree_at(lambda a: a.kernel.log_step_size, start, log_step_size)
        return lehr.objectives.davi(moved, target, key, num_particles=3, memory=memory)

    at, change = jnp.log(0.2), 1e-6
    slope = (bound(at + change) - bound(at - change)) / (2 * change)
    for memory in ("store", "checkpoint"):
        np.testing.assert_allclose(jax.jit(jax.grad(bound), static_argnums=1)(at, memory), slope, rtol=1e-6)


@pytest.mark.parametrize("persistence", [0.0, 0.8])
@pytest.mark.parametrize("replace", [True, False])
def test_the_predicted_gap_is_the_measured_one(replace, persistence, key):
    """Within 10 %, for steps of a fifth of the stability limit; at coarser ones the next order shows."""
    r, size, num_steps = regression(200), 20, 200
    step_size = 0.2 * 2 / np.sqrt(np.linalg.eigvalsh(r.precision())[-1])
    target = of_regression(r, size, replace=replace)
    predicted = noise_gap(key, annealer(num_steps, step_size, persistence), target, num_particles=128)
    path, noise = np.linspace(0, 1, num_steps + 1), MiniBatchNoise.of(r, size, replace=replace)
    exact = [dais_gap(r, path, step_size, persistence=persistence, noise=which).total for which in (noise, None)]
    assert predicted.error < 0.02 * predicted.value
    assert predicted.value == pytest.approx(exact[0] - exact[1], rel=0.1)


@pytest.mark.parametrize("num_leapfrog", [1, 4])
def test_the_predicted_gap_is_that_of_several_leapfrogs(num_leapfrog, key):
    """Simulated: with batches, less without."""
    r, num_steps = regression(200), 60
    step_size = 0.2 * 2 / np.sqrt(np.linalg.eigvalsh(r.precision())[-1])
    kernel = lehr.Hamiltonian(step_size, num_leapfrog=num_leapfrog)
    target, start = of_regression(r, 20), annealer(num_steps, kernel=kernel)
    bounds = [lehr.anneal(key, start, f, 4000).log_weights.mean() for f in (lambda x: target(x), target)]
    predicted = noise_gap(key, start, target, num_particles=128)
    assert predicted.value == pytest.approx(float(bounds[0] - bounds[1]), rel=0.15)


def test_batches_without_replacement_are_all_sets(key):
    target = Subsampled(jnp.sum, unit, np.arange(5.0)[:, None], 3, replace=False)
    drawn = jax.vmap(lambda key: target.some(key, 3, replace=False))(jax.random.split(key, 3000))
    sets, counts = np.unique(np.sort(np.asarray(drawn)[..., 0], axis=1), axis=0, return_counts=True)
    assert len(sets) == 10
    assert np.all(np.abs(counts - 300) < THRESHOLD * np.sqrt(300))
    assert all(len(set(row)) == 3 for row in sets)


def test_a_reference_of_another_precision_will_do(x64):
    x, target = jnp.array([0.4, -0.2]), of_classes(3)
    datum = jax.tree.map(lambda leaf: leaf[0], target.data)
    for order in (1, 2):
        wide, narrow = (target.around(np.array([0.5, -0.25], dtype), order=order) for dtype in (np.float64, np.float32))
        np.testing.assert_allclose(narrow.residual(x, datum), wide.residual(x, datum), rtol=1e-6)
    np.testing.assert_allclose(*(target.around(np.array([1, 0], kind)).surrogate(x) for kind in (int, float)))


def test_neither_data_nor_expansions_are_trained(key):
    start, target = annealer(), of_classes(5).around(jnp.zeros(D))
    gradient = eqx.filter_grad(lambda t: lehr.objectives.davi(start, t, key, num_particles=2))(target)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves((gradient.data, gradient.taylor)))


def test_parts_of_the_path_have_their_own_batches(key):
    def gap(batch_size):
        return noise_gap(key, annealer(20, 0.1), of_classes(batch_size), num_particles=32).value

    # Noise counts times beta^2: nearly all of it in the second half.
    assert gap((5, 20)) < 0.5 * gap(5)
    assert gap((5, 20)) == pytest.approx(gap(20), rel=0.5)
    assert gap((20, 5)) > 0.7 * gap(5)


def test_a_corrected_kernel_sees_all_data(key):
    target, kernel = of_classes(3), lehr.Metropolis(lehr.Hamiltonian(0.3))
    sampled, whole = (lehr.anneal(key, annealer(4, kernel=kernel), f, 8) for f in (target, lambda x: target(x)))
    np.testing.assert_array_equal(sampled.log_weights, whole.log_weights)


def test_anneal_warns_of_the_gap(key):
    target, start = Subsampled(lambda x: -jnp.sum(x**2) / 2, bernoulli, of_classes(1).data, 2), annealer()
    with pytest.warns(RuntimeWarning, match=r"2 of 40 data lower the bound by about [\d.]+ \+- [\d.]+ nats"):
        lehr.anneal(key, annealer(), target, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lehr.anneal(key, annealer(step_size=0.03), target.around(jnp.array([0.5, -0.3])).with_batches(20), 4)
        lehr.anneal(key, annealer(), of_classes(2), 4)
        # What has no value yet cannot be measured.
        jax.jit(lambda key: lehr.anneal(key, start, target, 4).log_weights)(key)
        jax.jit(lambda: lehr.anneal(key, start, target, 4).log_weights)()
        jax.lax.map(lambda c: c * lehr.anneal(key, start, target, 4).log_evidence, jnp.ones(2))
        # All data, or none, make no noise.
        everything = Subsampled(target.log_prior, bernoulli, target.data, N, replace=False)
        lehr.anneal(key, start, everything, 4)
    with pytest.warns(RuntimeWarning, match="leave the finite numbers"):
        lehr.anneal(key, annealer(60, 30.0), target, 4)


def unit(x, datum):
    return datum @ x


def gap_in_jit(start, target):
    jax.jit(lambda: noise_gap(jax.random.key(0), start, target).value)()


BAD = {
    "no data": lambda: Subsampled(jnp.sum, unit, np.zeros((0, 2)), 1),
    "a number for data": lambda: Subsampled(jnp.sum, unit, np.array(1.0), 1),
    "lengths": lambda: Subsampled(jnp.sum, unit, (np.ones((3, 2)), np.ones(4)), 1),
    "not finite": lambda: Subsampled(jnp.sum, unit, np.full((3, 2), np.nan), 1),
    "batch over n": lambda: of_classes(N + 1),
    "batch of none": lambda: of_classes(0),
    "no batch": lambda: of_classes(()),
    "surrogate of nothing": lambda: of_classes(1).with_batches(0),
    "no surrogate": lambda: of_classes(1).surrogate(jnp.zeros(D)),
    "rate": lambda: (
        of_classes(1).around(jnp.zeros(D)).likelihood_ratio(jax.random.key(0), jnp.zeros(D), batch_size=1, rate=0.0)
    ),
    "order": lambda: of_classes(1).around(jnp.zeros(D), order=3),
    "no expansion": lambda: of_classes(1).around(jnp.full(D, jnp.nan)),
    "not a scalar": lambda: Subsampled(jnp.sum, lambda x, datum: datum * x, np.ones((3, D)), 1)(jnp.zeros(D)),
    "words": lambda: Subsampled(jnp.sum, unit, np.array(["a", "b"]), 1),
    "whole numbers that do not fit": lambda: Subsampled(jnp.sum, unit, np.full((3, 2), 3_000_000_000), 1),
    "reference of another shape": lambda: of_classes(1).around(jnp.zeros((1, D))),
    "reference of another dimension": lambda: (
        Subsampled(jnp.sum, lambda x, y: -jnp.sum((x - y) ** 2), np.ones((3, 1)), 1)
        .around(jnp.zeros(1))
        .surrogate(jnp.zeros(2))
    ),
    "fewer steps than batches": lambda: lehr.anneal(jax.random.key(0), annealer(1), of_classes((1, 2)), 2),
    "dreg": lambda: lehr.objectives.davi_dreg(annealer(), of_classes(1), jax.random.key(0), num_particles=2),
    "gap inside of jit": functools.partial(gap_in_jit, annealer(), of_classes(1)),
    "langevin": lambda: lehr.anneal(jax.random.key(0), annealer(kernel=lehr.Langevin(0.1)), of_classes(1), 2),
    "reversible": lambda: lehr.anneal(jax.random.key(0), annealer(4, 0.1, 0.9), of_classes(1), 2, memory="reversible"),
    "gap of all data": lambda: noise_gap(jax.random.key(0), annealer(), jnp.sum),
    "gap of a corrected kernel": lambda: noise_gap(
        jax.random.key(0), annealer(kernel=lehr.Metropolis(lehr.Hamiltonian(0.1))), of_classes(1)
    ),
    "gap of one": lambda: noise_gap(jax.random.key(0), annealer(), of_classes(1), num_particles=1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name):
    with pytest.raises(InputError) as caught:
        BAD[name]()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_evidence_takes_all_data(key):
    r = regression()
    target = Subsampled(r.problem.base.log_prob, log_likelihood, (r.design, r.y), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = lehr.evidence(key, lehr.Problem(r.problem.base, target), max_gradients=200_000, progress=False)
    assert found.converged
    assert abs(float(found.log_evidence) - r.log_evidence) < THRESHOLD * float(found.standard_error) + 0.002
