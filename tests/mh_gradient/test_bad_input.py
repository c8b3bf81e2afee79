"""What a user can get wrong with lehr.mh_expectation, and what is said about it."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import lehr
from lehr import InputError
from lehr.mh_gradient import (
    MALA,
    CommonRandomNumbers,
    DensityRatio,
    DiscreteUniform,
    FullKernelMaximal,
    HeatBath,
    MaximalIndependent,
    MaximalReflection,
    MonotoneSpin,
    RandomWalk,
    SpinFlip,
)

KEY = jax.random.key(0)


def log_density(params, x):
    return -jnp.sum((x - params) ** 2) / 2


def first(x):
    return x[0]


def expectation(**options):
    """One that works, but for what is given."""
    given = {
        "log_density": log_density,
        "f": first,
        "proposal": RandomWalk(1.5),
        "coupling": MaximalReflection(),
        "x0": jnp.zeros(1),
        "num_steps": 30,
        "num_chains": 4,
    } | options
    return lehr.mh_expectation(**given)


@pytest.fixture
def unchecked():
    """As a user has it: without the tests' checks of types, which would come first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_nothing_is_wrong_with_what_the_others_change(recwarn):
    value, gradient = jax.value_and_grad(expectation())(0.5, KEY)
    assert np.isfinite(value)
    assert gradient != 0
    assert not [w for w in recwarn if "alternative" in str(w.message)]


# Numbers out of range, and names that are not known: when it is made.

NUMBERS = {
    "burn_in the same": ({"burn_in": 30}, "burn_in must be below num_steps = 30, but it is 30: nothing would be left"),
    "burn_in more": ({"burn_in": 31}, "burn_in must be below num_steps = 30, but it is 31"),
    "burn_in negative": ({"burn_in": -1}, "burn_in must be a whole number of at least 0, but it is '-1'"),
    "no steps": ({"num_steps": 0}, "num_steps must be a whole number of at least 1, but it is '0'"),
    "steps in part": ({"num_steps": 10.5}, "num_steps must be a whole number of at least 1, but it is '10.5'"),
    "no chains": ({"num_chains": 0}, "num_chains must be a whole number of at least 1, but it is '0'"),
    "no alternatives": ({"num_alternatives": 0}, "num_alternatives must be a whole number of at least 1"),
    "weights": ({"weights": "both"}, "weights must be one of measure-valued, right, left, single-sided, but it is 'b"),
    "strength": ({"strength": "much"}, "strength must be one of distance, acceptance, gradient, uniform, but it is 'm"),
    "proposal_gradient": (
        {"proposal_gradient": "strong"},
        "proposal_gradient must be one of pathwise, score, weak, but",
    ),
    "coupling": ({"coupling": None}, "coupling must be one of lehr.mh_gradient, but it is a NoneType"),
    "a coupling's class": ({"coupling": MaximalReflection}, "coupling must be one of lehr.mh_gradient, but it is a"),
    "misfit": ({"coupling": MonotoneSpin()}, "MonotoneSpin is for SpinFlip and HeatBath, not for RandomWalk"),
    "no proposal": (
        {"proposal": 0.5},
        r"a proposal must have sample\(key, x\) and log_prob\(x, x_new\), but float has",
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_and_names(unchecked, name):
    options, message = NUMBERS[name]
    with pytest.raises(InputError, match=message):
        expectation(**options)


# What does not fit together: when it is called, before anything is compiled.


def starting_at(params):
    return jnp.stack([params])


RATIO = DensityRatio(lambda params, x_new, x: jnp.exp(log_density(params, x_new) - log_density(params, x)))
CALLS = {
    "f counts": ({"f": lambda x: jnp.sum(x > 0)}, 0.5, "f must give floats, but it gives others: multiply by 1.0"),
    "f says yes or no": ({"f": lambda x: x[0] > 0}, 0.5, "f must give floats"),
    "f counts in part": ({"f": lambda x: (x[0], jnp.sum(x > 0))}, 0.5, "f must give floats"),
    "f is constant": ({"f": lambda x: 1}, 0.5, "f must give floats"),
    "whole parameters": ({}, 1, "parameters must be floats, but params is of type int32: make it a float"),
    "yes or no": ({}, True, "parameters must be floats, but params is of type bool"),
    "complex parameters": ({}, jnp.array(0.5 + 1j), "parameters must be floats, but params is of type complex64"),
    "a complex number": ({}, 0.5j, "parameters must be floats, but params is of type complex64"),
    "numpy's whole numbers": ({}, np.array([1]), "parameters must be floats, but params is of type int64"),
    "one of several": ({}, {"a": 0.5, "b": jnp.arange(2)}, r"parameters must be floats, but \['b'\] is of type int32"),
    "a vector of densities": ({"log_density": lambda p, x: x - p}, 0.5, "must give one float: sum over what it gives"),
    "a row of one": ({"log_density": lambda p, x: jnp.sum(x - p, keepdims=True)}, 0.5, "must give one float: sum over"),
    "a whole density": ({"log_density": lambda p, x: jnp.sum(x > p)}, 0.5, "must give one float: sum over"),
    "no density": ({"log_density": lambda p, x: None}, 0.5, "must give one float: sum over"),
    "x0 a number": ({"x0": jnp.zeros(())}, 0.5, r"x0 must be a position \(dim,\), or 4 of them, but its shape is \(\)"),
    "x0 of three chains": ({"x0": jnp.zeros((3, 1))}, 0.5, r"x0 must be .*, or 4 of them, but its shape is \(3, 1\)"),
    "x0 of three axes": ({"x0": jnp.zeros((4, 1, 1))}, 0.5, r"x0 must be .*, but its shape is \(4, 1, 1\)"),
    "x0 of no dimension": ({"x0": jnp.zeros(0)}, 0.5, r"x0 must be .*, but its shape is \(0,\)"),
    "x0 made a number": ({"x0": lambda params: params}, 0.5, r"x0 must be .*, but its shape is \(\)"),
    "x0 of integers": (
        {"x0": jnp.zeros(1, jnp.int32)},
        0.5,
        "RandomWalk moves float positions, but x0 is of type int32",
    ),
    "x0 by score": (
        {"x0": starting_at, "proposal_gradient": "score"},
        0.5,
        'an x0 that depends on the parameters needs proposal_gradient="pathwise"',
    ),
    "x0 by weak derivative": (
        {"x0": starting_at, "proposal_gradient": "weak"},
        0.5,
        'needs proposal_gradient="pathwise',
    ),
    "weak with MALA": (
        {"proposal": MALA(1.0), "proposal_gradient": "weak"},
        0.5,
        r'proposal_gradient="weak" is for RandomWalk with a scale of one number or \(dim,\)',
    ),
    "weak with a matrix": (
        {"proposal": lambda params: RandomWalk(params * jnp.eye(1)), "proposal_gradient": "weak"},
        0.5,
        r"for RandomWalk with a scale of one number or \(dim,\)",
    ),
    "a scale from params": (
        {"proposal": lambda params: RandomWalk(params)},
        -0.5,
        "must be a positive number, one for",
    ),
    "a misfit from params": (
        {"proposal": lambda params: MALA(params), "coupling": MonotoneSpin()},
        0.5,
        "MonotoneSpin is for SpinFlip and HeatBath, not for MALA",
    ),
    "nothing from params": ({"proposal": lambda params: params}, jnp.asarray(0.5), r"a proposal must have sample\(key"),
    "two signs": (
        {"weights": "single-sided"},
        jnp.array([0.5, 0.1]),
        "single-sided.* goes by the sign of one derivative, but there are 2 parameters",
    ),
    "two signs in a tree": (
        {"weights": "single-sided", "log_density": lambda p, x: -jnp.exp(p["b"]) * jnp.sum((x - p["a"]) ** 2)},
        {"a": 0.5, "b": 0.1},
        "but there are 2 parameters",
    ),
    "one sign of a path": ({"proposal": MALA(1.0), "weights": "single-sided"}, 0.5, "gradient of each decision alone"),
    "gradients of a path": ({"x0": starting_at, "strength": "gradient"}, 0.5, "the gradient of each decision alone"),
    "a ratio with a drift": (
        {"log_density": RATIO, "proposal": MALA(1.0)},
        0.5,
        "a DensityRatio is for proposals without parameters and drift",
    ),
    "a ratio of acceptances": ({"log_density": RATIO, "weights": "left"}, 0.5, "flips acceptances alone"),
    "a ratio with a path": ({"log_density": RATIO, "x0": starting_at}, 0.5, "a DensityRatio is for proposals without"),
    "a path of states": (
        {
            "proposal": lambda params: DiscreteUniform(3),
            "coupling": MaximalIndependent(),
            "x0": jnp.zeros(1, jnp.int32),
            "f": lambda x: x[0] * 1.0,
        },
        0.5,
        'DiscreteUniform is no differentiable function of its parameters: give proposal_gradient="score"',
    ),
    "spins of zero": (
        {"proposal": SpinFlip(), "coupling": MonotoneSpin()},
        0.5,
        r"spins are \+1 or -1, but x0 has other",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit(name):
    options, params, message = CALLS[name]
    function = expectation(**options)
    with pytest.raises(InputError, match=message):
        function(params, KEY)


@pytest.mark.parametrize("name", ["f counts", "x0 a number", "weak with MALA", "a vector of densities", "x0 by score"])
def test_gradients_find_the_same(name):
    options, params, message = CALLS[name]
    with pytest.raises(InputError, match=message):
        jax.grad(expectation(**options))(params, KEY)


# Faults of the log density: while it runs.


def failing(function, message, params=0.5):
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(function(params, KEY))


STARTS = {
    "-inf": lambda params, x: jnp.where(x[0] > 1, log_density(params, x), -jnp.inf),
    "nan": lambda params, x: log_density(params, x) + jnp.log(x[0] - 1),
    "inf": lambda params, x: log_density(params, x) - jnp.log(jnp.abs(x[0])),
}


@pytest.mark.parametrize("name", STARTS)
def test_log_densities_at_the_start(name):
    failing(
        expectation(log_density=STARTS[name]), "the log density is not finite at x0 or not a number: start elsewhere"
    )


def test_gradients_find_the_start_too():
    failing(jax.grad(expectation(log_density=STARTS["-inf"])), "the log density is not finite at x0")


def test_one_chain_that_starts_elsewhere():
    x0 = jnp.array([[2.0], [2.0], [0.5], [2.0]])
    failing(expectation(log_density=STARTS["-inf"], x0=x0), "the log density is not finite at x0")


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_log_densities_later(value):
    def broken(params, x):
        return jnp.where(x[0] > 1, value, log_density(params, x))

    function = expectation(log_density=broken)
    failing(function, "the log density is NaN or infinite where the chain went: mend it, or give -inf")


@pytest.mark.parametrize("gradient", [False, True])
def test_lattices_later(gradient):
    """Of which nothing is evaluated but the derivative in the spins."""

    def broken(params, x):
        return params * jnp.sum(x * jnp.roll(x, 1)) * jnp.where(jnp.all(x > 0), 1.0, jnp.nan)

    function = lehr.mh_expectation(
        broken, lambda x: x[0], HeatBath.checkerboard(4), MonotoneSpin(), jnp.ones(4), num_steps=30, num_chains=4
    )
    # Compiled: what has values is looked at before it runs.
    failing(jax.jit(jax.grad(function) if gradient else function), "NaN or infinite where the chain went")


def test_a_lattice_that_is_looked_at_while_it_is_compiled():
    """All but the key has values: what is wrong is said, and what is right runs."""
    half = jnp.asarray(0.5)

    def compiled(log_density):
        mean = lehr.mh_expectation(
            log_density, lambda x: x[0], HeatBath.checkerboard(4), MonotoneSpin(), jnp.ones(4), num_steps=30
        )
        return jax.jit(lambda key: mean(half, key))

    assert -1 <= compiled(lambda params, x: params * jnp.sum(x * jnp.roll(x, 1)))(KEY) <= 1
    with pytest.raises(InputError, match="not linear in spin"):
        compiled(lambda params, x: params * jnp.sum(x**3 + x**2))(KEY)


def test_a_density_may_end():
    # As the message says: this is what to give.
    mean = expectation(log_density=lambda p, x: jnp.where(x[0] > 1, -jnp.inf, log_density(p, x)))(0.5, KEY)
    assert -3 < mean < 1


def test_ratios_that_are_no_number():
    # Of a density that is negative somewhere.
    ratio = DensityRatio(lambda params, x_new, x: jnp.where(x_new[0] > 1, -1.0, 1.0) * RATIO.ratio(params, x_new, x))
    failing(expectation(log_density=ratio), "NaN or infinite where the chain went")


def test_nothing_is_accepted():
    # Steps a million times too large, 120 of them; a hundred are enough to tell.
    failing(expectation(proposal=RandomWalk(1e6)), "no proposal was accepted: give a smaller scale, or start where")
    few = expectation(proposal=RandomWalk(1e6), num_steps=24)
    assert few(0.5, KEY) == 0


NOT_FINITE = "the gradient in the parameters is not finite where the chain went"


def test_gradients_that_are_not_finite():
    def kinked(params, x):
        return (1 + jnp.sqrt(params**2)) * log_density(0.3, x)

    failing(jax.grad(expectation(log_density=kinked)), NOT_FINITE, 0.0)
    assert np.isfinite(jax.grad(expectation(log_density=kinked))(0.1, KEY))


def test_gradients_along_paths_that_are_not_finite():
    def kinked(params, x):
        return (1 + jnp.sqrt(params**2)) * log_density(0.3, x)

    failing(jax.grad(expectation(log_density=kinked, proposal=MALA(1.0))), NOT_FINITE, 0.0)


# Supports that move with the parameters.


def contaminated(params, x):
    """log of (1 - t) 1{|x| < 1} + t 1{3 < |x| < 5}: at t = 0 the outer part has no mass, but a derivative."""
    inside, outside = jnp.abs(x[0]) < 1, (jnp.abs(x[0]) > 3) & (jnp.abs(x[0]) < 5)
    return jnp.log(jnp.where(inside, 1 - params, jnp.where(outside, params, 0.0)))


def scaled(params, x):
    """Uniform on |x| < t."""
    return jnp.where(jnp.abs(x[0]) < params, -jnp.log(params), -jnp.inf)


MESSAGE = "the support of the log density depends on the parameters.*give a lehr.mh_gradient.DensityRatio"
MOVING = {"a new part": (contaminated, 0.0, RandomWalk(4.0)), "a boundary": (scaled, 1.0, RandomWalk(0.6))}


@pytest.mark.parametrize("name", MOVING)
def test_supports_that_move(name):
    density, params, proposal = MOVING[name]
    function = expectation(log_density=density, proposal=proposal, num_steps=60)
    failing(jax.grad(function), MESSAGE, params)
    # The value is that of one set of parameters.
    assert np.isfinite(function(params, KEY))


@pytest.mark.parametrize("dimension", [1, 12])
def test_a_boundary_that_is_seldom_tried(dimension):
    """Of 25,600 proposals a few fall outside."""
    chains = {"proposal": RandomWalk(0.02), "x0": jnp.zeros(dimension), "num_steps": 400, "num_chains": 64}
    failing(jax.grad(expectation(log_density=scaled, **chains)), MESSAGE, 1.0)


# Compiled code drops what nothing depends on: of a gradient alone the value is not computed.
COMPILED = {
    "start": ({"log_density": STARTS["-inf"]}, "the log density is not finite at x0", 0.5),
    "later": (
        {"log_density": lambda params, x: jnp.where(x[0] > 1, jnp.nan, log_density(params, x))},
        "NaN or infinite where the chain went",
        0.5,
    ),
    "nothing accepted": ({"proposal": RandomWalk(1e6)}, "no proposal was accepted", 0.5),
    "support": ({"log_density": scaled, "proposal": RandomWalk(0.6), "num_steps": 60}, MESSAGE, 1.0),
    "start, of parameters of f alone": (
        {"log_density": lambda params, x: jnp.sum(jnp.outer(x, jnp.ones(300))) - jnp.inf, "f": lambda p, x: p * x[0]},
        "the log density is not finite at x0",
        0.5,
    ),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("transform", [jax.grad, lambda function: jax.vmap(jax.grad(function), (None, 0))])
def test_compiled_gradients_find_the_same(name, transform):
    options, message, params = COMPILED[name]
    keys = KEY if transform is jax.grad else KEY[None]
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(jax.jit(transform(expectation(**options)))(params, keys))


def test_compiled_diagnostics_find_the_same():
    options, message, params = COMPILED["later"]
    function = expectation(**options, has_aux=True)
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(jax.jit(lambda params: function(params, KEY)[1].acceptance)(params))


@pytest.mark.filterwarnings("ignore:.*the alternative has not met")  # with four chains
def test_a_ratio_is_for_supports_that_move():
    def ratio(params, x_new, x):
        inside, outside = jnp.abs(x_new[0]) < 1, (jnp.abs(x_new[0]) > 3) & (jnp.abs(x_new[0]) < 5)
        mass = jnp.where(inside, 1 - params, jnp.where(outside, params, 0.0))
        return mass / jnp.where(jnp.abs(x[0]) < 1, 1 - params, params)

    function = expectation(
        log_density=DensityRatio(ratio), proposal=RandomWalk(4.0), f=lambda x: x[0] ** 2, num_steps=60
    )
    assert jax.grad(function)(0.0, KEY) > 1


def test_a_support_that_stays():
    def half(params, x):
        return jnp.where(x[0] > -0.5, log_density(params, x), -jnp.inf)

    assert np.isfinite(jax.grad(expectation(log_density=half, num_steps=60))(0.5, KEY))


# Alternatives that do not meet.


def test_alternatives_that_do_not_meet():
    function = expectation(coupling=CommonRandomNumbers(), num_steps=200)
    message = "of the chains the alternative has not met the chain for half of its 200 steps.*MaximalReflection"

    with pytest.warns(RuntimeWarning, match=message):
        jax.block_until_ready(jax.grad(function)(0.5, KEY))
    with pytest.warns(RuntimeWarning, match=message):
        jax.block_until_ready(jax.jit(jax.vmap(jax.grad(function), (None, 0)))(0.5, jax.random.split(KEY)))


@pytest.mark.parametrize("coupling", [MaximalReflection(), FullKernelMaximal()], ids=lambda c: type(c).__name__)
def test_alternatives_that_meet(recwarn, coupling):
    jax.block_until_ready(jax.grad(expectation(coupling=coupling, num_steps=200))(0.5, KEY))
    assert not [w for w in recwarn if "alternative" in str(w.message)]


def test_compiled_functions_have_no_effects():
    # With one they are called through Python, which takes as long as a short run of chains.
    assert not jax.make_jaxpr(jax.value_and_grad(expectation()))(0.5, KEY).effects
