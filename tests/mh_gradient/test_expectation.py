"""The gradient of an expectation against exact derivatives of finite chains, of stationary laws, and of itself."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import mh_gradient as mh
from lehr.mh_gradient import births, sampler
from tests.mh_gradient.truths import derivative, on_a_line, on_states

THRESHOLD = 4.0
KEY = jax.random.key(0)


def log_normal(theta, x):
    return -jnp.sum((x - theta) ** 2) / 2


def first(x):
    return x[0]


def gaussian(coupling=None, f=first, **options):
    """The specification's chain: N(theta, 1), a random walk of 2.38 from 0."""
    settings = {"num_steps": 10, "num_chains": 10_000, "has_aux": True} | options
    coupling = mh.MaximalReflection() if coupling is None else coupling
    return lehr.mh_expectation(log_normal, f, mh.RandomWalk(2.38), coupling, jnp.zeros(1), **settings)


def exact(num_steps, burn_in):
    def mean(theta):
        return on_a_line(lambda x: -((x - theta) ** 2) / 2, lambda x: x, 2.38, num_steps, burn_in, 0.0)

    return derivative(mean, 0.5)


def z_of(expectation, params, truth, key=KEY):
    (_, aux), gradient = jax.value_and_grad(expectation, has_aux=True)(params, key)
    return float((gradient - truth) / aux.gradient_error)


@pytest.mark.parametrize(("num_steps", "burn_in", "truth"), [(1, 0, 0.3867), (10, 0, 0.8435), (200, 50, 1.0000)])
def test_finite_chain(num_steps, burn_in, truth):
    assert exact(num_steps, burn_in) == pytest.approx(truth, abs=5e-4)
    expectation = gaussian(num_steps=num_steps, burn_in=burn_in, num_chains=200_000 // (num_steps + 10))
    (_, aux), gradient = jax.value_and_grad(expectation, has_aux=True)(0.5, KEY)
    assert abs(gradient - truth) < THRESHOLD * aux.gradient_error
    assert aux.gradient_error < 0.02
    if num_steps == 200:  # the specification's: 0.117
        variance = float(aux.gradient_error) ** 2 * (200_000 // 210)
        assert variance < 0.15


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "right"},
        {"weights": "left"},
        {"weights": "single-sided"},
        {"strength": "acceptance"},
        {"strength": "gradient"},
        {"strength": "uniform"},
        {"num_alternatives": 3},
        {"coupling": mh.CommonRandomNumbers()},
        {"coupling": mh.Independent()},
        {"coupling": mh.FullKernelMaximal()},
        {"coupling": mh.GCRefl()},
    ],
    ids=str,
)
def test_every_scheme_is_unbiased(options):
    # Short, because weights of long chains have tails so heavy that their error is not to be trusted.
    assert abs(z_of(gaussian(**options, num_steps=5), 0.5, exact(5, 0))) < THRESHOLD


def test_planted_bugs_are_seen(monkeypatch):
    """A lost sign, and births of both one-sided schemes at once; another strength is none."""
    coefficient, strength = births.flip_coefficient, sampler.strength_of

    def lost_sign(weights, taken, *rest):
        return jnp.where(taken, -1, 1) * coefficient(weights, taken, *rest)

    def both_sides(weights, *rest):
        return coefficient("right", *rest) + coefficient("left", *rest)

    def one_kept_too_often(*arguments):
        return jnp.minimum(strength(*arguments), 0.1)

    # Numbers of chains are compiled in: with another number each, nothing is taken from the cache.
    monkeypatch.setattr(sampler, "flip_coefficient", lost_sign)
    assert abs(z_of(gaussian(num_chains=10_001), 0.5, 0.8435)) > 5
    monkeypatch.setattr(sampler, "flip_coefficient", both_sides)
    assert abs(z_of(gaussian(num_chains=10_002), 0.5, 0.8435)) > 5
    monkeypatch.setattr(sampler, "flip_coefficient", coefficient)
    # Not a bug: by any strength they may be kept.
    monkeypatch.setattr(sampler, "strength_of", one_kept_too_often)
    assert abs(z_of(gaussian(num_chains=10_003), 0.5, 0.8435)) < THRESHOLD


def test_location_and_scale():
    def log_density(p, x):
        return -jnp.sum(((x - p["loc"]) * jnp.exp(-p["log_scale"])) ** 2) / 2 - p["log_scale"]

    expectation = lehr.mh_expectation(
        log_density,
        lambda x: {"first": x[0], "second": x**2},
        mh.RandomWalk(2.38),
        mh.MaximalReflection(),
        jnp.zeros(1),
        num_steps=200,
        burn_in=50,
        num_chains=2000,
        has_aux=True,
    )
    params = {"loc": 0.7, "log_scale": 0.2}
    jacobian, aux = jax.jacrev(expectation, has_aux=True)(params, KEY)
    truth = {"first": (1.0, 0.0), "second": (1.4, 2 * np.exp(0.4))}
    for name, values in truth.items():
        for parameter, value in zip(("loc", "log_scale"), values):
            gradient, error = (np.ravel(tree[name][parameter])[0] for tree in (jacobian, aux.gradient_error))
            assert abs(gradient - value) < THRESHOLD * error, (name, parameter)
    assert jacobian["second"]["loc"].shape == (1,)


def test_f_with_parameters_of_its_own():
    expectation = gaussian(f=lambda theta, x: theta**2 * x[0])
    (_, aux), gradient = jax.value_and_grad(expectation, has_aux=True)(0.5, KEY)

    def mean(theta):
        return theta**2 * on_a_line(lambda x: -((x - theta) ** 2) / 2, lambda x: x, 2.38, 10, 0, 0.0)

    assert abs(gradient - derivative(mean, 0.5)) < THRESHOLD * aux.gradient_error


@pytest.mark.parametrize("route", ["pathwise", "weak", "score"])
def test_scale_of_the_proposal(route):
    """The lag-one product of N(0, 1), which is its autocorrelation: -0.1338 at a scale of 1.5."""
    expectation = lehr.mh_expectation(
        lambda params, x: -jnp.sum(x**2) / 2,
        lambda x, x_next: x[0] * x_next[0],
        mh.RandomWalk,
        mh.MaximalReflection(),
        jnp.zeros(1),
        num_steps=300,
        burn_in=30,
        num_chains=2000,
        consecutive=True,
        proposal_gradient=route,
        has_aux=True,
    )
    assert abs(z_of(expectation, 1.5, -0.1338)) < THRESHOLD


@pytest.mark.parametrize(
    ("proposal", "route"),
    [(mh.MALA(1.2), "pathwise"), (mh.MALA(1.2), "score"), (mh.PCN(0.7, 2.0), "pathwise")],
    ids=str,
)
def test_other_gaussian_proposals(proposal, route):
    expectation = lehr.mh_expectation(
        log_normal,
        lambda x: x[0] ** 2,
        proposal,
        mh.MaximalReflection(),
        jnp.zeros(1),
        num_steps=60,
        burn_in=20,
        num_chains=3000,
        proposal_gradient=route,
        has_aux=True,
    )
    assert abs(z_of(expectation, 0.5, 1.0)) < THRESHOLD


def test_mala_in_a_finite_chain_counts_its_drift():
    """x0 far from the target: the path depends on theta from the first step. Truth by common random numbers."""
    options = {"num_steps": 3, "num_chains": 40_000}

    def expectation(**more):
        return lehr.mh_expectation(
            log_normal, first, mh.MALA(1.5), mh.MaximalReflection(), jnp.full(1, 2.0), **options, **more
        )

    keys = jax.random.split(jax.random.key(1), 8)
    alone = jax.vmap(expectation(), in_axes=(None, 0))
    h = 0.05
    differences = np.asarray((alone(0.5 + h, keys) - alone(0.5 - h, keys)) / (2 * h))
    for route in ("pathwise", "score"):
        found = np.asarray(jax.vmap(jax.grad(expectation(proposal_gradient=route)), in_axes=(None, 0))(0.5, keys))
        error = np.hypot(found.std(ddof=1), differences.std(ddof=1)) / len(keys) ** 0.5
        assert abs(found.mean() - differences.mean()) < 5 * error
        assert error < 0.02


def test_a_start_that_moves_with_the_target():
    """Everything shifts with theta, so that each chain does: the gradient is 1 without noise."""
    expectation = lehr.mh_expectation(
        log_normal,
        first,
        mh.RandomWalk(2.0),
        mh.MaximalReflection(),
        lambda theta: theta + jnp.ones(1),
        num_steps=5,
        num_chains=10,
        has_aux=True,
    )
    (_, aux), gradient = jax.value_and_grad(expectation, has_aux=True)(0.3, KEY)
    assert gradient == pytest.approx(1.0, abs=1e-5)
    assert aux.gradient_error < 1e-5


def contamination(t, x):
    distance = jnp.abs(x[0])
    return (1 - t) * (distance < 1) + t * ((distance > 3) & (distance < 5))


def test_support_that_appears():
    """(1 - t) 1{|x| < 1} + t 1{3 < |x| < 5}: d E[x^2] / dt = 32 at t = 1e-6, which the covariance does not see."""
    ratio = mh.DensityRatio(lambda t, x_new, x: contamination(t, x_new) / contamination(t, x))
    options = {"num_steps": 200, "burn_in": 50, "num_chains": 1500}
    expectation = lehr.mh_expectation(
        ratio, lambda x: x[0] ** 2, mh.RandomWalk(3.0), mh.MaximalReflection(), jnp.zeros(1), has_aux=True, **options
    )
    for t in (1e-6, 0.0):
        assert abs(z_of(expectation, t, 32.0)) < THRESHOLD
    covariance = mh.covariance_expectation(
        lambda t, x: jnp.log(contamination(t, x)), lambda x: x[0] ** 2, mh.RandomWalk(3.0), jnp.zeros(1), **options
    )
    # At 1e-6 every third run, say, is where it counts for a step or two, and says more than a hundred.
    assert abs(jax.grad(covariance)(1e-9, KEY)) < 0.1


@pytest.mark.parametrize("weights", ["measure-valued", "right", "single-sided"])
def test_a_ratio_does_what_the_log_density_does(weights):
    ratio = mh.DensityRatio(lambda theta, x_new, x: jnp.exp(log_normal(theta, x_new) - log_normal(theta, x)))
    settings = {"num_steps": 10, "num_chains": 500, "weights": weights, "strength": "gradient"}
    found, truth = (
        jax.grad(lehr.mh_expectation(of, first, mh.RandomWalk(2.38), mh.MaximalReflection(), jnp.zeros(1), **settings))(
            0.5, KEY
        )
        for of in (ratio, log_normal)
    )
    assert found == pytest.approx(float(truth), rel=1e-3)


def test_a_ratio_keeps_flips_by_what_they_weigh():
    """Those of acceptances too: in the unit of the way back they are alpha^2 as large, and few would be kept."""
    ratio = mh.DensityRatio(lambda theta, x_new, x: jnp.exp(log_normal(theta, x_new) - log_normal(theta, x)))
    expectation = lehr.mh_expectation(
        ratio,
        first,
        mh.RandomWalk(2.38),
        mh.MaximalReflection(),
        jnp.zeros(1),
        num_steps=10,
        num_chains=40_000,
        has_aux=True,
    )
    assert abs(z_of(expectation, 0.5, 0.8435)) < THRESHOLD
    (_, aux), _ = jax.value_and_grad(expectation, has_aux=True)(0.5, KEY)
    assert aux.gradient_error**2 * 40_000 < 2.4  # 1.8 to 2.1; in the wrong unit 2.9 to 5.4


def test_a_wide_f_is_not_kept_for_every_step():
    expectation = lehr.mh_expectation(
        log_normal,
        lambda x: x[0] * jnp.arange(1000.0),
        mh.RandomWalk(2.38),
        mh.MaximalReflection(),
        jnp.zeros(1),
        num_steps=20_000,
    )
    memory = jax.jit(expectation).lower(0.5, KEY).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not say")
    assert memory.temp_size_in_bytes < 5e6  # all of f would be 80 MB


def test_an_f_with_options_of_its_own_is_one_of_x():
    values = [gaussian(f=f, num_chains=4)(0.5, KEY)[0] for f in (lambda x: jnp.sum(x), jnp.sum)]
    assert values[0] == values[1]


def test_an_f_in_half_precision():
    full, half = (gaussian(f=lambda x, dtype=dtype: x[0].astype(dtype)) for dtype in (jnp.float32, jnp.float16))
    (_, expected), truth = jax.value_and_grad(full, has_aux=True)(0.5, KEY)
    (value, _), found = jax.value_and_grad(half, has_aux=True)(0.5, KEY)
    assert value.dtype == jnp.float16
    assert abs(found - truth) < 0.5 * expected.gradient_error


def test_a_long_sum_in_half_precision():
    """A sum of ones in it would end at 2,048."""
    options = {"num_steps": 5000, "num_chains": 1, "has_aux": False}
    ones = gaussian(f=lambda x: jnp.ones((), jnp.float16) + 0 * x[0].astype(jnp.float16), **options)
    assert ones(0.5, KEY) == 1
    assert jax.value_and_grad(ones)(0.5, KEY)[0] == 1


@pytest.mark.parametrize("has_aux", [False, True])
def test_a_gradient_is_as_wide_as_its_parameter(has_aux, x64):
    params = {"narrow": jnp.asarray(0.2, jnp.float32), "half": jnp.asarray(0.1, jnp.float16), "wide": jnp.asarray(0.2)}
    expectation = lehr.mh_expectation(
        lambda params, x: log_normal(sum(params.values()), x),
        first,
        mh.RandomWalk(2.38),
        mh.MaximalReflection(),
        jnp.zeros(1),
        num_steps=10,
        num_chains=10,
        has_aux=has_aux,
    )
    found = jax.grad(expectation, has_aux=has_aux)(params, KEY)
    found = found[0] if has_aux else found
    assert {name: leaf.dtype for name, leaf in found.items()} == {name: leaf.dtype for name, leaf in params.items()}
    assert float(found["wide"]) == pytest.approx(float(found["narrow"]), rel=1e-5)
    assert float(found["wide"]) == pytest.approx(float(found["half"]), rel=1e-2)


def test_a_start_narrower_than_other_floats(x64):
    expectation = lehr.mh_expectation(
        log_normal,
        first,
        mh.RandomWalk(2.38),
        mh.MaximalReflection(),
        jnp.zeros(1, jnp.float32),
        num_steps=10,
        num_chains=4,
    )
    assert jax.grad(expectation)(0.5, KEY).dtype == jnp.float64


@pytest.mark.parametrize("num_alternatives", [1, 2])
def test_diagnostics_of_one_step(num_alternatives):
    """From 0 to x': an alternative has kappa = alpha and W = alpha x', and the gradient is W (f(Y) - f(X)) = +-W x'."""
    expectation = gaussian(num_steps=1, num_chains=1, num_alternatives=num_alternatives)
    one = jax.jit(jax.value_and_grad(expectation, has_aux=True))
    for key in jax.random.split(KEY, 30):
        (x, aux), gradient = one(0.5, key)
        assert aux.acceptance == (x != 0)
        assert aux.num_births == (gradient != 0)
        assert aux.alive_fraction == pytest.approx((gradient != 0) / num_alternatives)
        assert aux.num_meetings == 0
        assert np.isnan(aux.meeting_times).all()
        if x != 0:
            alpha = np.exp(min(0.0, -((x - 0.5) ** 2 - 0.25) / 2))
            assert aux.largest_kappa == pytest.approx(alpha if alpha < 1 else 0, rel=1e-4)
            assert aux.largest_weight == pytest.approx(abs(float(gradient / x)), rel=1e-4)


def test_weights_have_no_size_where_positions_move():
    expectation = lehr.mh_expectation(
        log_normal, first, mh.MALA(1.0), mh.MaximalReflection(), jnp.zeros(1), num_steps=5, num_chains=4, has_aux=True
    )
    (_, aux), _ = jax.value_and_grad(expectation, has_aux=True)(0.5, KEY)
    assert np.isnan(aux.largest_weight)
    assert aux.largest_kappa > 0


def test_three_states():
    """A mixture of three components, its posterior over them at one observation: exact by powers of the kernel."""
    means = np.array([-2.5, 2.0, 5.0])

    def log_p(observation):
        return -(((observation - means) / 4) ** 2) / 2

    expectation = lehr.mh_expectation(
        lambda observation, x: -(((observation - jnp.asarray(means, jnp.float32)[x[0]]) / 4) ** 2) / 2,
        lambda x: jax.nn.one_hot(x[0], 3),
        mh.DiscreteUniform(3),
        mh.MaximalIndependent(),
        jnp.ones(1, jnp.int32),
        num_steps=12,
        burn_in=2,
        num_chains=10_000,
        has_aux=True,
    )
    proposal = (1 - np.eye(3)) / 2
    truth = derivative(lambda o: on_states(log_p(o), proposal, np.eye(3), 12, 2, 1), 4.0)
    gradient, aux = jax.jacrev(expectation, has_aux=True)(4.0, KEY)
    assert np.all(np.abs(gradient - truth) < THRESHOLD * aux.gradient_error)
    assert np.all(np.asarray(aux.gradient_error) < 0.1 * np.abs(truth).max())


SPINS = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))


def test_three_spins():
    """Turned one at a time, with a field and couplings of their own: a gradient of six parameters, exact by powers."""

    def log_p(params, x):
        return jnp.dot(params["field"], x) + params["bonds"] @ jnp.array([x[0] * x[1], x[1] * x[2], x[0] * x[2]])

    expectation = lehr.mh_expectation(
        log_p,
        lambda x: x[0] * x[1] + x[2],
        mh.SpinFlip(),
        mh.MonotoneSpin(),
        jnp.ones(3),
        num_steps=9,
        burn_in=1,
        num_chains=20_000,
        has_aux=True,
    )
    params = {"field": jnp.array([0.3, -0.2, 0.1]), "bonds": jnp.array([0.5, 0.2, -0.4])}
    neighbours = (np.abs(SPINS[:, None] - SPINS).sum(axis=2) == 2) / 3
    values = SPINS[:, 0] * SPINS[:, 1] + SPINS[:, 2]

    def mean(flat):
        s = SPINS
        logs = s @ flat[:3] + np.stack([s[:, 0] * s[:, 1], s[:, 1] * s[:, 2], s[:, 0] * s[:, 2]], axis=1) @ flat[3:]
        return on_states(logs, neighbours, values, 9, 1, len(s) - 1)

    flat = np.concatenate([params["field"], params["bonds"]]).astype(float)
    truth = np.array([derivative(lambda h, i=i: mean(flat + h * np.eye(6)[i]), 0.0) for i in range(6)])
    (_, aux), gradient = jax.value_and_grad(expectation, has_aux=True)(params, KEY)
    found, error = (np.concatenate([tree["field"], tree["bonds"]]) for tree in (gradient, aux.gradient_error))
    assert np.all(np.abs(found - truth) < THRESHOLD * error)
    assert error.max() < 0.05


SIDE = 4


def energy(x):
    spins = x.reshape(SIDE, SIDE)
    return -jnp.sum(spins * jnp.roll(spins, 1, 0) + spins * jnp.roll(spins, 1, 1))


@pytest.mark.parametrize(("beta", "de", "dc"), [(0.3, -78.40, 75.69), (0.44, -64.85, -31.97)])
def test_ising_by_enumeration(beta, de, dc):
    """4 x 4, by heat bath: the derivative of the energy, and of the specific heat, of two expectations."""
    states = ((np.arange(2**16)[:, None] >> np.arange(16)) & 1) * 2.0 - 1
    spins = states.reshape(-1, SIDE, SIDE)
    energies = -np.sum(spins * np.roll(spins, 1, 1) + spins * np.roll(spins, 1, 2), axis=(1, 2))

    def moments(beta):
        weights = np.exp(-beta * (energies + 32))
        return np.array([weights @ energies, weights @ energies**2]) / weights.sum()

    def heat(beta):
        first, second = moments(beta)
        return beta**2 * (second - first**2)

    assert derivative(lambda b: moments(b)[0], beta) == pytest.approx(de, abs=0.02)
    assert derivative(heat, beta) == pytest.approx(dc, abs=0.02)
    expectation = lehr.mh_expectation(
        lambda beta, x: -beta * energy(x),
        lambda x: (energy(x), energy(x) ** 2),
        mh.HeatBath.checkerboard(SIDE, SIDE),
        mh.MonotoneSpin(),
        jnp.ones(SIDE**2),
        num_steps=400,
        burn_in=100,
        num_chains=60,
    )

    def specific_heat(beta, key):
        first, second = expectation(beta, key)
        return beta**2 * (second - first**2)

    keys = jax.random.split(KEY, 24)
    for of, truth in ((lambda b, k: expectation(b, k)[0], de), (specific_heat, dc)):
        found = np.asarray(jax.lax.map(lambda k, of=of: jax.grad(of)(beta, k), keys))
        assert abs(found.mean() - truth) < THRESHOLD * found.std(ddof=1) / len(keys) ** 0.5


def test_many_parameters_in_one_pass(x64):
    """The gradient along any direction is the gradient in one parameter that moves along it, number for number."""
    key_net, key_direction, key = jax.random.split(KEY, 3)
    network = eqx.nn.MLP(2, "scalar", 16, 2, jax.nn.tanh, key=key_net, dtype=jnp.float64)
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def expectation(log_density):
        proposal, coupling = mh.RandomWalk(1.5), mh.MaximalReflection()
        f = lambda x: x[0] + x[1] ** 2  # noqa: E731
        return lehr.mh_expectation(
            log_density, f, proposal, coupling, jnp.zeros(2), num_steps=50, burn_in=5, num_chains=8
        )

    def log_density(params, x):
        return eqx.combine(params, static)(x) - jnp.sum(x**2) / 2

    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key_direction, len(leaves))
    direction = tree.unflatten([jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)])

    def moved(t, x):
        return log_density(jax.tree.map(lambda p, d: p + t * d, params, direction), x)

    value, gradient = jax.value_and_grad(expectation(log_density))(params, key)
    same, along = jax.value_and_grad(expectation(moved))(jnp.asarray(0.0), key)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    assert value == same
    assert float(sum(jax.tree.leaves(products))) == pytest.approx(float(along), rel=1e-10)
    assert abs(along) > 0.1


def test_value_is_that_of_the_chain_alone_and_transformations_change_nothing():
    traces = []

    def log_density(theta, x):
        traces.append(None)
        return log_normal(theta, x)

    expectation = lehr.mh_expectation(
        log_density, first, mh.RandomWalk(2.38), mh.MaximalReflection(), jnp.zeros(1), num_steps=30, num_chains=4
    )
    alone = expectation(0.5, KEY)
    value, gradient = jax.value_and_grad(expectation)(0.5, KEY)
    assert value == alone
    compiled = jax.jit(jax.value_and_grad(expectation))
    np.testing.assert_allclose(compiled(0.5, KEY), (value, gradient), rtol=1e-5)
    before = len(traces)
    compiled(0.7, jax.random.key(5))
    jax.value_and_grad(expectation)(0.6, KEY)
    # Nothing is compiled again; a call from outside looks at the shapes once.
    assert len(traces) - before <= 1
    keys = jax.random.split(KEY, 3)
    batched = jax.vmap(jax.grad(expectation), in_axes=(None, 0))(0.5, keys)
    np.testing.assert_allclose(batched, [jax.grad(expectation)(0.5, k) for k in keys], rtol=1e-4)


def test_stated_errors_are_those_of_repetitions():
    expectation = gaussian(num_steps=40, num_chains=50)
    keys = jax.random.split(KEY, 300)
    one = jax.jit(jax.value_and_grad(expectation, has_aux=True))
    (values, aux), gradients = jax.lax.map(lambda key: one(0.5, key), keys)
    for found, stated in ((values, aux.value_error), (gradients, aux.gradient_error)):
        # 300 repetitions know a standard deviation to 4 per cent.
        assert np.mean(np.square(stated)) ** 0.5 == pytest.approx(float(np.std(np.asarray(found))), rel=0.2)
    assert np.all(aux.acceptance > 0.3)
    assert np.all(np.diff(np.asarray(aux.meeting_times), axis=1) >= 0)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("outer", [jax.grad, jax.jacfwd])
def test_gradient_of_a_gradient_raises(outer, has_aux):
    expectation = gaussian(has_aux=has_aux, num_chains=4)
    once = jax.grad(lambda theta: jax.tree.leaves(expectation(theta, KEY))[0])
    with pytest.raises(lehr.InputError, match="cannot be differentiated again"):
        outer(once)(0.5)


@pytest.mark.parametrize("has_aux", [False, True])
def test_a_gradient_is_linear_in_what_comes_after(has_aux):
    """d/db of the gradient of (E - b)^2 is -2 dE."""
    expectation = gaussian(has_aux=has_aux, num_chains=4)

    def mean(theta):
        return jax.tree.leaves(expectation(theta, KEY))[0]

    def gradient(b):
        return jax.grad(lambda theta: (mean(theta) - b) ** 2)(0.5)

    assert jax.jacfwd(gradient)(1.0) == pytest.approx(-2 * float(jax.grad(mean)(0.5)), rel=1e-5)


def test_trained_by_fit():
    """The mean of N(theta, 1) is brought to 2 by gradients of (E[x] - 2)^2."""
    expectation = gaussian(has_aux=False, num_steps=40, burn_in=10, num_chains=16)

    import optax

    def objective(theta, key):
        return -((expectation(theta, key) - 2) ** 2)

    trained = lehr.fit(KEY, objective, jnp.asarray(0.0), optax.adam(0.05), 150, progress=False)
    assert float(trained.params) == pytest.approx(2.0, abs=0.15)
