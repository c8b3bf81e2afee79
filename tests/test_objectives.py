"""The objectives are the papers' equations, and their gradients are what their docstrings say."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import lehr
from lehr import Annealer, Hamiltonian, InputError, Langevin, Metropolis, Schedule, objectives
from tests import targets
from tests.statistics import assert_mean
from tests.targets import MOMENTUM_SCALE

# Importance sampling.


def test_one_sample_of_iwae_is_the_elbo(key):
    @jax.jit
    def both(key):
        base, target = targets.base_2d(), targets.mixture_2d()
        return objectives.iwae(base, target, key, num_samples=1), objectives.elbo(base, target, key)

    np.testing.assert_allclose(*both(key), rtol=1e-6)


def kl_divergence(p, q):
    """KL(p || q) of two Gaussians."""
    ratio = np.linalg.solve(q.scale_tril, p.scale_tril)
    shift = np.linalg.solve(q.scale_tril, q.loc - p.loc)
    return (np.sum(ratio**2) + np.sum(shift**2) - len(shift)) / 2 - np.log(np.abs(np.linalg.det(ratio)))


def test_iwae_rises_from_the_elbo_to_the_evidence(key):
    target = targets.conjugate_2d()
    log_z, base = float(target.log_evidence), target.prior

    @jax.jit
    @jax.vmap
    def bounds(key):
        def at(s):
            return objectives.iwae(base, target, key, num_samples=s)

        return objectives.elbo(base, target, key, num_samples=20), at(1), at(5), at(100)

    elbo, *iwae = bounds(jax.random.split(key, 1000))
    # log Z - ELBO = KL(base || posterior), whatever the number of samples.
    exact = log_z - kl_divergence(base, target.posterior)
    assert_mean(elbo, exact)
    assert_mean(iwae[0], exact)
    means = [np.mean(bound) for bound in iwae]
    assert means[0] + 0.3 < means[1]
    assert means[1] + 0.1 < means[2] < log_z
    assert log_z - means[2] < 0.1
    # The exact posterior as base: every weight is Z.
    at_best = jax.jit(lambda key: objectives.elbo(target.posterior, target, key, num_samples=3))(key)
    np.testing.assert_allclose(at_best, log_z, atol=1e-4)


# DAVI.


def chain_with_known_noise(x_0, v_0, xi, scale):
    """A base and a Hamiltonian kernel class that draw what they are told, whatever the key: lehr keeps M^(-1/2) v."""

    class FixedBase(targets.Gaussian):
        def sample(self, key, shape=()):
            return jnp.asarray(x_0)

    class FixedNoise(Hamiltonian):
        def draw_momentum(self, key, position):
            return jnp.asarray(v_0 / scale)

        def noise(self, key, num_steps, position):
            assert num_steps == len(xi)
            return jnp.asarray(xi / scale)

    return FixedBase, FixedNoise


@pytest.mark.parametrize("persistence", [0.0, 0.7], ids=["fresh momentum", "persistent momentum"])
def test_davi_is_equation_15(x64, persistence):
    """log [target(z_K) / q(z_0) prod_k N(v_hat_k; 0, M) / N(v_{k-1}; 0, M)], in the paper's variables."""
    rng, scale, betas = np.random.default_rng(0), np.array([0.5, 3.0]), np.array([0, 0.1, 0.5, 0.8, 1.0])
    q, log_target = targets.base_2d(), targets.log_gamma_2d()
    z_0, v_0 = rng.normal(size=2), scale * rng.normal(size=2)
    xi = scale * rng.normal(size=(4, 2))
    step_size = np.array([[0.2], [0.3], [0.25], [0.4]])

    mass = scale**2
    z, v = z_0, v_0
    bound = -float(q.log_prob(jnp.asarray(z_0)))
    for k in range(1, 5):

        def log_f(x, b=betas[k]):
            return (1 - b) * q.log_prob(x) + b * log_target(x)

        e = step_size[k - 1, 0]
        half = z + e / 2 * v / mass
        v_hat = v + e * np.asarray(jax.grad(log_f)(jnp.asarray(half)))
        z = half + e / 2 * v_hat / mass
        momentum = scipy.stats.norm(0, scale)
        bound += momentum.logpdf(v_hat).sum() - momentum.logpdf(v).sum()
        v = persistence * v_hat + np.sqrt(1 - persistence**2) * xi[k - 1]
    bound += float(log_target(jnp.asarray(z)))

    FixedBase, FixedNoise = chain_with_known_noise(z_0, v_0, xi, scale)
    annealer = Annealer(
        FixedBase(q.loc, q.scale_tril), Schedule.from_betas(betas), FixedNoise(step_size, persistence, scale)
    )
    np.testing.assert_allclose(objectives.davi(annealer, log_target, jax.random.key(0)), bound, rtol=1e-10)
    particles = lehr.anneal(jax.random.key(0), annealer, log_target, 1)
    np.testing.assert_allclose(particles.positions[0], z, rtol=1e-10)


def test_davi_of_many_particles_is_the_log_of_their_mean_weight(key):
    annealer = Annealer(targets.base_2d(), Schedule.linear(3), Hamiltonian(0.5, 0.5))
    target = targets.mixture_2d()
    log_weights = np.asarray(lehr.anneal(key, annealer, target, 5).log_weights, np.float64)
    bound = objectives.davi(annealer, target, key, num_particles=5)
    np.testing.assert_allclose(bound, np.log(np.mean(np.exp(log_weights))), rtol=1e-5)


def test_davi_refuses_corrected_kernels(key):
    annealer = Annealer(targets.base_2d(), Schedule.linear(3), Metropolis(Hamiltonian(0.5)))
    with pytest.raises(InputError, match=r"DAVI needs an uncorrected kernel such as lehr.Hamiltonian"):
        objectives.davi(annealer, targets.mixture_2d(), key)


DAVI_KERNELS = {
    "hamiltonian": lambda: Hamiltonian(
        np.array([[0.5], [0.3], [0.6]]), np.array([[0.3], [0.9], [0.6]]), MOMENTUM_SCALE, num_leapfrog=2
    ),
    "langevin": lambda: Langevin(np.array([0.4, 0.6])),
}


@pytest.mark.parametrize("name", DAVI_KERNELS)
def test_davi_gradient_is_that_of_finite_differences(x64, key, name):
    schedule = Schedule(jnp.array([0.2, -0.5, 0.4]))
    trained = (Annealer(targets.base_2d(), schedule, DAVI_KERNELS[name]()), targets.mixture_2d())

    @jax.jit
    def bound(trained):
        return objectives.davi(*trained, key, num_particles=3)

    gradient = jax.jit(jax.grad(bound))(trained)
    leaves, treedef = jax.tree.flatten(trained)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(trained)[0]]
    expected_names = ["loc", "scale_tril", "logits", "log_step_size", "log_mass"]
    if name == "hamiltonian":
        expected_names += ["logit_persistence", "log_momentum_scale"]
    for expected in expected_names:
        assert any(expected in name for name in names)
    rng, h = np.random.default_rng(0), 1e-5
    for i, (leaf, leaf_gradient) in enumerate(zip(leaves, jax.tree.leaves(gradient))):
        direction = rng.normal(size=leaf.shape)
        if "scale_tril" in names[i]:
            direction = np.tril(direction)

        def at(t):
            return bound(treedef.unflatten([*leaves[:i], leaf + t * direction, *leaves[i + 1 :]]))  # noqa: B023

        slope = float(at(h) - at(-h)) / (2 * h)
        assert abs(slope) > 1e-3, f"{names[i]} has no effect: this tests nothing"
        np.testing.assert_allclose(np.sum(direction * leaf_gradient), slope, rtol=1e-6, err_msg=names[i])


# AIWAE.


def aiwae_parts():
    kernel = Metropolis(Hamiltonian(0.7, num_leapfrog=2))
    return Annealer(targets.base_2d(), Schedule.linear(3), kernel), targets.mixture_2d()


def test_aiwae_gradients_are_those_of_the_paper(key):
    annealer, target = aiwae_parts()

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def aiwae(parts):
        return objectives.aiwae(*parts, key, num_particles=6)

    (bound, particles), (annealer_gradient, target_gradient) = aiwae((annealer, target))
    np.testing.assert_allclose(bound, particles.log_evidence, rtol=1e-6)
    assert particles.acceptance.shape == (3,)

    # Target parameters: the self-normalised mean of grad log target at the annealed particles, all held fixed.
    w = np.exp(particles.log_weights - np.max(particles.log_weights))
    each = jax.jit(jax.vmap(lambda z: jax.grad(lambda target: target(z))(target)))(particles.positions)
    expected = jax.tree.map(lambda leaf: np.einsum("n,n...->...", w / w.sum(), leaf), each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), target_gradient, expected)
    assert np.ptp(w / w.sum()) > 0.01

    # Base parameters: those of the ELBO with as many samples.
    key_elbo = jax.random.split(key)[1]
    expected = jax.jit(jax.grad(lambda base: objectives.elbo(base, target, key_elbo, num_samples=6)))(annealer.base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), annealer_gradient.base, expected)
    assert np.abs(expected.loc).max() > 0.01

    # Nothing for what only the chain sees.
    for leaf in jax.tree.leaves((annealer_gradient.schedule, annealer_gradient.kernel)):
        np.testing.assert_array_equal(leaf, 0)


def test_aiwae_of_a_closure_over_what_is_trained_raises(key):
    # Its parameters could not be held fixed in the chain, and its gradient would be wrong without a word.
    annealer, target = aiwae_parts()

    def bound(log_mass):
        closed = targets.Mixture(log_mass, target.components)
        return objectives.aiwae(annealer, lambda x: closed(x), key, num_particles=2)[0]

    with pytest.raises(TypeError, match="stop_gradient"):
        jax.grad(bound)(target.log_mass)


def test_aiwae_refuses_an_uncorrected_kernel(key):
    # Differentiated through, it would add the gradient of the chain to that of the paper.
    annealer, target = aiwae_parts()
    uncorrected = Annealer(annealer.base, annealer.schedule, annealer.kernel.kernel)
    with pytest.raises(InputError, match="use davi"):
        objectives.aiwae(uncorrected, target, key, num_particles=2)


@pytest.mark.parametrize("objective", [objectives.elbo, objectives.iwae])
def test_no_sample_is_refused(objective, key):
    with pytest.raises(InputError, match="num_samples must be at least 1"):
        objective(targets.base_2d(), targets.mixture_2d(), key, num_samples=0)
