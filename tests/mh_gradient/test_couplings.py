"""Couplings: both chains follow their own laws, stay together once they have met, and meet as often as they should."""

import itertools
import math
import os
import subprocess
import sys
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

import lehr
from lehr import InputError
from lehr.mh_gradient import (
    MALA,
    PCN,
    CommonRandomNumbers,
    DensityRatio,
    DiscreteUniform,
    FullKernelMaximal,
    GCRefl,
    HeatBath,
    Independence,
    Independent,
    MaximalIndependent,
    MaximalReflection,
    MonotoneSpin,
    RandomWalk,
    SpinFlip,
)
from lehr.mh_gradient.couplings import AbstractCoupling, Followed, Proposed
from lehr.mh_gradient.heat_bath import HeatBathSampler
from lehr.mh_gradient.kernel import Kernel
from lehr.mh_gradient.proposals import OwnProposal
from lehr.mh_gradient.sampler import MetropolisHastings
from lehr.mh_gradient.target import Target
from tests.statistics import THRESHOLD, assert_mean, two_sample_z_score, z_score

NUM = 20_000


def log_density(params, x):
    """Skewed, with neighbours that interact: gradients at two positions are not parallel."""
    skew = 0.4 * jnp.sum(jnp.sin(2 * x))
    return params + skew - jnp.sum((x - 0.3) ** 2) / 2 - 0.3 * jnp.sum(x[1:] * x[:-1] ** 2) / (1 + jnp.sum(x**2))


class Draws(NamedTuple):
    """Many single steps of two chains, from x and y; and of a chain alone, from y."""

    x_new: np.ndarray
    x_after: np.ndarray
    accepted: np.ndarray
    log_ratio: np.ndarray
    y_new: np.ndarray
    y_after: np.ndarray
    alone: np.ndarray
    met: np.ndarray


@eqx.filter_jit
def _steps(sampler, x, y, key):
    start_x, start_y = sampler.start(x), sampler.start(y)
    coupling, proposal = sampler.coupling, sampler.kernel.proposal
    key_x, key_coupling, key_uniform, key_alone = jax.random.split(key, 4)
    k = jnp.asarray(0)

    def step(inputs):
        noise, own, alone = inputs
        move = sampler.move(k, start_x, noise)
        # It has no proposals: it couples what follows acceptance.
        full = isinstance(coupling, FullKernelMaximal)
        y_new = jnp.zeros_like(y) if full else coupling.propose(sampler.kernel, move, start_y, own).x
        y_after, met = coupling.follow(sampler.kernel, move, start_y, own)
        alone = sampler.move(k, start_y, alone).after.x
        return Draws(move.new.x, move.after.x, move.accepted, move.log_ratio, y_new, y_after.x, alone, met)

    return jax.vmap(step)(
        (
            sampler.noise(key_x, NUM, x),
            coupling.noise(proposal, key_coupling, jax.random.uniform(key_uniform, (NUM,)), x),
            sampler.noise(key_alone, NUM, x),
        )
    )


def steps(key, proposal, coupling, x, y, density=log_density):
    with_gradient = proposal.needs_gradient or coupling.needs_gradient
    kernel = Kernel(Target(density, jnp.zeros(()), with_gradient), proposal)
    return jax.tree.map(np.asarray, _steps(MetropolisHastings(kernel, coupling), jnp.asarray(x), jnp.asarray(y), key))


def moments(x):
    """Of first to third order, those of all pairs among them: one column each."""
    x = np.asarray(x, np.float64)
    pairs = [x[:, i] * x[:, j] for i in range(x.shape[1]) for j in range(i + 1)]
    return np.stack([*x.T, *pairs, *(x**3).T], axis=1)


def assert_gaussian(x, mean, scale):
    """That x ~ N(mean, L L^T), by its moments to third order."""
    u = np.linalg.solve(scale, (np.asarray(x, np.float64) - mean).T).T
    dim = u.shape[1]
    expected = [0.0] * dim + [float(i == j) for i in range(dim) for j in range(i + 1)] + [0.0] * dim
    for column, value in zip(moments(u).T, expected, strict=True):
        assert_mean(column, value)


def assert_same_law(a, b, start):
    """That two independent samples of where a step from `start` ends have the same moments, and stay as often."""
    a, b = (np.c_[moments(s - start), np.all(s == start, axis=1), np.abs(s - start) > 0.3] for s in (a, b))
    for i in range(a.shape[1]):
        if np.any(a[:, i] != a[0, i]) or np.any(b[:, i] != a[0, i]):
            z = two_sample_z_score(a[:, i], b[:, i])
            assert abs(z) < THRESHOLD, f"statistic {i} is {z:.1f} standard errors from that of a chain alone"


def assert_frequency(event, probability):
    """That independent events have this probability; by its exact variance, as none or all may be seen."""
    event = np.asarray(event)
    deviation = event.mean() - probability
    error = math.sqrt(max(probability * (1 - probability), 1e-12) / len(event))
    assert abs(deviation) < THRESHOLD * error, f"{event.mean()} of {len(event)}, but {probability} expected"


def together(a, b):
    """Bit by bit."""
    return np.all(a == b, axis=1)


# Gaussian proposals.

TRIL = np.array([[0.9, 0.0], [-0.5, 0.6]])
X2, Y2 = np.array([0.9, -0.4], np.float32), np.array([-0.3, 0.5], np.float32)
FAR2 = np.array([-1.8, 1.9], np.float32)
PROPOSALS = {
    "walk": lambda: RandomWalk(0.8),
    "walk (dim,)": lambda: RandomWalk(np.array([0.5, 1.3])),
    "walk tril": lambda: RandomWalk(TRIL),
    "mala": lambda: MALA(np.array([0.8, 1.1])),
    "mala tril": lambda: MALA(TRIL),
    "pcn": lambda: PCN(0.7, TRIL, np.array([0.2, -0.4])),
}


def gaussian_of(name, x):
    """Mean and L of a proposal from x, written down again."""
    x = np.asarray(x, np.float64)
    if name.startswith("mala"):
        scale = TRIL if "tril" in name else np.diag([0.8, 1.1])
        gradient = np.asarray(jax.grad(log_density, argnums=1)(0.0, jnp.asarray(x)), np.float64)
        return x + scale @ scale.T @ gradient / 2, scale
    if name == "pcn":
        loc = np.array([0.2, -0.4])
        return loc + math.sqrt(1 - 0.7**2) * (x - loc), 0.7 * TRIL
    return x, {"walk": 0.8 * np.eye(len(x)), "walk (dim,)": np.diag([0.5, 1.3]), "walk tril": TRIL}[name]


def overlap(name, x, y):
    (m_x, scale), (m_y, _) = gaussian_of(name, x), gaussian_of(name, y)
    return 2 * norm.cdf(-np.linalg.norm(np.linalg.solve(scale, m_x - m_y)) / 2)


def assert_both_laws(draws, name, x, y):
    """Proposals of both chains are those of the Gaussian, and y ends where a chain alone does."""
    assert_gaussian(draws.x_new, *gaussian_of(name, x))
    assert_gaussian(draws.y_new, *gaussian_of(name, y))
    assert 0.1 < draws.accepted.mean() < 0.99
    assert_same_law(draws.y_after, draws.alone, y)


@pytest.mark.parametrize("name", PROPOSALS)
def test_maximal_reflection(key, name):
    proposal, coupling = PROPOSALS[name](), MaximalReflection()
    for i, y in enumerate((Y2, FAR2)):
        draws = steps(jax.random.fold_in(key, i), proposal, coupling, X2, y)
        assert_both_laws(draws, name, X2, y)
        expected = overlap(name, X2, y)
        assert 0.001 < expected < 0.95
        assert_frequency(together(draws.x_new, draws.y_new), expected)
        assert np.any(together(draws.x_after, draws.y_after))
    draws = steps(key, proposal, coupling, X2, X2)
    assert coupling.faithful
    assert np.all(together(draws.x_after, draws.y_after))


@pytest.mark.parametrize("name", ["walk", "mala", "pcn"])
def test_what_is_not_shared_is_reflected(key, name):
    # y' - m_y is (x' - m_x) mirrored in the plane between the means, in units of L.
    draws = steps(key, PROPOSALS[name](), MaximalReflection(), X2, FAR2)
    (m_x, scale), (m_y, _) = gaussian_of(name, X2), gaussian_of(name, FAR2)
    d = np.linalg.solve(scale, m_x - m_y)
    e = d / np.linalg.norm(d)
    z_x = np.linalg.solve(scale, (draws.x_new - m_x).T).T
    z_y = np.linalg.solve(scale, (draws.y_new - m_y).T).T
    reflected = ~together(draws.x_new, draws.y_new)
    np.testing.assert_allclose((z_y - z_x + 2 * np.outer(z_x @ e, e))[reflected], 0, atol=2e-5)


@pytest.mark.parametrize("name", ["walk", "mala", "pcn"])
def test_common_random_numbers(key, name):
    coupling = CommonRandomNumbers()
    draws = steps(key, PROPOSALS[name](), coupling, X2, Y2)
    assert_both_laws(draws, name, X2, Y2)
    (m_x, _), (m_y, _) = gaussian_of(name, X2), gaussian_of(name, Y2)
    np.testing.assert_allclose(draws.x_new - m_x, draws.y_new - m_y, atol=1e-5)
    assert not np.any(together(draws.x_after, draws.y_after))
    assert coupling.faithful
    draws = steps(key, PROPOSALS[name](), coupling, X2, X2)
    assert np.all(together(draws.x_after, draws.y_after))


def test_independent_proposals(key):
    coupling = Independent()
    draws = steps(key, PROPOSALS["walk"](), coupling, X2, Y2)
    assert_both_laws(draws, "walk", X2, Y2)
    for i, j in itertools.product(range(2), repeat=2):
        assert_mean((draws.x_new - X2)[:, i] * (draws.y_new - Y2)[:, j], 0)
    # Chains that are together part: the engine has to keep them so.
    draws = steps(key, PROPOSALS["walk"](), coupling, X2, X2)
    assert not coupling.faithful
    apart = ~together(draws.x_after, draws.y_after)
    assert np.all(apart[draws.accepted])
    assert_same_law(draws.y_after, draws.alone, X2)


# Gradient-corrected reflection.

X5 = np.array([0.9, -0.4, 0.2, 1.1, -0.7], np.float32)
Y5 = np.array([-0.3, 0.5, 1.0, -0.2, 0.1], np.float32)
STEP = {1: 0.9, 2: 0.8, 5: 0.7}


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_gcrefl(key, dim):
    x, y, step = X5[:dim], Y5[:dim], STEP[dim]
    d = (x - y) / step
    proposal, coupling = RandomWalk(step), GCRefl(float(2 * d @ d))
    near, scale = y, step * np.eye(dim)
    # Twice as far: |d|^2 is then twice the threshold.
    far = x - 2 * (x - y)
    for i, other in enumerate((near, far)):
        draws = steps(jax.random.fold_in(key, i), proposal, coupling, x, other)
        assert_gaussian(draws.x_new, x, scale)
        assert_gaussian(draws.y_new, other, scale)
        assert_same_law(draws.y_after, draws.alone, other)
        same = np.all(np.abs(draws.x_new - draws.y_new) < 1e-6, axis=1)
        if other is near:
            assert_frequency(same, 2 * norm.cdf(-np.linalg.norm(d) / 2))
            assert np.any(together(draws.x_after, draws.y_after))
        else:
            assert not np.any(same)
            assert_shared_along_gradients(draws, x, other, step)


def assert_shared_along_gradients(draws, x, y, step):
    """Noise of y is minus that of x along e, and that of x along the gradients, of what is orthogonal to e."""
    e = np.asarray(x - y, np.float64) / np.linalg.norm(x - y)
    z_x, z_y = ((a - b) / step for a, b in ((draws.x_new, x), (draws.y_new, y)))
    np.testing.assert_allclose(z_y @ e, -z_x @ e, atol=1e-4)
    if len(x) == 1:
        return
    n_x, n_y = (
        (g - (g @ e) * e) / np.linalg.norm(g - (g @ e) * e)
        for g in (np.asarray(jax.grad(log_density, argnums=1)(0.0, jnp.asarray(p)), np.float64) for p in (x, y))
    )
    np.testing.assert_allclose(z_y @ n_y, z_x @ n_x, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_gcrefl_knows_when_chains_meet(key, dim):
    x, y = X5[:dim], Y5[:dim]
    proposal, coupling = RandomWalk(STEP[dim]), GCRefl(float(2 * np.sum((x - y) ** 2) / STEP[dim] ** 2))
    draws = steps(key, proposal, coupling, x, y)
    nearly = np.all(np.abs(draws.x_new - draws.y_new) < 1e-6, axis=1)
    assert_frequency(nearly, 2 * norm.cdf(-np.linalg.norm((x - y) / STEP[dim]) / 2))
    nearly = np.all(np.abs(draws.x_after - draws.y_after) < 1e-6, axis=1)
    np.testing.assert_array_equal(draws.met, nearly)
    draws = steps(key, proposal, coupling, x, x)
    assert coupling.faithful
    np.testing.assert_allclose(draws.x_after, draws.y_after, atol=1e-6)


OPTIMISED = """
import jax, jax.numpy as jnp, lehr
from lehr.mh_gradient import PCN, MaximalReflection

def log_density(params, x):
    return 0.4 * jnp.sum(jnp.sin(2 * x)) - jnp.sum((x - params) ** 2) / 2

expectation = lehr.mh_expectation(
    log_density, lambda x: x[0], PCN(0.7), MaximalReflection(), jnp.zeros(5),
    num_steps=100, num_chains=100, has_aux=True,
)
print(*(float(call(0.3, jax.random.key(0))[1].num_meetings) for call in (expectation, jax.jit(expectation))))
"""


@pytest.mark.slow
def test_chains_meet_as_often_in_optimised_code():
    # A compiler may compute x + L z twice, and round it otherwise where y' takes it, so that no chains would meet. In
    # a process of its own: the tests' code is not optimised. In jax.jit the numbers of a proposal are constants.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", OPTIMISED]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    called, compiled = map(float, out.split()[-2:])
    assert called > 5
    assert compiled == pytest.approx(called, rel=0.1)


def test_gcrefl_takes_the_dimension_for_its_threshold(key):
    # |d|^2 on either side of 5.
    for square, meets in ((4.9, True), (5.1, False)):
        y = X5 + 0.7 * np.sqrt(square / 5) * np.ones(5, np.float32)
        draws = steps(key, RandomWalk(0.7), GCRefl(), X5, y.astype(np.float32))
        assert np.any(together(draws.x_new, draws.y_new)) == meets


def isotropic(params, x):
    return params - jnp.sum((x - 0.3) ** 2) / 2


def test_gcrefl_where_gradients_point_along_the_line_between_the_chains(key):
    # Nothing of a gradient is orthogonal to e but rounding, which must not be taken for a direction.
    for i, ray in enumerate(np.random.default_rng(3).normal(size=(5, 2))):
        x, y = (0.3 + 1.7 * ray).astype(np.float32), (0.3 - 2.1 * ray).astype(np.float32)
        draws = steps(jax.random.fold_in(key, i), RandomWalk(0.7), GCRefl(0.1), x, y, isotropic)
        assert_gaussian(draws.y_new, y, 0.7 * np.eye(2))
        assert_same_law(draws.y_after, draws.alone, y)


# The whole kernel.


class Skewed(eqx.Module):
    """An asymmetric proposal of a user: it drifts, by an amount that depends on the position."""

    def _mean(self, x):
        return 0.7 * x + 0.2

    def sample(self, key, x):
        return self._mean(x) + 0.9 * jax.random.normal(key, x.shape)

    def log_prob(self, x, x_new):
        return -jnp.sum((x_new - self._mean(x)) ** 2) / (2 * 0.9**2) - len(x) * math.log(0.9 * math.sqrt(2 * math.pi))


BASE = np.array([[1.2, 0.0], [0.4, 0.9]])
WHOLE = {
    **{name: PROPOSALS[name] for name in ("walk", "mala")},
    "independence": lambda: Independence(lehr.Gaussian(jnp.array([0.1, 0.2]), jnp.asarray(BASE, jnp.float32))),
    "own": lambda: OwnProposal(Skewed()),
}
AXIS = np.linspace(-7.0, 7.0, 401)


def density_of(name, x, x_new):
    """q(x, x_new) for rows of positions, written down again."""
    x, x_new = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(x_new, np.float64))
    if name == "independence":
        return multivariate_normal([0.1, 0.2], BASE @ BASE.T).pdf(x_new)
    if name == "own":
        return np.prod(norm.pdf(x_new, 0.7 * x + 0.2, 0.9), axis=1)
    if name == "walk":
        return np.prod(norm.pdf(x_new, x, 0.8), axis=1)
    with jax.enable_x64(True):
        gradient = np.asarray(jax.vmap(jax.grad(log_density, argnums=1), (None, 0))(0.0, jnp.asarray(x)))
    scale = np.array([0.8, 1.1])
    return np.prod(norm.pdf(x_new, x + scale**2 * gradient / 2, scale), axis=1)


def overlaps(name, x, y):
    """Of the kernels, and of the proposals times that of acceptance by one uniform number; by quadrature."""
    grid = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), axis=-1).reshape(-1, 2)
    with jax.enable_x64(True):
        log_p = jax.jit(jax.vmap(lambda z: log_density(0.0, z)))
        there, (at_x, at_y) = np.asarray(log_p(grid)), np.asarray(log_p(np.stack([x, y]).astype(np.float64)))
    q, accepted = [], []
    for start, here in ((x, at_x), (y, at_y)):
        forward = density_of(name, start[None], grid)
        backward = density_of(name, grid, start[None])
        q.append(forward)
        accepted.append(np.minimum(1, np.exp(there - here) * backward / np.maximum(forward, 1e-300)))
    area = (AXIS[1] - AXIS[0]) ** 2
    whole = np.sum(np.minimum(q[0] * accepted[0], q[1] * accepted[1])) * area
    return whole, np.sum(np.minimum(*q) * np.minimum(*accepted)) * area


@pytest.mark.parametrize("name", WHOLE)
def test_full_kernel_maximal(key, name):
    proposal, coupling = WHOLE[name](), FullKernelMaximal()
    for i, y in enumerate((Y2, FAR2)):
        draws = steps(jax.random.fold_in(key, i), proposal, coupling, X2, y)
        assert 0.1 < draws.accepted.mean() < 0.95
        assert_same_law(draws.y_after, draws.alone, y)
        whole, common = overlaps(name, X2, y)
        # An independence sampler's proposals are the same anyway.
        assert whole > (1 - 1e-9 if name == "independence" else 1.02) * common > 0
        assert_frequency(together(draws.x_after, draws.y_after), whole)
        # Of the proposals' maximal couplings, with the same uniform number, less often.
        other = CommonRandomNumbers() if name == "independence" else MaximalReflection()
        if name != "own":
            met = together(*steps(jax.random.fold_in(key, i), proposal, other, X2, y)[1:6:4])
            assert_frequency(met, common)
    draws = steps(key, proposal, coupling, X2, X2)
    assert coupling.faithful
    assert np.all(together(draws.x_after, draws.y_after))


# Discrete proposals.

STATES = np.array(list(itertools.product(range(3), repeat=2)), np.int32)
TABLE = np.log(np.array([[0.05, 0.2, 0.1], [0.25, 0.02, 0.08], [0.1, 0.05, 0.15]]))


def log_table(params, x):
    return params + jnp.asarray(TABLE, jnp.float32)[x[0], x[1]]


def transitions(states, log_p, neighbours):
    """The matrix of Metropolis-Hastings that proposes each of the neighbours alike."""
    index = {tuple(s): i for i, s in enumerate(states)}
    matrix = np.zeros((len(states), len(states)))
    for i, s in enumerate(states):
        others = neighbours(s)
        for other in others:
            j = index[tuple(other)]
            matrix[i, j] += min(1.0, math.exp(log_p[j] - log_p[i])) / len(others)
        matrix[i, i] = 1 - matrix[i].sum()
    return matrix


def shifted(state):
    for site, shift in itertools.product(range(2), (1, 2)):
        other = np.array(state)
        other[site] = (other[site] + shift) % 3
        yield other


def number_of(states, x):
    """The row of `states` that each x is."""
    found = np.all(x[:, None] == states, axis=2)
    assert np.all(found.sum(axis=1) == 1)
    return np.argmax(found, axis=1)


def assert_table(states, x, probabilities):
    """That x has these probabilities, each of them."""
    number = number_of(states, x)
    for i, probability in enumerate(probabilities):
        assert_frequency(number == i, probability)


def assert_maximal_independent(coupling, key):
    """All of the law of two chains that take one step, from positions that differ in one coordinate, in both and none.

    y' is drawn alike from the neighbours of y, and chains that differ in one coordinate meet in a quarter of the cases.
    """
    proposal = DiscreteUniform(3)
    matrix = transitions(STATES, TABLE.ravel(), lambda s: list(shifted(s)))
    for i, (x, y) in enumerate((((0, 1), (2, 1)), ((0, 1), (2, 0)), ((1, 2), (1, 2)))):
        x, y = np.array(x, np.int32), np.array(y, np.int32)
        draws = steps(jax.random.fold_in(key, i), proposal, coupling, x, y, log_table)
        for start, new in ((x, draws.x_new), (y, draws.y_new)):
            expected = np.bincount(number_of(STATES, np.stack(list(shifted(start)))), minlength=9) / 4
            assert_table(STATES, new, expected)
        for start, after in ((x, draws.x_after), (y, draws.y_after)):
            assert_table(STATES, after, matrix[number_of(STATES, start[None])[0]])
        distance = np.sum(x != y)
        assert_frequency(together(draws.x_new, draws.y_new), {0: 1.0, 1: 0.25, 2: 0.0}[int(distance)])
        met = together(draws.x_after, draws.y_after)
        assert np.all(met) if distance == 0 else np.any(met) if distance == 1 else True


def test_maximal_independent(key):
    assert_maximal_independent(MaximalIndependent(), key)
    assert MaximalIndependent.faithful


# Spins.

SPINS = np.array(list(itertools.product((-1.0, 1.0), repeat=4)), np.float32)
FIELD = np.array([0.1, -0.2, 0.3, -0.05], np.float32)
BONDS = np.array([0.5, 0.2, 0.7, 0.3], np.float32)


def ferromagnet(params, x):
    """A ring of four spins: an even cycle, which two colours suffice for."""
    return params + jnp.sum(jnp.asarray(BONDS) * x * jnp.roll(x, 1)) + jnp.sum(jnp.asarray(FIELD) * x)


LOG_P = np.sum(BONDS * SPINS * np.roll(SPINS, 1, axis=1), axis=1) + SPINS @ FIELD
ORDERED = [
    (np.array(x, np.float32), np.array(y, np.float32))
    for x, y in (
        ((-1, -1, 1, -1), (-1, 1, 1, -1)),
        ((-1, -1, -1, -1), (1, 1, 1, 1)),
        ((-1, 1, -1, 1), (1, 1, -1, 1)),
        ((1, -1, 1, -1), (1, -1, 1, -1)),
    )
]


def turned(state):
    """Its neighbours, one for each spin."""
    return [np.where(np.arange(len(state)) == i, -state, state) for i in range(len(state))]


def assert_spins_meet(draws, x, y, row_x, row_y):
    """Where chains differ in the spin that is drawn, they agree on it as often as any coupling of two coins allows."""
    drawn = np.argmax(draws.x_new != x, axis=1)
    for site in np.flatnonzero(x != y):
        agree = (drawn == site) & (draws.x_after[:, site] == draws.y_after[:, site])
        turns = [4 * row[number_of(SPINS, turned(s)[site][None])[0]] for row, s in ((row_x, x), (row_y, y))]
        assert_frequency(agree, (1 - abs(sum(turns) - 1)) / 4)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_monotone_spin_with_spin_flips(key, dtype):
    matrix = transitions(SPINS, LOG_P, turned)
    for i, (x, y) in enumerate(ORDERED):
        fold = jax.random.fold_in(key, i)
        draws = steps(fold, SpinFlip(), MonotoneSpin(), x.astype(dtype), y.astype(dtype), ferromagnet)
        row_x, row_y = (matrix[number_of(SPINS, s[None])[0]] for s in (x, y))
        assert_table(SPINS, draws.x_after, row_x)
        assert_table(SPINS, draws.y_after, row_y)
        assert_table(SPINS, draws.y_new, np.isin(np.arange(16), number_of(SPINS, np.stack(turned(y)))) / 4)
        assert_spins_meet(draws, x, y, row_x, row_y)
        met = together(draws.x_after, draws.y_after)
        assert np.any(met) == (np.sum(x != y) <= 1)
        assert np.all(met) == np.all(x == y)
        # Where the chains agree in the spin that is drawn, they stay in order.
        drawn = np.argmax(draws.x_new != x, axis=1)
        agreed = x[drawn] == y[drawn]
        assert np.all((draws.x_after <= draws.y_after)[agreed])


@eqx.filter_jit
def _sweeps(sampler, k, x, y, key):
    noise, alone = (sampler.noise(one, NUM, x) for one in jax.random.split(key))

    def step(inputs):
        noise, alone = inputs
        move = sampler.move(k, sampler.start(x), noise)
        y_alone = sampler.move(k, sampler.start(y), alone).after.x
        return move.after.x, sampler.follow(move, sampler.start(y), None).x, y_alone

    return jax.vmap(step)((noise, alone))


def drawn_from(start, colour):
    """The law of the heat bath from `start`, by enumeration: of the states that agree with it in the other colour."""
    same = np.all((start == SPINS)[:, np.arange(4) % 2 != colour], axis=1)
    weights = np.where(same, np.exp(LOG_P), 0)
    return weights / weights.sum()


@pytest.mark.parametrize("colour", [0, 1])
def test_monotone_spin_with_the_heat_bath(key, colour):
    sampler = HeatBathSampler(Target(ferromagnet, jnp.zeros(()), False), HeatBath(np.array([0, 1, 0, 1])))
    for i, (x, y) in enumerate(ORDERED):
        k = jnp.asarray(colour + 2)  # the second sweep
        x_after, y_after, alone = map(np.asarray, _sweeps(sampler, k, x, y, jax.random.fold_in(key, i)))
        assert_table(SPINS, x_after, drawn_from(x, colour))
        assert_table(SPINS, y_after, drawn_from(y, colour))
        assert_table(SPINS, alone, drawn_from(y, colour))
        assert np.all(x_after <= y_after)
        met = together(x_after, y_after)
        others_agree = np.all((x == y)[np.arange(4) % 2 != colour])
        # All that they may differ in is drawn anew, from the same law; or they still differ in the other colour.
        assert np.all(met) if others_agree else not np.any(met)
        # Each spin agrees as often as its two probabilities allow.
        for site in np.flatnonzero(np.arange(4) % 2 == colour):
            up = [drawn_from(s, colour)[SPINS[:, site] > 0].sum() for s in (x, y)]
            assert_frequency(x_after[:, site] == y_after[:, site], 1 - abs(up[0] - up[1]))


def test_an_independence_sampler_meets_where_both_accept(key):
    coupling = CommonRandomNumbers()
    draws = steps(key, WHOLE["independence"](), coupling, X2, Y2)
    np.testing.assert_array_equal(draws.x_new, draws.y_new)
    assert_same_law(draws.y_after, draws.alone, Y2)
    met = together(draws.x_after, draws.y_after)
    assert 0.1 < met.mean() < 0.95
    np.testing.assert_array_equal(met, draws.accepted & ~together(draws.y_after, Y2[None]))


# The power of these tests: planted mistakes must fail them.


class HalfReflected(MaximalReflection):
    """z - (e.z) e in place of z - 2 (e.z) e: the noise along e is lost."""

    def propose(self, kernel, move, other, noise):
        right, same = super().propose(kernel, move, other, noise)
        proposal = kernel.proposal
        shifted = proposal.mean(other) + proposal.scale.times(move.noise)
        return Proposed(jnp.where(same, right, (right + shifted) / 2), same)


class AlwaysTheSame(MaximalReflection):
    """y' = x' always."""

    def propose(self, kernel, move, other, noise):
        return Proposed(move.new.x, jnp.asarray(True))


class NeverTheSame(MaximalReflection):
    """Both laws are right, but chains do not meet."""

    def propose(self, kernel, move, other, noise):
        return Proposed(kernel.proposal.mean(other) + kernel.proposal.scale.times(move.noise), jnp.asarray(False))


class DecidedOnlyByX(MaximalReflection):
    """y accepts its proposal where x does."""

    def follow(self, kernel, move, other, noise):
        y_new, same = self.propose(kernel, move, other, noise)
        return Followed(kernel.target.at(jnp.where(move.accepted, y_new, other.x)), same & move.accepted)


@pytest.mark.parametrize(
    "coupling", [HalfReflected(), AlwaysTheSame(), DecidedOnlyByX()], ids=lambda c: type(c).__name__
)
def test_a_wrong_law_is_found(key, coupling):
    draws = steps(key, PROPOSALS["walk tril"](), coupling, X2, FAR2)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_both_laws(draws, "walk tril", X2, FAR2)


def test_meeting_too_seldom_is_found(key):
    draws = steps(key, PROPOSALS["walk tril"](), NeverTheSame(), X2, Y2)
    assert_both_laws(draws, "walk tril", X2, Y2)
    with pytest.raises(AssertionError, match="expected"):
        assert_frequency(together(draws.x_new, draws.y_new), overlap("walk tril", X2, Y2))


class KernelsNotCompared(FullKernelMaximal):
    """y goes with x wherever x accepts, as if both kernels were alike."""

    def follow(self, kernel, move, other, noise):
        return super().follow(kernel, move._replace(old=other), other, noise)


def test_a_full_kernel_that_compares_nothing_is_found(key):
    draws = steps(key, PROPOSALS["walk"](), KernelsNotCompared(), X2, Y2)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_same_law(draws.y_after, draws.alone, Y2)


class SameStateAlways(MaximalIndependent):
    """y'_i = x'_i, even where y_i is that: then it does not move."""

    def propose(self, kernel, move, other, noise):
        site, _ = move.noise
        return Proposed(other.x.at[site].set(move.new.x[site]))


def test_a_discrete_coupling_that_stays_is_found(key):
    with pytest.raises(AssertionError, match="expected"):
        assert_maximal_independent(SameStateAlways(), key)


class SameCoin(MonotoneSpin):
    """u for both, also where one would go up and the other down: the laws are right, but chains part."""

    def log_uniform(self, move, other):
        return move.log_uniform


def test_the_same_coin_does_not_meet_as_often(key):
    (x, y), matrix = ORDERED[1], transitions(SPINS, LOG_P, turned)
    row_x, row_y = (matrix[number_of(SPINS, s[None])[0]] for s in (x, y))
    draws = steps(key, SpinFlip(), SameCoin(), x, y, ferromagnet)
    assert_table(SPINS, draws.y_after, row_y)
    with pytest.raises(AssertionError, match="expected"):
        assert_spins_meet(draws, x, y, row_x, row_y)


def test_z_scores_see_a_shift(key):
    # Of the thresholds themselves: a twentieth of a standard deviation is found in as many draws.
    assert z_score(np.asarray(jax.random.normal(key, (NUM,))) + 0.06, 0) > THRESHOLD


# Pairs that do not fit.

HEAT = HeatBath(np.array([0, 1]))
MISFITS = {
    "reflection, independence": (MaximalReflection(), WHOLE["independence"](), "Gaussian proposals.*not for Indep"),
    "reflection, spins": (MaximalReflection(), SpinFlip(), "Gaussian proposals.*not for SpinFlip"),
    "reflection, states": (MaximalReflection(), DiscreteUniform(3), "Gaussian proposals.*not for DiscreteUniform"),
    "gcrefl, mala": (GCRefl(), MALA(0.5), "GCRefl is for RandomWalk, not for MALA: use MaximalReflection"),
    "gcrefl, pcn": (GCRefl(), PCN(0.5), "GCRefl is for RandomWalk, not for PCN"),
    "independent, walk": (MaximalIndependent(), RandomWalk(0.5), "for DiscreteUniform, not for RandomWalk"),
    "independent, spins": (MaximalIndependent(), SpinFlip(), "for DiscreteUniform, not for SpinFlip"),
    "monotone, walk": (MonotoneSpin(), RandomWalk(0.5), "for SpinFlip and HeatBath, not for RandomWalk"),
    "monotone, states": (MonotoneSpin(), DiscreteUniform(2), "for SpinFlip and HeatBath, not for DiscreteUniform"),
    "full, states": (FullKernelMaximal(), DiscreteUniform(2), "on a continuous space, not for DiscreteUniform"),
    "full, spins": (FullKernelMaximal(), SpinFlip(), "on a continuous space, not for SpinFlip"),
    "common, heat bath": (CommonRandomNumbers(), HEAT, "HeatBath is coupled by MonotoneSpin, not by CommonRandom"),
    "reflection, heat bath": (MaximalReflection(), HEAT, "HeatBath is coupled by MonotoneSpin, not by MaximalRefl"),
    "full, heat bath": (FullKernelMaximal(), HEAT, "HeatBath is coupled by MonotoneSpin, not by FullKernel"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_pairs_that_do_not_fit_are_refused(name):
    coupling, proposal, message = MISFITS[name]
    with pytest.raises(InputError, match=message):
        lehr.mh_expectation(log_density, lambda x: x, proposal, coupling, jnp.zeros(2), num_steps=10)


def test_an_own_proposal_is_not_reflected():
    # It is made into a proposal when it is called.
    expectation = lehr.mh_expectation(
        log_density, lambda x: x, Skewed(), MaximalReflection(), jnp.zeros(2), num_steps=10
    )
    with pytest.raises(InputError, match=r"Gaussian proposals.*not for OwnProposal"):
        expectation(0.0, jax.random.key(0))


@pytest.mark.parametrize("threshold", [0.0, -1.0, np.nan, np.inf])
def test_the_threshold_of_gcrefl_is_positive(threshold):
    with pytest.raises(InputError, match="the threshold of GCRefl must be positive"):
        GCRefl(threshold)


def test_gcrefl_needs_a_gradient(key):
    ratio = DensityRatio(lambda params, x_new, x: jnp.exp(isotropic(params, x_new) - isotropic(params, x)))
    expectation = lehr.mh_expectation(ratio, lambda x: x[0], RandomWalk(1.0), GCRefl(), jnp.zeros(2), num_steps=10)
    with pytest.raises(InputError, match="DensityRatio"):
        jax.grad(expectation)(0.0, key)


def test_every_coupling_is_tested():
    # A new one needs its tests here.
    known = {"CommonRandomNumbers", "Independent", "MaximalReflection", "GCRefl", "MaximalIndependent"}
    known |= {"MonotoneSpin", "FullKernelMaximal"}
    found = {c.__name__ for c in AbstractCoupling.__subclasses__() if c.__module__.startswith("lehr")}
    assert found == known
