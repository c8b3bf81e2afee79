"""The physics and the invariance of each kernel, on its own: no annealing here."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

import lehr
from lehr import Annealer, Hamiltonian, InputError, Langevin, Metropolis, RandomWalk, Schedule
from lehr.kernels import State
from lehr.path import Point, Problem
from lehr.tuning import adapt_step_size
from tests import targets
from tests.statistics import THRESHOLD, assert_mean, z_score
from tests.targets import MOMENTUM_SCALE

FLOWS = {f"{name}-{num_leapfrog}": (name, num_leapfrog) for name in ("move", "propose") for num_leapfrog in (1, 3)}


def tempered(beta=0.6):
    """A skewed and sheared density: a sign error cannot cancel."""
    return Problem(targets.base_2d(), targets.log_gamma_2d()).at(jnp.asarray(beta))


def flow(name, step_size, num_leapfrog, density):
    """A function (x, u) -> (x', u', log ratio), of either integrator, with a mass that is not one."""
    kernel = Hamiltonian(step_size, 0.0, MOMENTUM_SCALE, num_leapfrog)

    def run(x, u):
        point = Point(x) if name == "move" else density.evaluate(x, gradient=True)
        transition = getattr(kernel, name)(density, State(point, u), None)
        return transition.state.point.position, transition.state.momentum, transition.log_ratio

    return jax.jit(run)


X, U = np.array([0.4, -1.2]), np.array([-0.7, 1.1])


@pytest.mark.parametrize("name", FLOWS)
def test_leapfrog_is_reversible(x64, name):
    run = flow(FLOWS[name][0], 0.5, FLOWS[name][1], tempered())
    x, u, log_ratio = run(X, U)
    assert np.abs(x - X).min() > 0.05
    assert np.abs(u - U).min() > 0.05
    back, flipped, log_ratio_back = run(x, -u)
    np.testing.assert_allclose(back, X, atol=1e-12)
    np.testing.assert_allclose(flipped, -U, atol=1e-12)
    np.testing.assert_allclose(log_ratio_back, -log_ratio, atol=1e-12)
    np.testing.assert_allclose(log_ratio, (np.sum(U**2) - np.sum(u**2)) / 2, atol=1e-12)


@pytest.mark.parametrize("name", FLOWS)
def test_leapfrog_preserves_volume(x64, name):
    run = flow(FLOWS[name][0], 0.5, FLOWS[name][1], tempered())
    jacobian = jax.jacfwd(lambda z: jnp.concatenate(run(z[:2], z[2:])[:2]))(np.concatenate([X, U]))
    assert np.abs(jacobian - np.eye(4)).max() > 0.1
    np.testing.assert_allclose(np.linalg.det(jacobian), 1, atol=1e-12)


@pytest.mark.parametrize("name", ["move", "propose"])
def test_energy_error_is_of_second_order(x64, name):
    density = tempered()

    def energy(x, u):
        return -density.log_prob_at(density.evaluate(x, gradient=False)) + jnp.sum(u**2) / 2

    # The same time of 0.8 in 4, 8 and 16 leapfrogs.
    errors = []
    for num_leapfrog in (4, 8, 16):
        x, u, _ = flow(name, 0.8 / num_leapfrog, num_leapfrog, density)(X, U)
        errors.append(float(energy(x, u) - energy(jnp.asarray(X), jnp.asarray(U))))
    assert 1e-6 < abs(errors[0]) < 0.1
    for coarse, fine in itertools.pairwise(errors):
        assert 3.5 < coarse / fine < 4.5


@pytest.mark.parametrize("name", ["move", "propose"])
def test_only_the_quotient_of_step_and_momentum_scale_matters(x64, name):
    density = tempered()
    ends = []
    for factor in (1.0, 4.0):
        kernel = Hamiltonian(0.5 * factor, 0.0, MOMENTUM_SCALE * factor)
        point = Point(jnp.asarray(X)) if name == "move" else density.evaluate(jnp.asarray(X), gradient=True)
        ends.append(getattr(kernel, name)(density, State(point, jnp.asarray(U)), None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *ends)


def test_langevin_ratio_is_that_of_its_two_gaussians(x64):
    density, step_size, noise = tempered(), np.array([0.5, 0.9]), jnp.array([0.8, -0.3])
    start = density.evaluate(jnp.asarray(X), gradient=True)
    transition = Langevin(step_size).propose(density, State(start), noise)

    def log_transition(after, before):
        mean = before + step_size**2 / 2 * density.gradient(jnp.asarray(before))
        return jnp.sum(norm.logpdf(after, mean, step_size))

    x = transition.state.point.position
    np.testing.assert_allclose(x, X + step_size**2 / 2 * density.gradient(jnp.asarray(X)) + step_size * noise)
    np.testing.assert_allclose(transition.log_ratio, log_transition(X, x) - log_transition(x, X), rtol=1e-10)
    np.testing.assert_allclose(transition.state.point.grad_target, jax.grad(targets.log_gamma_2d())(x), rtol=1e-10)


def test_mala_is_hmc_with_one_leapfrog(x64):
    # A classical identity between two independently written kernels.
    density, noise = tempered(), jnp.asarray(U)
    point = density.evaluate(jnp.asarray(X), gradient=True)
    log_uniform = jnp.asarray(-1e-3)
    mala = Metropolis(Langevin(1.3)).move(density, State(point), (noise, log_uniform))
    hmc = Metropolis(Hamiltonian(1.3)).move(density, State(point, noise), (noise, log_uniform))
    assert 0.05 < mala.acceptance < 0.9
    np.testing.assert_allclose(mala.acceptance, hmc.acceptance, rtol=1e-10)
    np.testing.assert_allclose(mala.state.point.position, hmc.state.point.position, rtol=1e-10)


def test_random_walk_is_symmetric():
    density, noise = tempered(), jnp.array([0.3, -1.0])
    start = State(density.evaluate(jnp.asarray(X, jnp.float32), gradient=False))
    transition = RandomWalk(np.array([0.5, 2.0])).propose(density, start, noise)
    np.testing.assert_allclose(transition.state.point.position, X + np.array([0.15, -2.0]), rtol=1e-6)
    assert transition.log_ratio == 0
    assert transition.state.point.grad_target is None


@pytest.mark.parametrize("log_uniform", [-1e-3, -10.0], ids=["rejected", "accepted"])
def test_metropolis_reverses_the_momentum_of_a_rejected_move(x64, log_uniform):
    density = tempered()
    kernel = Metropolis(Hamiltonian(1.3, 0.5))
    start = State(density.evaluate(jnp.asarray(X), gradient=True), jnp.asarray(U))
    proposal = kernel.kernel.propose(density, start, None)
    transition = kernel.move(density, start, (None, jnp.asarray(log_uniform)))
    # Minus the energy error.
    gained = density.log_prob_at(proposal.state.point) - density.log_prob_at(start.point) + proposal.log_ratio
    assert -10 < gained < -1e-3
    np.testing.assert_allclose(transition.acceptance, np.exp(gained), rtol=1e-12)
    expected = proposal.state if log_uniform < gained else State(start.point, -start.momentum)
    jax.tree.map(np.testing.assert_array_equal, transition.state, expected)


def test_persistence_keeps_the_momentum_standard_normal(x64):
    kernel = Hamiltonian(0.1, 0.95)
    state = State(Point(jnp.zeros(2)), jnp.array([1.0, 2.0]))
    refreshed = kernel.refresh(state, jnp.array([-3.0, 0.5])).momentum
    np.testing.assert_allclose(refreshed, 0.95 * np.array([1, 2]) + np.sqrt(1 - 0.95**2) * np.array([-3, 0.5]))
    # sqrt(1 - g^2) computed as written would be 0.08 % off here, in float32.
    close_to_one = jax.tree.map(lambda a: a.astype(jnp.float32), Hamiltonian(0.1, 1 - 1e-5))
    spread = close_to_one.refresh(State(Point(jnp.zeros(2)), jnp.zeros(2)), jnp.ones(2)).momentum
    np.testing.assert_allclose(spread, np.sqrt(1 - (1 - 1e-5) ** 2), rtol=1e-5)


class NoAcceptStep(Metropolis):
    def move(self, density, state, noise):
        return super().move(density, state, (noise[0], jnp.asarray(-jnp.inf)))


INVARIANT = {
    "hmc": lambda make: make(Hamiltonian(1.3 * MOMENTUM_SCALE, 0.0, MOMENTUM_SCALE)),
    "hais": lambda make: make(Hamiltonian(1.3, 0.8, num_leapfrog=2)),
    "mala": lambda make: make(Langevin(1.3)),
    "random walk": lambda make: make(RandomWalk(1.2)),
}


def change_of_moments(key, kernel, num_particles=100_000, num_steps=3):
    """h(x_n) - h(x_0) for particles that start at exact samples, h of first to third order: zero in the mean.

    In pairs, particle by particle: that removes most of the variance.
    """
    target = targets.mixture_2d()
    density = Problem(targets.base_2d(), target).at(jnp.ones(()))
    key_samples, key_chains = jax.random.split(key)

    def moments(x):
        return jnp.stack([x[0], x[1], x[0] ** 2, x[1] ** 2, x[0] * x[1], x[0] ** 3, x[0] * x[1] ** 2])

    def chain(key, x):
        key_init, key_noise = jax.random.split(key)

        def step(state, noise):
            transition = kernel.move(density, state, noise)
            return kernel.refresh(transition.state, noise), transition.acceptance

        noise = kernel.noise(key_noise, num_steps, jax.ShapeDtypeStruct((2,), jnp.float32))
        state, acceptance = jax.lax.scan(step, kernel.init(key_init, density, x), noise)
        return moments(state.point.position) - moments(x), acceptance.mean()

    keys = jax.random.split(key_chains, num_particles)
    return jax.jit(jax.vmap(chain))(keys, target.sample(key_samples, (num_particles,)))


@pytest.mark.parametrize("name", INVARIANT)
def test_metropolis_leaves_the_target_invariant(key, name):
    changes, acceptance = change_of_moments(key, INVARIANT[name](Metropolis))
    assert 0.3 < acceptance.mean() < 0.9
    for change in np.asarray(changes).T:
        assert_mean(change, 0)


def test_without_the_accept_step_the_target_is_not_invariant(key):
    # The power of the test above.
    changes, _ = change_of_moments(key, INVARIANT["hmc"](NoAcceptStep))
    assert max(abs(z_score(change, 0)) for change in np.asarray(changes).T) > THRESHOLD


# What can be wrong with the parameters, and what is said about it.

POSITIVE = {
    "Hamiltonian step_size": lambda value: Hamiltonian(value),
    "Hamiltonian momentum_scale": lambda value: Hamiltonian(0.1, 0.0, value),
    "Langevin step_size": lambda value: Langevin(value),
    "RandomWalk step_size": lambda value: RandomWalk(value),
}


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [-0.1, 0.0, np.nan, np.inf, np.array([0.1, -0.1])], ids=str)
def test_scales_must_be_positive_and_finite(name, value):
    with pytest.raises(InputError, match=f"{name.split()[1]} must be positive and finite, but it is"):
        POSITIVE[name](value)


@pytest.mark.parametrize("name", POSITIVE)
def test_a_traced_scale_is_checked_when_it_runs(name):
    make = eqx.filter_jit(lambda value: POSITIVE[name](value))
    np.testing.assert_allclose(jax.tree.leaves(make(jnp.asarray(1.0)))[0], POSITIVE[name](1.0).log_step_size)
    for value in (-0.1, 0.0, np.nan):
        with pytest.raises(eqx.EquinoxRuntimeError, match=f"{name.split()[1]} must be positive"):
            jax.block_until_ready(make(jnp.asarray(value)))


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, np.nan, np.array([[0.5], [1.0]])], ids=str)
def test_persistence_must_be_in_its_range(value):
    with pytest.raises(InputError, match=r"persistence must be in \[0, 1\), but it is"):
        Hamiltonian(0.1, value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, np.nan])
def test_a_traced_persistence_is_checked_when_it_runs(value):
    make = eqx.filter_jit(lambda value: Hamiltonian(0.1, value).persistence)
    with pytest.raises(eqx.EquinoxRuntimeError, match="persistence"):
        jax.block_until_ready(make(jnp.asarray(value)))


def test_persistence_is_zero_everywhere_or_nowhere():
    assert Hamiltonian(0.1, 0.0).logit_persistence is None
    assert Hamiltonian(0.1, np.zeros((3, 1))).logit_persistence is None
    with pytest.raises(InputError, match="zero at every step or positive at every step"):
        Hamiltonian(0.1, np.array([[0.0], [0.5]]))


@pytest.mark.parametrize("num_leapfrog", [0, -2])
def test_there_is_at_least_one_leapfrog(num_leapfrog):
    with pytest.raises(InputError, match=f"a whole number of at least 1, but it is {num_leapfrog}"):
        Hamiltonian(0.1, num_leapfrog=num_leapfrog)


def test_metropolis_corrects_moves_only():
    with pytest.raises((InputError, TypeError), match=r"Metropolis|kernel"):
        Metropolis(Metropolis(RandomWalk(0.1)))


def test_parameters_are_returned_as_they_were_given():
    step_size, persistence = np.full((3, 1), 0.2), np.array([[0.1], [0.5], [0.99]])
    kernel = Hamiltonian(step_size, persistence, MOMENTUM_SCALE)
    np.testing.assert_allclose(kernel.step_size, step_size, rtol=1e-6)
    np.testing.assert_allclose(kernel.persistence, persistence, rtol=1e-6)
    np.testing.assert_allclose(kernel.momentum_scale, MOMENTUM_SCALE, rtol=1e-6)
    assert Hamiltonian(0.1).persistence == 0


@pytest.mark.parametrize("wrap", [lambda kernel: kernel, Metropolis], ids=["move", "metropolis"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Hamiltonian(np.ones(3)),
        lambda: Hamiltonian(np.ones((4, 1))),
        lambda: Hamiltonian(np.ones((3, 4))),
        lambda: Hamiltonian(np.ones((3, 2, 1))),
        lambda: Hamiltonian(0.1, np.full(3, 0.5)),
        lambda: Hamiltonian(0.1, 0.5, np.ones((2, 3))),
        lambda: Langevin(np.ones(3)),
        lambda: RandomWalk(np.ones(3)),
    ],
)
def test_a_parameter_of_wrong_shape_is_told_the_right_one(wrap, make):
    # One per step as a plain vector is the likely mistake: the message has to show (K, 1).
    annealer = Annealer(targets.base_2d(), Schedule.linear(3), wrap(make()))
    with pytest.raises(InputError, match=r"3 steps in 2 dimensions: .*\(3, 1\) for one per step, or \(3, 2\)"):
        lehr.anneal(jax.random.key(0), annealer, targets.mixture_2d(), 4)


# Tuning.


def test_step_sizes_move_by_what_was_accepted():
    kernel = Metropolis(RandomWalk(np.full((3, 1), 0.5)))
    adapted = adapt_step_size(kernel, jnp.array([0.9, 0.6, 0.1]), target=0.6, rate=0.5)
    expected = 0.5 * np.exp(0.5 * np.array([[0.3], [0.0], [-0.5]]))
    np.testing.assert_allclose(adapted.kernel.step_size, expected, rtol=1e-6)


def test_adaptation_reaches_its_target(key):
    target = targets.conjugate_2d()
    # The first steps much too large, the last much too small.
    kernel = Metropolis(Hamiltonian(np.array([[5.0], [1.0], [0.1]])))
    for i, key_run in enumerate(jax.random.split(key, 60)):
        annealer = Annealer(targets.base_2d(), Schedule.linear(3), kernel)
        acceptance = lehr.anneal(key_run, annealer, target, 500).acceptance
        if i == 0:
            assert acceptance[0] < 0.3
            assert acceptance[2] > 0.95
        kernel = adapt_step_size(kernel, acceptance, target=0.65, rate=1 / (1 + i / 20))
    np.testing.assert_allclose(acceptance, 0.65, atol=0.06)
