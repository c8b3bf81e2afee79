"""A learned reverse: any drift leaves the weights unbiased, both ways, and each way undoes the other."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.stats import norm

from lehr import Annealer, Hamiltonian, InputError, Langevin, Metropolis, RandomWalk, Schedule, anneal
from lehr.kernels import LearnedReverse, linear_drift, network_drift
from lehr.objectives import davi
from lehr.path import Problem
from tests import targets
from tests.statistics import THRESHOLD, assert_unbiased_weights, weight_z_score

MOVES = {
    "langevin": Langevin(0.5),
    "hamiltonian": Hamiltonian(0.6, 0.7),
    "no persistence": Hamiltonian(0.6),
    "scaled": Hamiltonian(np.array([0.8, 0.3]), 0.5, np.array([2.0, 0.5])),
    "random walk": RandomWalk(0.3),
}


def some_drift(kernel, size=0.2):
    """Not zero, not small, different in every input."""
    drift = linear_drift(2, momentum=isinstance(kernel, Hamiltonian))
    leaves, tree = jax.tree.flatten(drift)
    keys = jax.random.split(jax.random.key(8), len(leaves))
    return jax.tree.unflatten(tree, [size * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])


def annealer(kernel, num_steps=3):
    return Annealer(targets.base_2d(), Schedule.linear(num_steps), kernel)


@pytest.mark.parametrize("name", MOVES)
def test_without_drift_it_is_the_move(name, key):
    move, problem = MOVES[name], targets.log_gamma_2d()
    momentum = isinstance(move, Hamiltonian)
    network = functools.partial(network_drift, key, 2, momentum=momentum, width=4)
    for drift in (linear_drift(2, momentum=momentum), network(), network(linear=True)):
        plain, learned = (anneal(key, annealer(k), problem, 8) for k in (move, LearnedReverse(move, drift)))
        np.testing.assert_allclose(learned.log_weights, plain.log_weights, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(learned.positions, plain.positions)


def test_a_network_on_top_of_a_linear_drift_is_their_sum(key):
    network = network_drift(key, 2, momentum=True, width=4, linear=True)
    some = eqx.tree_at(lambda n: n.linear, network, some_drift(Hamiltonian(0.1)))
    x, u, beta = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.5]), jnp.array(0.4)
    np.testing.assert_allclose(some(x, u, beta), network(x, u, beta) + some.linear(x, u, beta), rtol=1e-6)
    assert np.abs(some.linear(x, u, beta)).min() > 0.01


@pytest.mark.parametrize("name", MOVES)
def test_weights_are_unbiased_whatever_the_drift(name, key):
    setting, move = targets.coarse_setting(), MOVES[name]
    kernel = LearnedReverse(move, some_drift(move))
    assert_unbiased_weights(setting.forward(key, kernel).log_weights, setting.target.log_evidence)


@pytest.mark.parametrize("name", MOVES)
def test_weights_backwards_are_unbiased_whatever_the_drift(name, key):
    setting, move = targets.coarse_setting(), MOVES[name]
    kernel = LearnedReverse(move, some_drift(move))
    assert_unbiased_weights(setting.reverse(key, kernel).log_weights, -setting.target.log_evidence)


class WithoutTheNormaliser(LearnedReverse):
    """A planted bug: the ratio without - |s r|^2 / 2."""

    def forwards(self, density, state, noise):
        moved = super().forwards(density, state, noise)
        assert moved.log_ratio is not None
        return eqx.tree_at(
            lambda m: m.log_ratio, moved, moved.log_ratio + jnp.sum(self._shift(density, moved.state) ** 2) / 2
        )


@pytest.mark.parametrize("name", ["langevin", "hamiltonian"])
def test_a_planted_bug_is_seen(name, key):
    setting, move = targets.coarse_setting(), MOVES[name]
    kernel = WithoutTheNormaliser(move, some_drift(move))
    assert abs(weight_z_score(setting.forward(key, kernel).log_weights, setting.target.log_evidence)) > THRESHOLD


def test_langevin_ratio_is_that_of_its_two_gaussians(x64):
    density = Problem(targets.base_2d(), targets.log_gamma_2d()).at(jnp.asarray(0.6))
    e, noise, x = np.array([0.5, 0.9]), jnp.array([0.8, -0.3]), jnp.array([0.4, -1.2])
    move = Langevin(e)
    kernel = LearnedReverse(move, some_drift(move))
    start = kernel.init(jax.random.key(0), density, x)
    moved = kernel.forwards(density, start, noise)
    after = moved.state.point.position
    assert moved.log_ratio is not None

    def log_density(to, at, drift):
        return jnp.sum(norm.logpdf(to, at + e**2 / 2 * density.gradient(at) + e**2 * drift, e))

    forwards = log_density(after, x, 0.0)
    backwards = log_density(x, after, kernel.drift(after, None, density.beta))
    np.testing.assert_allclose(moved.log_ratio, backwards - forwards, rtol=1e-10)


def test_hamiltonian_ratio_is_that_of_its_two_refreshments(x64):
    density = Problem(targets.base_2d(), targets.log_gamma_2d()).at(jnp.asarray(0.6))
    g, noise, x = 0.7, jnp.array([0.8, -0.3]), jnp.array([0.4, -1.2])
    move = Hamiltonian(0.5, g)
    kernel = LearnedReverse(move, some_drift(move))
    start = kernel.init(jax.random.key(0), density, x)
    moved = kernel.forwards(density, start, noise)
    hat = move.move(density, start, noise).state.momentum
    assert moved.log_ratio is not None
    assert hat is not None
    assert start.momentum is not None
    after, s = moved.state, np.sqrt(1 - g**2)
    drift = kernel.drift(after.point.position, after.momentum, density.beta)
    # On the space with momentum: the leapfrog preserves volume, and the ends carry N(0, I) for the momentum.
    assert after.momentum is not None
    ratio = jnp.sum(norm.logpdf(hat, g * after.momentum + s**2 * drift, s) - norm.logpdf(after.momentum, g * hat, s))
    ends = jnp.sum(norm.logpdf(after.momentum) - norm.logpdf(start.momentum))
    np.testing.assert_allclose(moved.log_ratio, ratio + ends, rtol=1e-10)


@pytest.mark.parametrize("name", ["langevin", "hamiltonian"])
def test_backwards_undoes_forwards(name, x64):
    density = Problem(targets.base_2d(), targets.log_gamma_2d()).at(jnp.asarray(0.6))
    move = MOVES[name]
    move = jax.tree.map(lambda leaf: leaf.astype(float), move)
    kernel = LearnedReverse(move, some_drift(move))
    start = kernel.init(jax.random.key(0), density, jnp.array([0.4, -1.2]))
    noise = jnp.array([0.8, -0.3])
    moved = kernel.forwards(density, start, noise)
    # The noise with which L draws the start, and the chain's reversal of the momentum.
    z = move.reverse_noise(density, start, move.move(density, start, noise).state, noise)
    shift = kernel._shift(density, moved.state)
    reverse_noise = z - shift if start.momentum is None else -(z - shift)
    back = kernel.backwards(density, move.flip(moved.state), reverse_noise)
    assert moved.log_ratio is not None
    assert back.log_ratio is not None
    np.testing.assert_allclose(back.state.point.position, start.point.position, atol=1e-10)
    np.testing.assert_allclose(back.log_ratio, -moved.log_ratio, atol=1e-10)
    if start.momentum is not None:
        assert back.state.momentum is not None
        np.testing.assert_allclose(back.state.momentum, -start.momentum, atol=1e-10)


def test_a_trained_drift_closes_most_of_the_gap():
    # From a base that is far, in few steps, the chain lags; a linear reverse drift knows by how much.
    target = targets.conjugate_2d()
    base = targets.Gaussian(jnp.array([-0.5, 0.5]), jnp.eye(2))
    drift = linear_drift(2, momentum=True)
    start = Annealer(base, Schedule.linear(4), LearnedReverse(Hamiltonian(0.3, 0.8), drift))

    @jax.jit
    def train(drift, key):
        optimiser = optax.adam(3e-2)

        def loss(drift, keys):
            annealer = eqx.tree_at(lambda a: a.kernel.drift, start, drift)
            return -jnp.mean(jax.vmap(lambda key: davi(annealer, target, key))(keys))

        def step(carry, key):
            drift, state = carry
            updates, state = optimiser.update(jax.grad(loss)(drift, jax.random.split(key, 32)), state)
            return (optax.apply_updates(drift, updates), state), None

        return jax.lax.scan(step, (drift, optimiser.init(drift)), jax.random.split(key, 400))[0][0]

    trained = eqx.tree_at(lambda a: a.kernel.drift, start, train(drift, jax.random.key(2)))
    before, after = (
        float(jnp.mean(anneal(jax.random.key(3), a, target, 20_000).log_weights)) for a in (start, trained)
    )
    assert before < target.log_evidence - 0.5
    assert target.log_evidence - after < 0.5 * (target.log_evidence - before)


def test_what_it_refuses():
    # In the tests types are checked at run time, and that is first.
    with pytest.raises((InputError, TypeError), match=r"is of a move|AbstractMove"):
        LearnedReverse(Metropolis(Hamiltonian(0.1)), linear_drift(2, momentum=True))  # pyright: ignore[reportArgumentType]
    with pytest.raises((InputError, TypeError), match=r"corrects a move|AbstractMove"):
        Metropolis(LearnedReverse(Hamiltonian(0.1), linear_drift(2, momentum=True)))  # pyright: ignore[reportArgumentType]
    wrong = LearnedReverse(Langevin(0.1), lambda x, u, beta: jnp.zeros(3))
    with pytest.raises(InputError, match="must have the shape"):
        anneal(jax.random.key(0), annealer(wrong), targets.log_gamma_2d(), 2)
