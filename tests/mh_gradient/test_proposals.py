"""Proposals, each on its own: their densities, and that Metropolis-Hastings with them leaves its target invariant."""

import itertools
import math

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
    HeatBath,
    Independence,
    MaximalIndependent,
    MaximalReflection,
    MonotoneSpin,
    RandomWalk,
    SpinFlip,
)
from lehr.mh_gradient.discrete import spins_kept, spins_of
from lehr.mh_gradient.heat_bath import HeatBathSampler, _site_by
from lehr.mh_gradient.kernel import Kernel
from lehr.mh_gradient.proposals import OwnProposal
from lehr.mh_gradient.sampler import MetropolisHastings
from lehr.mh_gradient.target import Target
from tests import targets
from tests.statistics import THRESHOLD, assert_mean, z_score

TRIL = np.array([[0.9, 0.0], [-0.5, 0.6]])
LOC = np.array([0.2, -0.4])
X, NEW = np.array([0.7, -1.1]), np.array([-0.4, 0.3])


def log_density(params, x):
    return params * jnp.sum(jnp.sin(2 * x)) - jnp.sum((x - 0.3) ** 2) / 2 - 0.3 * x[0] * x[1]


class Drifting(eqx.Module):
    """An asymmetric proposal of a user: a drift that depends on the position, and steps that are not symmetric."""

    #: of steps in the first coordinate, which are exponential up or down
    up: float = 0.6

    def sample(self, key, x):
        keys = jax.random.split(key, 3)
        sign = jnp.where(jax.random.bernoulli(keys[0], self.up), 1.0, -0.8)
        step = sign * jax.random.exponential(keys[1], dtype=x.dtype)
        return jnp.stack([x[0] + step, 0.5 * x[1] - 0.3 + 1.1 * jax.random.normal(keys[2], dtype=x.dtype)])

    def log_prob(self, x, x_new):
        step = x_new[0] - x[0]
        of_step = jnp.where(step > 0, jnp.log(self.up) - step, jnp.log((1 - self.up) / 0.8) + step / 0.8)
        z = (x_new[1] - 0.5 * x[1] + 0.3) / 1.1
        return of_step - z**2 / 2 - math.log(1.1 * math.sqrt(2 * math.pi))


# Densities of proposals, against formulas of others.


def mala_mean(scale, params=0.4):
    gradient = 2 * params * np.cos(2 * X) - (X - 0.3) - 0.3 * X[::-1]
    return X + scale @ scale.T @ gradient / 2


GAUSSIANS = {
    "walk": (lambda: RandomWalk(0.7), lambda: (X, 0.7 * np.eye(2))),
    "walk (dim,)": (lambda: RandomWalk(np.array([0.5, 1.3])), lambda: (X, np.diag([0.5, 1.3]))),
    "walk tril": (lambda: RandomWalk(TRIL), lambda: (X, TRIL)),
    "mala": (lambda: MALA(0.7), lambda: (mala_mean(0.7 * np.eye(2)), 0.7 * np.eye(2))),
    "mala tril": (lambda: MALA(TRIL), lambda: (mala_mean(TRIL), TRIL)),
    "pcn": (lambda: PCN(0.6), lambda: (0.8 * X, 0.6 * np.eye(2))),
    "pcn tril": (lambda: PCN(0.6, TRIL, LOC), lambda: (LOC + 0.8 * (X - LOC), 0.6 * TRIL)),
}


@pytest.mark.parametrize("name", GAUSSIANS)
def test_gaussian_proposals(x64, key, name):
    proposal, (mean, scale) = (make() for make in GAUSSIANS[name])
    point = Target(log_density, jnp.asarray(0.4), True).at(jnp.asarray(X))
    expected = multivariate_normal(mean, scale @ scale.T).logpdf(NEW)
    np.testing.assert_allclose(proposal.log_prob(point, jnp.asarray(NEW)), expected, rtol=1e-12)
    z = proposal.noise(key, 50, jnp.asarray(X))
    assert z.shape == (50, 2)
    new = jax.vmap(lambda one: proposal.propose(point, one))(z)
    np.testing.assert_allclose(new, mean + z @ scale.T, rtol=1e-12)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_ratios_of_gaussian_proposals(x64, name):
    # log q(x', x) - log q(x, x'), which symmetric ones leave out.
    proposal = GAUSSIANS[name][0]()
    old, new = (Target(log_density, jnp.asarray(0.4), True).at(jnp.asarray(x)) for x in (X, NEW))
    expected = proposal.log_prob(new, old.x) - proposal.log_prob(old, new.x)
    np.testing.assert_allclose(proposal.log_ratio(new, old), expected, atol=1e-14)
    assert proposal.symmetric == (abs(expected) < 1e-12)


def test_the_independence_sampler(x64, key):
    proposal = Independence(lehr.Gaussian(jnp.asarray(LOC), jnp.asarray(TRIL)))
    old, new = (Target(log_density, jnp.asarray(0.4), False).at(jnp.asarray(x)) for x in (X, NEW))
    law = multivariate_normal(LOC, TRIL @ TRIL.T)
    np.testing.assert_allclose(proposal.log_prob(old, new.x), law.logpdf(NEW), rtol=1e-12)
    np.testing.assert_allclose(proposal.log_ratio(new, old), law.logpdf(X) - law.logpdf(NEW), rtol=1e-10)
    draws = np.asarray(proposal.noise(key, 20_000, jnp.asarray(X)))
    u = np.linalg.solve(TRIL, (draws - LOC).T)
    for i, j in ((0, 0), (0, 1), (1, 1)):
        assert_mean(u[i] * u[j], float(i == j))
    np.testing.assert_array_equal(proposal.propose(old, jnp.asarray(draws[0])), draws[0])


def test_an_own_proposal(x64, key):
    proposal = OwnProposal(Drifting())
    point = Target(log_density, jnp.asarray(0.4), False).at(jnp.asarray(X))
    for new in (NEW, NEW + 2):
        step = new[0] - X[0]
        of_step = 0.6 * math.exp(-step) if step > 0 else 0.4 / 0.8 * math.exp(step / 0.8)
        expected = math.log(of_step) + norm.logpdf(new[1], 0.5 * X[1] - 0.3, 1.1)
        np.testing.assert_allclose(proposal.log_prob(point, jnp.asarray(new)), expected, rtol=1e-12)
    # What is drawn has that density: P(step > 1/2) = 0.6 e^-1/2.
    new = jax.vmap(lambda one: proposal.propose(point, one))(proposal.noise(key, 20_000, point.x))
    assert_mean(np.asarray(new[:, 0] - X[0]) > 0.5, 0.6 * math.exp(-0.5))
    assert_mean(np.asarray(new[:, 0] - X[0]) < -0.5, 0.4 * math.exp(-0.5 / 0.8))


def neighbours(x, num_states):
    """All that differ from x in one coordinate."""
    return [
        tuple(int(s) if i == site else int(v) for i, v in enumerate(x))
        for site in range(len(x))
        for s in range(num_states)
        if s != x[site]
    ]


@pytest.mark.parametrize(("num_states", "dtype"), [(2, np.int32), (4, np.int32), (4, np.uint8)])
def test_discrete_proposals_by_enumeration(x64, num_states, dtype):
    proposal, x = DiscreteUniform(num_states), jnp.asarray([1, 0, num_states - 1], dtype)
    point = Target(lambda params, x: params, jnp.zeros(()), False).at(x)
    sites, shifts = np.meshgrid(np.arange(3), np.arange(1, num_states).astype(dtype), indexing="ij")
    new = jax.vmap(lambda site, shift: proposal.propose(point, (site, shift)))(sites.ravel(), shifts.ravel())
    assert new.dtype == dtype
    # Every neighbour by one of the noises, which are all alike.
    assert sorted(map(tuple, np.asarray(new).tolist())) == sorted(neighbours(np.asarray(x), num_states))
    for one in new:
        np.testing.assert_allclose(proposal.log_prob(point, one), -math.log(3 * (num_states - 1)), rtol=1e-12)
    # log q in all, over what can be reached: it sums to one.
    total = sum(math.exp(proposal.log_prob(point, one)) for one in new)
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_noise_of_discrete_proposals(key):
    x = jnp.zeros(3, jnp.int32)
    sites, shifts = map(np.asarray, DiscreteUniform(4).noise(key, 20_000, x))
    for site, shift in itertools.product(range(3), range(1, 4)):
        assert_mean((sites == site) & (shifts == shift), 1 / 9)
    flips = np.asarray(SpinFlip().noise(key, 20_000, jnp.ones(5)))
    for site in range(5):
        assert_mean(flips == site, 1 / 5)


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_spin_flips_by_enumeration(x64, dtype):
    proposal, x = SpinFlip(), np.array([1, -1, -1, 1], dtype)
    point = Target(lambda params, x: params, jnp.zeros(()), False).at(jnp.asarray(x))
    for site in range(4):
        new = proposal.propose(point, jnp.asarray(site))
        np.testing.assert_array_equal(new, np.where(np.arange(4) == site, -x, x))
        assert new.dtype == dtype
        np.testing.assert_allclose(proposal.log_prob(point, new), -math.log(4), rtol=1e-12)


def spins(params, x):
    return params + 0.3 * jnp.sum(x * jnp.roll(x, 1) * 1.0)


@eqx.filter_jit
def moves_and_what_is_recalled(sampler, key, x):
    """Of 40 steps."""

    def step(point, inputs):
        k, noise = inputs
        move = sampler.move(k, point, noise)
        return move.after, (point.x, move, sampler.recall(k, sampler.record(move), noise))

    return jax.lax.scan(step, sampler.start(x), (jnp.arange(40), sampler.noise(key, 40, x)))[1]


RECALLED = {
    "walk": lambda target: (Kernel(target, RandomWalk(1.2)), jnp.zeros(3)),
    "mala": lambda target: (Kernel(target, MALA(1.2)), jnp.zeros(3)),
    "uniform": lambda target: (Kernel(target, DiscreteUniform(4)), jnp.zeros(3, jnp.int32)),
    "spins": lambda target: (Kernel(target, SpinFlip()), jnp.ones(4)),
    "spins of one byte": lambda target: (Kernel(target, SpinFlip()), jnp.ones(4, jnp.int8)),
    "bath": lambda target: (target, jnp.ones(4)),
}


@pytest.mark.parametrize("name", RECALLED)
def test_steps_are_recalled_exactly(key, name):
    """What a step leaves for the gradient is all that it was."""
    target = Target(lambda params, x: spins(params, x) - 0.4 * jnp.sum(x**2.0), jnp.zeros(()), name == "mala")
    of, x = RECALLED[name](target)
    if name == "bath":
        sampler = HeatBathSampler(target, HeatBath.checkerboard(4))
    else:
        sampler = MetropolisHastings(of, MaximalReflection())
    before, moves, recalled = moves_and_what_is_recalled(sampler, key, x)
    assert 0 < moves.accepted.mean() < 1
    jax.tree.map(np.testing.assert_array_equal, moves, recalled)
    assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(moves), jax.tree.leaves(recalled)))
    if name != "bath":
        np.testing.assert_array_equal(before, moves.old.x)


def test_what_follows_is_not_kept():
    """Spins are a byte each, one that is turned over is where its noise says, and a log ratio is a difference."""
    x = jnp.ones(4)
    target = Target(spins, jnp.zeros(()), False)
    walk = MetropolisHastings(Kernel(target, RandomWalk(1.2)), MaximalReflection())
    flip = MetropolisHastings(Kernel(target, SpinFlip()), MonotoneSpin())
    bath = HeatBathSampler(target, HeatBath.checkerboard(4))
    walked, turned, drawn = (
        sampler.record(
            sampler.move(jnp.asarray(0), sampler.start(x), jax.tree.map(lambda leaf: leaf[0], sampler.noise(KEY, 1, x)))
        )
        for sampler in (walk, flip, bath)
    )
    assert walked.log_ratio is None
    assert turned.log_ratio is None
    assert turned.otherwise.x is None
    assert turned.after.x.dtype == drawn.after.x.dtype == bool


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_spins_have_a_type_of_their_own(precision):
    """As the chain had them: a type that gives way to another would be differentiated in that one."""
    with jax.enable_x64(precision == np.float64):
        x = jnp.ones(3, precision).at[1].multiply(-1)
        again = spins_of(spins_kept(x))
        assert again.dtype == precision
        assert not again.weak_type
        np.testing.assert_array_equal(again, x)


class Forwards:
    """A step that seldom leads back: up by up to one, or down by up to a half."""

    def sample(self, key, x):
        return x + jax.random.uniform(key, x.shape, minval=-0.5)

    def log_prob(self, x, x_new):
        return jnp.where((x_new > x - 0.5) & (x_new < x + 1), -jnp.log(1.5), -jnp.inf)[0]


def test_forbidden_is_where_the_density_is_0(key):
    """And not what has no way back."""
    target = Target(lambda params, x: jnp.where(x[0] < 1, params, -jnp.inf), jnp.zeros(()), False)
    sampler = MetropolisHastings(Kernel(target, OwnProposal(Forwards())), CommonRandomNumbers())
    _, moves, _ = moves_and_what_is_recalled(sampler, key, jnp.zeros(1))
    np.testing.assert_array_equal(moves.forbidden, moves.new.x[:, 0] >= 1)
    assert 0 < moves.forbidden.sum() < (moves.log_ratio == -jnp.inf).sum()


class StepsOfOne:
    """Up or down by one."""

    def sample(self, key, x):
        return x + jnp.where(jax.random.bernoulli(key), 1, -1).astype(x.dtype)

    def log_prob(self, x, x_new):
        return jnp.log(jnp.where(jnp.abs(x_new - x) == 1, 0.5, 0.0))[0]


@pytest.mark.filterwarnings("ignore:.*the alternative has not met")
def test_large_whole_numbers_are_told_apart():
    """As floats they would be equal, and no alternative would be born."""

    def gradient(start):
        expectation = lehr.mh_expectation(
            lambda theta, x: -theta * jnp.abs(x - start)[0].astype(float),
            lambda x: (x - start)[0] ** 2 * 1.0,
            StepsOfOne(),
            CommonRandomNumbers(),
            jnp.full(1, start, jnp.int32),
            num_steps=20,
            num_chains=50,
        )
        return jax.grad(expectation)(0.4, KEY)

    assert gradient(2**25) == gradient(0) != 0


def test_unsigned_states_are_as_far_apart_as_others():
    def gradient(dtype):
        expectation = lehr.mh_expectation(
            lambda theta, x: theta * x[0].astype(float),
            lambda x: x[0] * 1.0,
            DiscreteUniform(5),
            MaximalIndependent(),
            jnp.full(1, 2, dtype),
            num_steps=20,
            num_chains=50,
        )
        return jax.grad(expectation)(0.4, KEY)

    assert gradient(jnp.uint8) == gradient(jnp.int32) != 0


# Invariance: chains that start at exact draws of the target still have its moments.

NUM_STEPS, NUM_CHAINS = 15, 20_000


@eqx.filter_jit
def run(sampler, key, starts):
    """Where chains from `starts` end, and what share of the steps they accepted."""

    def chain(key, x):
        def step(point, inputs):
            k, noise = inputs
            move = sampler.move(k, point, noise)
            return move.after, move.accepted

        inputs = jnp.arange(NUM_STEPS), sampler.noise(key, NUM_STEPS, x)
        end, accepted = jax.lax.scan(step, sampler.start(x), inputs)
        return end.x, jnp.mean(accepted)

    ends, accepted = jax.vmap(chain)(jax.random.split(key, len(starts)), starts)
    return ends, jnp.mean(accepted)


def z_scores_of_moments(key, proposal):
    """Of h(x_n) - h(x_0), which is zero in the mean, h of first to third order; chain by chain."""
    target = targets.mixture_2d()
    key_starts, key_chains = jax.random.split(key)
    starts = target.sample(key_starts, (NUM_CHAINS,))
    density = Target(lambda params, x: target(x) + params, jnp.zeros(()), proposal.needs_gradient)
    ends, accepted = run(MetropolisHastings(Kernel(density, proposal), MaximalReflection()), key_chains, starts)
    assert 0.1 < accepted < 0.97

    def moments(x):
        a, b = np.asarray(x, np.float64).T
        return np.stack([a, b, a**2, b**2, a * b, a**3, a * b**2, np.sin(2 * a), np.sin(2 * b)])

    assert np.abs(np.asarray(ends) - np.asarray(starts)).mean() > 0.2
    return [z_score(change, 0) for change in moments(ends) - moments(starts)]


CONTINUOUS = {
    "walk": lambda: RandomWalk(1.2),
    "walk tril": lambda: RandomWalk(TRIL),
    "mala": lambda: MALA(1.2),
    "mala tril": lambda: MALA(1.5 * TRIL),
    "pcn": lambda: PCN(0.7, 1.6 * TRIL, LOC),
    "independence": lambda: Independence(lehr.Gaussian(jnp.array([0.3, 0.2]), jnp.diag(jnp.array([1.8, 1.5])))),
    "own": lambda: OwnProposal(Drifting()),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_target_is_invariant(key, name):
    for z in z_scores_of_moments(key, CONTINUOUS[name]()):
        assert abs(z) < THRESHOLD


class AsIfSymmetric(PCN):
    """The ratio of q left out."""

    symmetric = True


class WrongDrift(MALA):
    """All of the drift in place of half, which log q does not know of."""

    def propose(self, point, noise):
        return 2 * self.mean(point) - point.x + self.scale.times(noise)


class OwnAsIfSymmetric(OwnProposal):
    """The ratio of q left out."""

    symmetric = True


@pytest.mark.parametrize(
    "proposal",
    [AsIfSymmetric(0.7, 1.6 * TRIL, LOC), WrongDrift(1.2), OwnAsIfSymmetric(Drifting())],
    ids=lambda proposal: type(proposal).__name__,
)
def test_a_wrong_proposal_is_found(key, proposal):
    # The power of the test above.
    assert max(map(abs, z_scores_of_moments(key, proposal))) > THRESHOLD


STATES = np.array(list(itertools.product(range(3), repeat=2)), np.int32)
TABLE = np.array([[0.05, 0.2, 0.1], [0.25, 0.02, 0.08], [0.1, 0.05, 0.15]])
SPINS = np.array(list(itertools.product((-1, 1), repeat=4)))
BONDS, FIELD = np.array([0.5, -0.4, 0.7, 0.3]), np.array([0.4, -0.2, 0.3, -0.1])


def ring(params, x):
    """Four spins on a ring, with bonds of either sign, in a field."""
    bonds = jnp.sum(jnp.asarray(BONDS, jnp.float32) * x * jnp.roll(x, 1))
    return params + bonds + jnp.sum(jnp.asarray(FIELD, jnp.float32) * x)


RING = np.exp(np.sum(BONDS * SPINS * np.roll(SPINS, 1, axis=1), axis=1) + SPINS @ FIELD)


def z_scores_of_table(key, sampler, states, probabilities):
    """Of the change of each state's probability, from exact draws to the ends of chains."""
    key_starts, key_chains = jax.random.split(key)
    probabilities = probabilities / probabilities.sum()
    first = jax.random.choice(key_starts, len(states), (NUM_CHAINS,), p=jnp.asarray(probabilities))
    ends, accepted = run(sampler, key_chains, jnp.asarray(states)[first])
    assert 0.1 < accepted < 0.97
    found = np.all(np.asarray(ends)[:, None] == states, axis=2)
    assert np.all(found.sum(axis=1) == 1)
    last = np.argmax(found, axis=1)
    assert np.mean(last != np.asarray(first)) > 0.3
    return [z_score((last == i) * 1.0 - (np.asarray(first) == i), 0) for i in range(len(states))]


def states_chain(proposal):
    density = Target(lambda params, x: params + jnp.log(jnp.asarray(TABLE))[x[0], x[1]], jnp.zeros(()), False)
    return MetropolisHastings(Kernel(density, proposal), MaximalIndependent())


def spins_chain(proposal):
    target = Target(ring, jnp.zeros(()), False)
    if isinstance(proposal, HeatBath):
        return HeatBathSampler(target, proposal)
    return MetropolisHastings(Kernel(target, proposal), MonotoneSpin())


COLOURS = np.array([0, 1, 0, 1])
DISCRETE = {
    "states": (lambda: states_chain(DiscreteUniform(3)), STATES, TABLE.ravel()),
    "spin flips": (lambda: spins_chain(SpinFlip()), SPINS.astype(np.float32), RING),
    "spin flips, integers": (lambda: spins_chain(SpinFlip()), SPINS.astype(np.int32), RING),
    "heat bath": (lambda: spins_chain(HeatBath(COLOURS)), SPINS.astype(np.float32), RING),
    "heat bath, four colours": (lambda: spins_chain(HeatBath(np.arange(4))), SPINS.astype(np.float32), RING),
}


def test_spins_that_cannot_turn_do_not():
    """Their probability is 0 in this precision; a uniform number of 0, one in eight millions, must not pass."""
    target = Target(lambda params, x: -200 * jnp.sum(x), jnp.zeros(()), False)
    sampler = HeatBathSampler(target, HeatBath(np.zeros(64, int)))
    x = -jnp.ones(64)

    def turned(key):
        noise = sampler.noise(key, 10_000, x)
        after = jax.vmap(lambda noise: sampler.move(jnp.asarray(0), sampler.start(x), noise).after.x)(noise)
        return jnp.min(noise), jnp.sum(after > 0)

    lowest, num = jax.jit(lambda keys: jax.lax.map(turned, keys))(jax.random.split(jax.random.key(0), 100))
    # 64 million numbers: such a zero was among them.
    assert jnp.min(lowest) < -80
    assert jnp.sum(num) == 0


@pytest.mark.parametrize("num", [1, 2, 3, 7, 20, 144])
def test_a_site_in_proportion_to_its_strength(num):
    """Of some that cannot be drawn; each as often as evenly spread uniform numbers do."""
    generator = np.random.default_rng(num)
    strengths = np.where(generator.random(num) < 0.7, generator.random(num), 0)
    strengths[generator.integers(num)] = 0.5
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    sites, totals = jax.vmap(_site_by, in_axes=(None, 0))(jnp.asarray(strengths, jnp.float32), jnp.asarray(uniforms))
    np.testing.assert_allclose(totals, strengths.sum(), rtol=1e-5)
    shares = np.bincount(np.asarray(sites), minlength=num) / len(uniforms)
    assert shares.shape == (num,)
    np.testing.assert_allclose(shares, strengths / strengths.sum(), atol=2e-4)


def test_no_site_at_all():
    site, total = _site_by(jnp.zeros(5), jnp.asarray(0.3))
    assert 0 <= site < 5
    assert total == 0


@pytest.mark.parametrize("name", DISCRETE)
def test_a_discrete_target_is_invariant(key, name):
    make, states, probabilities = DISCRETE[name]
    for z in z_scores_of_table(key, make(), states, probabilities):
        assert abs(z) < THRESHOLD


class MostlyUp(DiscreteUniform):
    """The next state more often than the one before, as if that were symmetric."""

    def noise(self, key, num_steps, x):
        key, key_up = jax.random.split(key)
        sites, shifts = super().noise(key, num_steps, x)
        return sites, jnp.where(jax.random.bernoulli(key_up, 0.5, (num_steps,)), 1, shifts)


def test_a_wrong_discrete_chain_is_found(key):
    # The power of the test above: a proposal that is not symmetric, and neighbours drawn at once.
    for sampler, states, table in (
        (states_chain(MostlyUp(3)), STATES, TABLE.ravel()),
        (spins_chain(HeatBath(np.array([0, 0, 1, 1]))), SPINS.astype(np.float32), RING),
    ):
        assert max(map(abs, z_scores_of_table(key, sampler, states, table))) > THRESHOLD


# What can be wrong with them, and what is said about it.

SCALED = {"RandomWalk": RandomWalk, "MALA": MALA, "PCN": lambda scale: PCN(0.5, scale)}
BAD_SCALES = {
    "zero": 0.0,
    "negative": -1.0,
    "nan": np.nan,
    "infinite": np.inf,
    "one negative": np.array([1.0, -1.0]),
    "upper": np.array([[1.0, 0.1], [0.0, 1.0]]),
    "diagonal": np.array([[1.0, 0.0], [0.5, 0.0]]),
    "not square": np.ones((2, 3)),
    "not square, no upper": np.array([[1.0], [0.5]]),
    "three axes": np.ones((2, 2, 2)),
}


@pytest.mark.parametrize("value", BAD_SCALES)
@pytest.mark.parametrize("name", SCALED)
def test_scales_that_are_none(name, value):
    with pytest.raises(InputError, match=f"the scale of {name} must be a positive number, one for each dimension, or"):
        SCALED[name](BAD_SCALES[value])


@pytest.mark.parametrize("step", [0.0, 1.0, -0.1, 1.5, np.nan, np.array([0.5, 0.5])], ids=str)
def test_steps_of_pcn(step):
    with pytest.raises(InputError, match="the step of PCN must be between 0 and 1, but it is"):
        PCN(step)


@pytest.mark.parametrize("num_states", [1, 0, -3])
def test_there_are_at_least_two_states(num_states):
    with pytest.raises(InputError, match=f"num_states must be a whole number of at least 2, but it is '{num_states}'"):
        DiscreteUniform(num_states)


@pytest.mark.parametrize(
    ("colours", "message"),
    [
        (np.array([0, 2]), "without a gap"),
        (np.array([-1, 0]), "without a gap"),
        (np.array([1, 1]), "without a gap"),
        (np.array([0.0, 1.0]), "whole numbers, one for each site"),
        (np.array([[0, 1]]), "whole numbers, one for each site"),
        (np.array([], np.int32), "whole numbers, one for each site"),
    ],
)
def test_colours(colours, message):
    with pytest.raises(InputError, match=message):
        HeatBath(colours)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (3, 4), (2, 2, 5)])
def test_a_periodic_checkerboard_has_even_sides(shape):
    with pytest.raises(InputError, match="needs even sides"):
        HeatBath.checkerboard(*shape)


@pytest.mark.parametrize("shape", [(4,), (4, 6), (2, 4, 4)])
def test_a_checkerboard_separates_neighbours(shape):
    bath = HeatBath.checkerboard(*shape)
    colours = bath.colours.reshape(shape)
    assert bath.num_colours == 2
    for axis in range(len(shape)):
        assert np.all(colours != np.roll(colours, 1, axis))


def expectation(proposal, coupling, x0, density=log_density, **options):
    return lehr.mh_expectation(density, lambda x: x[0] * 1.0, proposal, coupling, x0, num_steps=10, **options)


KEY = jax.random.key(0)
POSITIONS = {
    "walk, integers": (RandomWalk(1.0), MaximalReflection(), np.zeros(2, np.int32), "RandomWalk moves float positions"),
    "mala, integers": (MALA(1.0), MaximalReflection(), np.zeros(2, np.int32), "MALA moves float positions"),
    "walk, other dimension": (
        RandomWalk(np.ones(3)),
        MaximalReflection(),
        np.zeros(2),
        "the scale of RandomWalk is for 3 dimensions, but x0 has 2",
    ),
    "mala, other dimension": (MALA(np.eye(3)), MaximalReflection(), np.zeros(2), "scale of MALA is for 3 dimensions"),
    "states, floats": (
        DiscreteUniform(3),
        MaximalIndependent(),
        np.zeros(2),
        "DiscreteUniform moves integer positions",
    ),
    "states, too large": (DiscreteUniform(3), MaximalIndependent(), np.array([0, 3]), "positions from 0 to 2, but x0"),
    "states, negative": (DiscreteUniform(3), MaximalIndependent(), np.array([0, -1]), "positions from 0 to 2, but x0"),
    "spins, zero": (SpinFlip(), MonotoneSpin(), np.array([1.0, 0.0]), r"spins are \+1 or -1, but x0 has other numbers"),
    "heat bath, zero": (HeatBath(COLOURS), MonotoneSpin(), np.zeros(4), r"spins are \+1 or -1"),
    "heat bath, integers": (HeatBath(COLOURS), MonotoneSpin(), np.ones(4, np.int32), "HeatBath takes spins as floats"),
    "heat bath, other sites": (HeatBath(COLOURS), MonotoneSpin(), np.ones(3), r"colours of 4 sites, but x0 has .*\(3,"),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_that_a_proposal_cannot_move(name):
    proposal, coupling, x0, message = POSITIONS[name]
    with pytest.raises(InputError, match=message):
        expectation(proposal, coupling, jnp.asarray(x0))(0.4, KEY)


class OtherShape(Drifting):
    def sample(self, key, x):
        return super().sample(key, x)[:1]


class OtherType(Drifting):
    def sample(self, key, x):
        return jnp.round(super().sample(key, x)).astype(jnp.int32)


@pytest.mark.parametrize(("own", "what"), [(OtherShape(), r"float32\[1\]"), (OtherType(), r"int32\[2\]")])
def test_an_own_proposal_gives_positions_like_x(own, what):
    with pytest.raises(InputError, match=what + r", but x0 is float32\[2\]: it must give positions like x"):
        expectation(own, CommonRandomNumbers(), jnp.zeros(2))(0.4, KEY)


def test_a_proposal_has_its_two_methods():
    with pytest.raises(InputError, match=r"must have sample\(key, x\) and log_prob\(x, x_new\), but float has not"):
        expectation(0.5, MaximalReflection(), jnp.zeros(2))
    with pytest.raises(InputError, match=r"must have sample\(key, x\) and log_prob\(x, x_new\), but Array.* has not"):
        expectation(lambda params: params * 0.5, MaximalReflection(), jnp.zeros(2))(jnp.asarray(0.4), KEY)


HEAT = {
    "square": (lambda params, x: params * x[0] * x[1] + 0.5 * x[0] ** 2 * x[1], "not linear in spin 0: turned over"),
    "square of one": (
        lambda params, x: params * jnp.sum(x[1:] * x[:-1]) + x[3] ** 2 + 0.3 * x[3],
        "not linear in spin 3",
    ),
    "exponential": (lambda params, x: params * jnp.exp(x[3]), "not linear in spin 3: turned over it changes by"),
    "same colour": (
        lambda params, x: params * (x[0] * x[1] + x[0] * x[2]),
        "spin 0 interacts with others of its colour",
    ),
    "same colour, last": (lambda params, x: params * x[3] * x[1], "spin .* interacts with others of its colour"),
}


@pytest.mark.parametrize("name", HEAT)
def test_log_densities_that_the_heat_bath_refuses(name):
    density, message = HEAT[name]
    x0 = jnp.array([1.0, -1.0, -1.0, 1.0])
    bath = expectation(HeatBath(COLOURS), MonotoneSpin(), x0, density)
    with pytest.raises(InputError, match=message):
        bath(0.4, KEY)


def test_the_heat_bath_takes_a_log_density():
    ratio = DensityRatio(lambda params, x_new, x: jnp.exp(params * jnp.sum(x_new - x)))
    with pytest.raises(InputError, match="HeatBath needs a log density: a DensityRatio is for proposals"):
        expectation(HeatBath(COLOURS), MonotoneSpin(), jnp.ones(4), ratio)(0.4, KEY)


@pytest.mark.parametrize("options", [{"strength": "gradient"}, {"weights": "single-sided"}])
def test_the_heat_bath_knows_no_gradient_of_each_site(options):
    with pytest.raises(InputError, match='HeatBath has no strength="gradient" and no weights="single-sided"'):
        expectation(HeatBath(COLOURS), MonotoneSpin(), jnp.ones(4), ring, **options)(0.4, KEY)


# Faults of the library that these tests have found.


def test_states_do_not_overflow():
    proposal = DiscreteUniform(100)
    point = Target(lambda params, x: params, jnp.zeros(()), False).at(jnp.array([90], jnp.int8))
    new = [int(proposal.propose(point, (jnp.asarray(0), jnp.asarray(s, jnp.int8)))[0]) for s in range(1, 100)]
    assert sorted(new) == [s for s in range(100) if s != 90]


@pytest.mark.parametrize(
    ("proposal", "coupling", "x0"),
    [
        (SpinFlip(), MonotoneSpin(), np.array([[1.0, 1.0], [5.0, 1.0]])),
        (DiscreteUniform(3), MaximalIndependent(), np.array([[0, 1], [5, 1]])),
    ],
    ids=["spins", "states"],
)
def test_the_first_positions_of_all_chains_are_checked(proposal, coupling, x0):
    def density(params, x):
        return params * jnp.sum(x * 1.0)

    with pytest.raises(InputError, match="x0"):
        expectation(proposal, coupling, jnp.asarray(x0), density, num_chains=2)(0.4, KEY)


class OfOtherShape(eqx.Module):
    """One number, whatever the dimension."""

    def sample(self, key):
        return jax.random.normal(key)

    def log_prob(self, x):
        return -jnp.sum(x**2) / 2


@pytest.mark.parametrize("name", ["independence", "pcn"])
def test_the_dimension_of_what_a_proposal_is_made_of(name):
    proposal = Independence(OfOtherShape()) if name == "independence" else PCN(0.5, 1.0, np.zeros(3))
    with pytest.raises(InputError, match=r"dimension|shape|float32\[2\]"):
        expectation(proposal, CommonRandomNumbers(), jnp.zeros(2))(0.4, KEY)
