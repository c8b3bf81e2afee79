"""Plain log densities over named, bounded arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.bijections import AdditiveCondition, Affine, Chain, Exp, Sigmoid, TriangularAffine
from flowjax.distributions import Normal, StandardNormal
from jax.flatten_util import ravel_pytree
from scipy import integrate, stats

import lehr
from lehr import InputError
from lehr.adapters.functions import from_function
from tests.statistics import assert_unbiased_weights

EXAMPLE = {"p": 0.5, "sigma": jnp.ones(2), "mu": jnp.zeros((2, 1))}
BOUNDS = {"sigma": Exp(), "p": Chain([Sigmoid(), Affine(1.0, 2.0)])}


def log_density(values):
    """p on (1, 3), sigma positive, mu anywhere; unnormalised by a factor of 7."""
    gamma = 2 * jnp.log(values["sigma"]) - values["sigma"] - jnp.log(2.0)
    return jnp.sum(gamma) - 0.5 * jnp.sum(values["mu"] ** 2) - jnp.log(2 * jnp.pi) - jnp.log(2.0) + jnp.log(7.0)


def test_the_density_has_the_jacobian_of_each_bound(x64):
    problem = from_function(log_density, EXAMPLE, bijections=BOUNDS)
    for x in ([0.3, -1.0, 0.5, 1.0, -2.0], [2.0, 0.0, -3.0, 1.5, 0.1]):
        mu, p, sigma = x[:2], 1 + 2 / (1 + np.exp(-x[2])), np.exp(x[3:])
        expected = stats.norm.logpdf(mu).sum() + stats.gamma(3).logpdf(sigma).sum() + np.log(7 / 2)
        expected += np.log((p - 1) * (3 - p) / 2) + np.sum(x[3:])
        np.testing.assert_allclose(problem.log_prob(jnp.array(x)), expected, rtol=1e-8)


def test_the_integral_is_that_of_the_density(x64):
    problem = from_function(half_normal, 1.0, bijections=Exp())
    integral, _ = integrate.quad(lambda x: float(jnp.exp(problem.log_prob(jnp.array([x])))), -20, 5, epsabs=1e-8)
    assert integral == pytest.approx(3.0, rel=1e-6)


def half_normal(s):
    return jnp.log(3.0) + 0.5 * jnp.log(2 / jnp.pi) - 0.5 * s**2


def test_positions_lie_as_ravel_pytree_puts_them():
    problem = from_function(log_density, EXAMPLE)
    tree = {"p": jnp.array(1.0), "sigma": jnp.array([2.0, 3.0]), "mu": jnp.array([[4.0], [5.0]])}
    back = problem.unravel(ravel_pytree(tree)[0])
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert problem.position.shape == (5,)


def test_unravel_gives_constrained_values():
    values = from_function(log_density, EXAMPLE, bijections=BOUNDS).unravel(jnp.zeros(5))
    np.testing.assert_allclose(values["sigma"], [1.0, 1.0])
    np.testing.assert_allclose(values["p"], 2.0)
    assert values["mu"].shape == (2, 1)
    assert values["p"].shape == ()


def test_a_bijection_of_the_last_axes_is_repeated_along_the_others(x64):
    scale = jnp.array([[2.0, 0.0], [1.0, 3.0]])
    problem = from_function(lambda x: jnp.sum(x), jnp.zeros((3, 2)), bijections=TriangularAffine(jnp.zeros(2), scale))
    x = jnp.arange(6.0)
    np.testing.assert_allclose(problem.unravel(x), x.reshape(3, 2) @ scale.T)
    np.testing.assert_allclose(problem.log_prob(x), jnp.sum(x.reshape(3, 2) @ scale.T) + 3 * np.log(6))


def test_one_bijection_bounds_a_whole_subtree():
    example = {"a": (1.0, jnp.ones(2)), "b": [0.0, 0.0]}
    values = from_function(lambda v: v["b"][0], example, bijections={"a": Exp(), "b": [None, Exp()]}).unravel(
        jnp.zeros(5)
    )
    assert [float(v) for v in (values["a"][0], values["b"][0], values["b"][1])] == [1.0, 0.0, 1.0]


def test_annealing_finds_the_evidence(key):
    problem = from_function(log_density, EXAMPLE, bijections=BOUNDS)
    annealer = lehr.Annealer(problem.base, lehr.Schedule.linear(8), lehr.Metropolis(lehr.Hamiltonian(0.5)))
    particles = lehr.anneal(key, annealer, problem.log_target, 4000)
    assert_unbiased_weights(particles.log_weights, np.log(7))


def test_a_model_without_parameters(key):
    problem = from_function(lambda values: jnp.array(-1.5), {})
    assert problem.position.shape == (0,)
    assert problem.unravel(jnp.zeros(0)) == {}
    annealer = lehr.Annealer(problem.base, lehr.Schedule.linear(2), lehr.Metropolis(lehr.RandomWalk(0.5)))
    assert lehr.anneal(key, annealer, problem.log_target, 3).log_evidence == pytest.approx(-1.5)


def test_the_density_can_be_trained():
    class Density(eqx.Module):
        scale: jax.Array

        def __call__(self, x):
            return -self.scale * jnp.sum(x**2)

    problem = from_function(Density(jnp.array(2.0)), jnp.zeros(3))
    gradient = eqx.filter_grad(lambda target: target(jnp.ones(3)))(problem.log_target)
    assert gradient.log_density.scale == -3


def test_float32_stays_float32_under_x64(x64):
    problem = from_function(log_density, EXAMPLE, bijections=BOUNDS)
    x = jnp.zeros(5, jnp.float32)
    assert problem.log_prob(x).dtype == jnp.float32
    assert problem.unravel(x)["p"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"n": 3}, {}, r"\['n'\] is int"),
        ({"n": jnp.zeros(2, int)}, {}, "sum a discrete one out"),
        ({"s": jnp.ones(3)}, {"bijections": {"s": Exp((2,))}}, r"\['s'\] has shape \(3,\)"),
        ({"s": 1.0}, {"bijections": {"s": Exp((2,))}}, "its last axes"),
        ({"s": 1.0}, {"bijections": {"t": Exp()}}, "bijections for t, but the example has s"),
        ({"s": 1.0}, {"bijections": {"s": jnp.exp}}, "a FlowJAX bijection or None"),
        ({"s": 1.0}, {"bijections": [Exp()]}, "the structure of the example"),
        ({"s": jnp.ones(2)}, {"bijections": {"s": AdditiveCondition(lambda c: c, (2,), (1,))}}, "condition"),
        ({"s": 1.0}, {"base": StandardNormal((2,))}, r"1 unconstrained numbers.*shape \(2,\)"),
        ({"s": 1.0}, {"base": Normal()}, r"a base over positions of shape \(1,\)"),
        ({"s": 1.0}, {"base": "prior"}, "sample"),
    ],
)
def test_faults(example, options, message):
    with pytest.raises(InputError, match=message):
        from_function(lambda values: jnp.zeros(()), example, **options)


def test_the_density_must_be_a_scalar():
    with pytest.raises(InputError, match="one float"):
        from_function(lambda values: values["s"], {"s": jnp.ones(3)})
