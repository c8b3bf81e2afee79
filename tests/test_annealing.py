"""The annealing loop: unbiased weights both ways, its limits, its dtypes, and what it says of wrong input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import Annealer, Hamiltonian, InputError, Langevin, Metropolis, RandomWalk, Schedule
from lehr.path import Problem
from tests import targets
from tests.statistics import (
    THRESHOLD,
    assert_mean,
    assert_unbiased_weights,
    two_sample_z_score,
)
from tests.targets import MOMENTUM_SCALE

# Large steps at three coarse temperatures: a mistake of a few per cent must show.
KERNELS = {
    "dais": lambda: Hamiltonian(0.6),
    "dais with persistence and mass": lambda: Hamiltonian(0.6 * MOMENTUM_SCALE, 0.7, MOMENTUM_SCALE),
    "dais with three leapfrogs": lambda: Hamiltonian(0.4 * MOMENTUM_SCALE, 0.5, MOMENTUM_SCALE, num_leapfrog=3),
    "langevin": lambda: Langevin(0.6),
    "random walk": lambda: RandomWalk(0.3),
    "hmc with mass": lambda: Metropolis(Hamiltonian(1.2 * MOMENTUM_SCALE, 0.0, MOMENTUM_SCALE)),
    "hmc with three leapfrogs": lambda: Metropolis(Hamiltonian(1.1, num_leapfrog=3)),
    "hais with three leapfrogs": lambda: Metropolis(
        Hamiltonian(1.1 * MOMENTUM_SCALE, 0.7, MOMENTUM_SCALE, num_leapfrog=3)
    ),
    "mala": lambda: Metropolis(Langevin(1.2)),
    "random-walk metropolis": lambda: Metropolis(RandomWalk(1.0)),
}


def assert_crooks(forward, reverse, log_z):
    """E_forward[(w/Z)^(1/2)] = E_reverse[(w_reverse Z)^(1/2)], with bounded variance for any kernel.

    Crooks' identity E_forward[w h(w)] = Z E_reverse[h(1/w_reverse)], at h(w) = (Z w)^(-1/2): it holds only if the
    reverse chain undoes the forward one in distribution, which unbiasedness alone does not ask.
    """
    z = crooks_z_score(forward, reverse, log_z)
    assert abs(z) < THRESHOLD, f"the two chains are {z:.1f} standard errors from being each other's reverse"


def crooks_z_score(forward, reverse, log_z):
    def to_root(log_weights, log_z):
        return np.exp((np.asarray(log_weights, np.float64) - log_z) / 2)

    return two_sample_z_score(to_root(forward.log_weights, log_z), to_root(reverse.log_weights, -log_z))


@pytest.mark.parametrize("name", KERNELS)
def test_weights_are_unbiased_both_ways(key, name):
    setting, kernel = targets.coarse_setting(), KERNELS[name]()
    log_z = float(setting.target.log_evidence)
    key_forward, key_reverse = jax.random.split(key)
    forward, reverse = setting.forward(key_forward, kernel), setting.reverse(key_reverse, kernel)
    assert_unbiased_weights(forward.log_weights, log_z)
    assert_unbiased_weights(reverse.log_weights, -log_z)
    assert_crooks(forward, reverse, log_z)
    if kernel.exact:
        for acceptance in (forward.acceptance, reverse.acceptance):
            assert acceptance.shape == (3,)
            assert np.all((acceptance > 0.3) & (acceptance < 0.95))
    else:
        assert forward.acceptance is None


def test_hais_is_unbiased_when_rejections_are_common(key):
    # Ten strongly persistent steps, half of them rejected: the setting that shows a momentum that is not reversed.
    setting = targets.coarse_setting()
    result = setting.forward(key, Metropolis(Hamiltonian(1.4, 0.95)), betas=np.linspace(0, 1, 11))
    assert_unbiased_weights(result.log_weights, float(setting.target.log_evidence))
    assert result.acceptance.mean() < 0.7


def test_reverse_chain_takes_the_persistence_of_the_right_step(key):
    setting, betas = targets.coarse_setting(), (0.0, 0.5, 1.0)
    log_z = float(setting.target.log_evidence)
    persistence = np.array([[0.01], [0.99]])

    def make(persistence):
        return Hamiltonian(1.1 * MOMENTUM_SCALE, persistence, MOMENTUM_SCALE)

    key_forward, key_reverse = jax.random.split(key)
    forward = setting.forward(key_forward, make(persistence), betas)
    assert_crooks(forward, setting.reverse(key_reverse, make(persistence), betas), log_z)
    # Power: a reverse step that moved before it refreshed would take the persistence of the next step. Its weights
    # would still be unbiased; only Crooks' identity sees it.
    wrong = setting.reverse(key_reverse, make(persistence[::-1]), betas)
    assert_unbiased_weights(wrong.log_weights, -log_z)
    assert abs(crooks_z_score(forward, wrong, log_z)) > THRESHOLD


def test_exact_kernels_sample_the_target_with_their_weights(key):
    setting = targets.coarse_setting()
    result = setting.forward(key, Metropolis(RandomWalk(1.0)))
    truth = setting.target.sample(jax.random.key(1), (setting.num_particles,))
    w = np.exp(result.log_weights - setting.target.log_evidence)
    for moment in (lambda x: x[:, 0], lambda x: x[:, 0] * x[:, 1], lambda x: x[:, 1] ** 3):
        # E[w h(x_K)] = Z E_target[h]
        z = two_sample_z_score(w * moment(result.positions), moment(truth))
        assert abs(z) < THRESHOLD


@pytest.mark.parametrize("exact", [True, False], ids=["metropolis", "uncorrected"])
def test_many_steps_in_chunks(key, exact):
    # 211 is prime: two chunks of a hundred and eleven steps that are left. One step size per step: their order counts.
    setting = targets.Setting(targets.base_2d(), targets.mixture_2d(), num_particles=4_000)
    log_z, num_steps = float(setting.target.log_evidence), 211
    step_size = np.linspace(0.2, 1.5, num_steps)[:, None] if exact else 0.3
    kernel = Metropolis(RandomWalk(step_size)) if exact else Hamiltonian(step_size, 0.8)
    key_forward, key_reverse = jax.random.split(key)
    betas = np.linspace(0, 1, num_steps + 1)
    forward = setting.forward(key_forward, kernel, betas)
    reverse = setting.reverse(key_reverse, kernel, betas)
    assert_unbiased_weights(forward.log_weights, log_z)
    assert_unbiased_weights(reverse.log_weights, -log_z)
    assert_crooks(forward, reverse, log_z)
    if exact:
        assert forward.acceptance.shape == reverse.acceptance.shape == (num_steps,)
        # In the order of the schedule both ways: small steps first.
        assert min(forward.acceptance[0], reverse.acceptance[0]) > 0.8
        assert max(forward.acceptance[-1], reverse.acceptance[-1]) < 0.6
        np.testing.assert_allclose(forward.acceptance, reverse.acceptance, atol=0.06)


@pytest.mark.parametrize("num_steps", [3, 100, 211, 240])
def test_steps_have_independent_noise(key, num_steps):
    # The variance of a random walk is the sum of those of its steps, only if no chunk repeats another's noise.
    base = targets.Gaussian(jnp.array([1.0, -1.0]), 1e-3 * jnp.eye(2))
    annealer = Annealer(base, Schedule.linear(num_steps), RandomWalk(np.array([0.1, 2.0])))
    moved = lehr.anneal(key, annealer, base.log_prob, 4_000).positions - base.loc
    standardised = np.asarray(moved / (np.array([0.1, 2.0]) * np.sqrt(num_steps)))
    for i in range(2):
        assert_mean(standardised[:, i], 0)
        assert_mean(standardised[:, i] ** 2, 1)
    assert_mean(standardised[:, 0] * standardised[:, 1], 0)


def test_conjugate_gaussian_is_bracketed_and_more_temperatures_shrink_the_gap(key):
    target = targets.conjugate_2d()
    log_z = float(target.log_evidence)
    key_samples, key_forward, key_reverse = jax.random.split(key, 3)
    samples = target.sample(key_samples, (5_000,))

    def make(num_steps):
        return Annealer(target.prior, Schedule.linear(num_steps), Hamiltonian(0.3, 0.8))

    coarse = lehr.anneal(key_forward, make(4), target, 5_000)
    forward = lehr.anneal(key_forward, make(64), target, 5_000)
    reverse = lehr.anneal_reverse(key_reverse, make(64), target, samples)
    for result, truth in ((coarse, log_z), (forward, log_z), (reverse, -log_z)):
        assert abs(result.log_evidence - truth) < THRESHOLD * result.standard_error
    assert coarse.elbo < forward.elbo < log_z < -reverse.elbo
    assert log_z - forward.elbo < (log_z - coarse.elbo) / 4
    assert -reverse.elbo - log_z < (log_z - coarse.elbo) / 4


def test_one_dimension(key):
    base = targets.Gaussian(jnp.array([0.2]), jnp.array([[1.2]]))
    annealer = Annealer(base, Schedule.geometric(4, first=0.1), Metropolis(Hamiltonian(1.0, 0.5)))
    result = lehr.anneal(key, annealer, targets.mixture_1d(), 20_000)
    assert_unbiased_weights(result.log_weights, targets.quadrature(targets.mixture_1d(), -12, 14))


def test_a_flowjax_base_and_a_skewed_target(key):
    distributions = pytest.importorskip("flowjax.distributions")
    # Its tails are as heavy as the target's, where a Gaussian's would give weights without a variance.
    base = distributions.Logistic(jnp.array([0.2, 0.3]), jnp.array([1.0, 0.7]))
    annealer = Annealer(base, Schedule.linear(4), Metropolis(Langevin(0.8)))
    target = targets.log_gamma_2d()
    result = lehr.anneal(key, annealer, target, 50_000)
    assert_unbiased_weights(result.log_weights, float(target.log_evidence))


def test_particles_outside_the_support_have_weight_zero(key):
    base = targets.base_2d()

    # Twice the base where x_0 > 0, nothing elsewhere.
    def target(x):
        return jnp.where(x[0] > 0, base.log_prob(x) + jnp.log(2.0), -jnp.inf)

    annealer = Annealer(base, Schedule.linear(3), Metropolis(RandomWalk(1.0)))
    result = lehr.anneal(key, annealer, target, 20_000)
    w = np.exp(result.log_weights)
    assert 0.2 < np.mean(w == 0) < 0.6
    # P(x_0 > 0) for N(0.3, 1)
    assert_mean(w, 2 * 0.6179114)
    assert np.all(result.acceptance < 1)


def test_a_proposal_of_density_nan_is_rejected(key):
    base = targets.base_2d()

    def target(x):
        # NaN outside a disk
        return base.log_prob(x) + 0 * jnp.sqrt(4 - jnp.sum(x**2))

    samples = base.sample(key, (5_000,))
    samples = samples[jnp.sum(samples**2, axis=1) < 4]
    annealer = Annealer(base, Schedule.linear(3), Metropolis(Hamiltonian(1.0, 0.5)))
    result = lehr.anneal_reverse(key, annealer, target, samples)
    np.testing.assert_allclose(result.log_weights, 0, atol=1e-5)
    assert np.all(np.sum(result.positions**2, axis=1) <= 4)
    assert np.all(result.acceptance < 0.95)


# Limits.


@pytest.mark.parametrize(
    ("num_steps", "make"),
    [
        # Steps so large that all are rejected.
        (1, lambda: Metropolis(RandomWalk(1e5))),
        (5, lambda: Metropolis(RandomWalk(1e5))),
        (2, lambda: Hamiltonian(1e-12, 0.5)),
    ],
    ids=["one rejected step", "five rejected steps", "no step size"],
)
def test_without_motion_it_is_importance_sampling(key, num_steps, make):
    base, target = targets.base_2d(), targets.mixture_2d()
    annealer = Annealer(base, Schedule.linear(num_steps), make())
    result = lehr.anneal(key, annealer, target, 500)
    assert result.acceptance is None or np.all(result.acceptance == 0)
    log_ratio = jax.vmap(lambda x: target(x) - base.log_prob(x))(result.positions)
    np.testing.assert_allclose(result.log_weights, log_ratio, atol=1e-5)
    np.testing.assert_allclose(result.log_evidence, jax.nn.logsumexp(log_ratio) - np.log(500), rtol=1e-5)
    if num_steps == 1:
        # One exact step is weighed before it is taken: its weights are the same if it does move.
        moving = lehr.anneal(key, Annealer(base, annealer.schedule, Metropolis(Hamiltonian(1.0))), target, 500)
        assert moving.acceptance[0] > 0.5
        assert np.abs(moving.positions - result.positions).max() > 1
        np.testing.assert_allclose(moving.log_weights, result.log_weights, atol=1e-5)


def test_compiled_equals_eager_and_vmapped_equals_a_loop(key):
    annealer = Annealer(targets.base_2d(), Schedule.linear(2), Metropolis(RandomWalk(1.0)))

    def run(key):
        return lehr.anneal(key, annealer, lambda x: -jnp.sum((x - 1) ** 2), 3)

    def assert_close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    keys = jax.random.split(key, 2)
    loop = [run(key) for key in keys]
    assert not np.allclose(loop[0].log_weights, loop[1].log_weights)
    vmapped = jax.jit(jax.vmap(run))(keys)
    jax.tree.map(lambda both, *each: assert_close(both, np.stack(each)), vmapped, *loop)
    with jax.disable_jit():
        jax.tree.map(assert_close, run(keys[0]), loop[0])


class Traced(eqx.Module):
    """A target that counts how often Python runs it."""

    loc: jax.Array
    count: list = eqx.field(static=True)

    def __call__(self, x):
        self.count[0] += 1
        return -jnp.sum((x - self.loc) ** 2)


class Counter(list):
    # Static fields are compared and hashed.
    __hash__ = object.__hash__


def test_new_parameters_do_not_compile_again(key):
    count = Counter([0])
    results, counts = [], []
    for i in range(3):
        base = targets.Gaussian(jnp.array([0.1 * i, 0.0]), jnp.eye(2) * (1 + i))
        schedule = Schedule.geometric(3, first=0.1 + 0.1 * i)
        annealer = Annealer(base, schedule, Hamiltonian(0.1 * (i + 1), 0.5 + 0.1 * i))
        results.append(lehr.anneal(key, annealer, Traced(jnp.array([1.0, i]), count), 3).log_weights)
        counts.append(count[0])
    assert counts[0] > 0
    assert counts == counts[:1] * 3
    assert not np.allclose(results[0], results[1])


def test_a_parameter_may_be_given_per_step_and_per_dimension(key):
    def run(**shapes):
        value = {"step_size": 0.6, "persistence": 0.7, "momentum_scale": 1.5}
        kernel = Hamiltonian(**{name: np.full(shapes.get(name, ()), value[name]) for name in value})
        annealer = Annealer(targets.base_2d(), Schedule.linear(3), kernel)
        return lehr.anneal(key, annealer, lambda x: -jnp.sum((x - 1) ** 2), 8)

    expected = run()
    for shapes in (
        {"step_size": (2,)},
        {"step_size": (3, 1), "persistence": (3, 1)},
        {"step_size": (3, 2), "momentum_scale": (2,)},
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run(**shapes), expected)


def test_each_step_and_dimension_takes_its_own_parameter(key):
    base, target = targets.base_2d(), targets.mixture_2d()

    def run(step_size):
        return lehr.anneal(key, Annealer(base, Schedule.linear(3), Metropolis(RandomWalk(step_size))), target, 500)

    expected, by_step = run(np.full((3, 1), 0.6)), run(np.array([[0.6], [0.6], [0.1]]))
    np.testing.assert_allclose(by_step.acceptance[:2], expected.acceptance[:2], rtol=1e-5)
    assert by_step.acceptance[2] > expected.acceptance[2] + 0.1
    start = run(np.full((3, 1), 1e-6)).positions
    moved = np.abs(run(np.array([1e-6, 0.6])).positions - start).max(axis=0)
    assert moved[0] < 1e-4
    assert moved[1] > 0.5


# Floats.


@pytest.mark.parametrize("name", KERNELS)
def test_float32_stays_float32_under_x64(key, name):
    base = targets.base_2d()
    with jax.enable_x64(True):
        kernel, target = KERNELS[name](), targets.mixture_2d()
        assert {leaf.dtype for leaf in jax.tree.leaves((kernel, target))} == {jnp.dtype("float64")}
        annealer = Annealer(base, Schedule.linear(3), kernel)

        def run(annealer):
            forward = lehr.anneal(key, annealer, target, 4)
            reverse = lehr.anneal_reverse(key, annealer, target, jnp.zeros((4, 2)))
            return forward, reverse, forward.log_evidence, forward.standard_error, forward.weights

        # Shapes and dtypes are known without compiling.
        def dtypes(annealer):
            return {leaf.dtype for leaf in jax.tree.leaves(eqx.filter_eval_shape(run, annealer))}

        assert dtypes(annealer) == {jnp.dtype("float32")}
        # And float64 is float64, from the base on.
        assert dtypes(Annealer(targets.base_2d(), Schedule.linear(3), kernel)) == {jnp.dtype("float64")}


class Offset(eqx.Module):
    """A log density of the size that a data set of a hundred thousand points gives."""

    target: eqx.Module
    offset: float = -1e5

    def __call__(self, x):
        return 3 * self.target(x) + self.offset


def fixed_noise_metropolis(noise, log_uniform):
    """A random-walk Metropolis kernel whose noise is known outside of the chain: in every chunk the same."""

    class FixedNoise(Metropolis):
        def noise(self, key, num_steps, position):
            return jnp.asarray(noise[:num_steps]), jnp.asarray(log_uniform[:num_steps])

    return FixedNoise(RandomWalk(0.7))


def test_float32_log_weights_are_accurate_where_densities_are_huge(key):
    num_steps, num_particles, rng = 1000, 16, np.random.default_rng(0)
    noise = rng.normal(size=(100, 2)).astype(np.float32)
    log_uniform = -rng.exponential(size=100).astype(np.float32)
    kernel, schedule = fixed_noise_metropolis(noise, log_uniform), Schedule.linear(num_steps)
    base, target = targets.base_2d(), Offset(targets.mixture_2d())
    result = lehr.anneal(key, Annealer(base, schedule, kernel), target, num_particles)
    assert 0.1 < result.acceptance.mean() < 0.9

    # The same trajectories, by the kernel's contract, from the same starts: where particles stay that reject a move.
    still = Annealer(base, Schedule.linear(1), Metropolis(RandomWalk(1e5)))
    starts = lehr.anneal(key, still, target, num_particles).positions
    problem, betas = Problem(base, target), schedule.betas

    @jax.jit
    @jax.vmap
    def trajectory(start):
        def step(state, inputs):
            beta, *noise = inputs
            density = problem.at(beta)
            transition = kernel.move(density, state, noise)
            after, before = transition.state.point, state.point
            naive = density.log_prob_at(before) - density.log_prob_at(after)
            return transition.state, (before.position, naive)

        inputs = betas[1:], jnp.tile(noise, (10, 1)), jnp.tile(log_uniform, 10)
        state, (positions, naive) = jax.lax.scan(step, kernel.init(key, problem.at(betas[0]), start), inputs)
        naive = jnp.sum(naive) + state.point.log_target - problem.log_base(start)
        return positions, state.point.position, naive

    positions, end, naive = trajectory(starts)
    # Up to the last bit, in which two compiled programs may differ.
    np.testing.assert_allclose(end, result.positions, atol=1e-5)

    with jax.enable_x64(True):

        def wide(tree):
            return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), tree)

        base64, target64 = wide(base), wide(target)
        log_ratio = jax.vmap(jax.vmap(lambda x: target64(x) - base64.log_prob(x)))(wide(positions))
        exact = np.asarray(log_ratio @ jnp.diff(wide(betas)))
    assert np.all(np.abs(exact) > 9e4)
    # Half the spacing of floats at 1e5 is 0.004.
    assert np.abs(np.float64(result.log_weights) - exact).max() < 0.008
    # The same sum from the ends of each step loses more, and would drown the differences between particles.
    assert np.sqrt(np.mean((np.float64(naive) - exact) ** 2)) > 0.04


# Gradients that must not be taken, and input that must not be given.


@pytest.mark.parametrize("name", ["hmc with mass", "hais with three leapfrogs", "mala", "random-walk metropolis"])
@pytest.mark.parametrize("part", ["base", "schedule", "kernel", "target"])
def test_the_gradient_through_metropolis_raises(key, name, part):
    parts = {
        "base": targets.base_2d(),
        "schedule": Schedule.linear(3),
        "kernel": KERNELS[name](),
        "target": targets.mixture_2d(),
    }

    def log_evidence(trained):
        p = parts | {part: trained}
        return lehr.anneal(key, Annealer(p["base"], p["schedule"], p["kernel"]), p["target"], 2).log_evidence

    sentence = "not the gradient of the expectation: apply .*stop_gradient.* or use the uncorrected kernel"
    with pytest.raises(TypeError, match=sentence):
        eqx.filter_grad(log_evidence)(parts[part])


def test_stopped_gradients_pass_metropolis(key):
    # What the message of that error suggests works.
    def log_evidence(base):
        annealer = Annealer(jax.lax.stop_gradient(base), Schedule.linear(3), Metropolis(RandomWalk(1.0)))
        return lehr.anneal(key, annealer, targets.mixture_2d(), 2).log_evidence

    for leaf in jax.tree.leaves(jax.grad(log_evidence)(targets.base_2d())):
        np.testing.assert_array_equal(leaf, 0)


def an_annealer():
    return Annealer(targets.base_2d(), Schedule.linear(3), RandomWalk(0.5))


@pytest.mark.parametrize("num_particles", [0, -1])
def test_there_is_at_least_one_particle(key, num_particles):
    with pytest.raises(InputError, match=f"num_particles must be at least 1, but it is {num_particles}"):
        lehr.anneal(key, an_annealer(), targets.mixture_2d(), num_particles)


@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (0, 2)], ids=str)
def test_samples_have_the_dimension_of_the_base(key, shape):
    with pytest.raises(InputError, match=r"samples must have shape \(num_particles, 2\), but they have"):
        lehr.anneal_reverse(key, an_annealer(), targets.mixture_2d(), jnp.zeros(shape))


def test_a_target_of_wrong_shape_is_refused(key):
    with pytest.raises(InputError, match=r"log_target\(x\) must be one float for a position x of shape \(2,\)"):
        lehr.anneal(key, an_annealer(), lambda x: -(x**2), 3)
    with pytest.raises(InputError, match=r"log_target\(x\) must be one float"):
        lehr.anneal_reverse(key, an_annealer(), lambda x: -(x**2), jnp.zeros((3, 2)))


def test_an_annealer_is_made_of_its_parts():
    base = targets.base_2d()
    # With the runtime type checks of the tests on, these may complain first.
    with pytest.raises((InputError, TypeError), match=r"lehr.Schedule|schedule"):
        Annealer(base, jnp.linspace(0, 1, 4), RandomWalk(0.5))
    with pytest.raises((InputError, TypeError), match=r"lehr kernel|kernel"):
        Annealer(base, Schedule.linear(3), lambda x: x)
