"""The gradient rules: unbiased where they say so, biased where they say so, and with less variance where they must."""

from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.bijections import Affine
from flowjax.distributions import LogNormal, MultivariateNormal, Normal, StandardNormal, Transformed
from flowjax.flows import coupling_flow, masked_autoregressive_flow

from lehr import Annealer, Hamiltonian, InputError, Langevin, Metropolis, Schedule, divergences, objectives
from lehr.numerics import stop_gradient
from lehr.objectives import control_variates
from tests import targets
from tests.statistics import THRESHOLD, assert_mean, two_sample_z_score, z_score
from tests.test_objectives import kl_divergence

NUM_GRADIENTS = 20_000


def gradients(key, bound, trained, num_gradients=NUM_GRADIENTS):
    """Values `(n,)` and gradients `(n, size)` of `bound(trained, key)` for independent keys, and the columns' names."""
    dynamic, static = eqx.partition(trained, eqx.is_inexact_array)

    @jax.jit
    @jax.vmap
    def sampled(key):
        value, gradient = jax.value_and_grad(lambda leaves: bound(eqx.combine(leaves, static), key))(dynamic)
        return value, jax.flatten_util.ravel_pytree(gradient)[0]

    values, sampled_gradients = sampled(jax.random.split(key, num_gradients))
    named = jax.tree_util.tree_flatten_with_path(dynamic)[0]
    names = [jax.tree_util.keystr(path) + str([*index]) for path, leaf in named for index in np.ndindex(leaf.shape)]
    # The upper triangle of a scale is no parameter: the density does not see it.
    kept = [i for i, name in enumerate(names) if not name.endswith("scale_tril[0, 1]")]
    return np.asarray(values), np.asarray(sampled_gradients, np.float64)[:, kept], [names[i] for i in kept]


def assert_same_mean(a, b, names):
    for i, name in enumerate(names):
        if not name.endswith(("0, 1]", "triangular[0, 1]")) or a[:, i].std() > 0:
            z = two_sample_z_score(a[:, i], b[:, i])
            assert abs(z) < THRESHOLD, f"the gradients in {name} are {z:.1f} standard errors apart"


def total_variance(sampled):
    return float(np.sum(np.var(sampled, axis=0)))


def replicated(bound, num_replicates):
    """The mean of independent values of a bound `(trained, key)`."""
    return lambda trained, key: jnp.mean(
        jax.vmap(lambda key: bound(trained, key))(jax.random.split(key, num_replicates))
    )


# One sample.


def exact_gradient_of_the_elbo(base, target):
    """In float64, by finite differences of log Z - KL(base || posterior)."""
    flat, unravel = jax.flatten_util.ravel_pytree(base)
    flat, h = np.asarray(flat, np.float64), 1e-4
    posterior = target.posterior

    def at(values):
        moved = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), unravel(jnp.asarray(values, jnp.float32)))
        moved = targets.Gaussian(values[:2], values[2:].reshape(2, 2))
        return -kl_divergence(moved, posterior)

    return np.array([(at(flat + h * e) - at(flat - h * e)) / (2 * h) for e in np.eye(len(flat))])


UNBIASED_ELBOS = {
    "plain": objectives.elbo,
    "stl": objectives.elbo_stl,
    "control variate": objectives.elbo_control_variate,
}


@pytest.mark.parametrize("name", UNBIASED_ELBOS)
def test_elbo_gradients_are_unbiased(key, name):
    base, target = targets.base_2d(), targets.conjugate_2d()
    values, sampled, names = gradients(
        key, lambda base, key: UNBIASED_ELBOS[name](base, target, key, num_samples=4), base
    )
    assert_mean(values, float(target.log_evidence) - kl_divergence(base, target.posterior))
    expected = np.delete(exact_gradient_of_the_elbo(base, target), 3)
    assert np.abs(expected).min() > 0.05
    assert names[3] == ".scale_tril[1, 0]"
    for i, leaf in enumerate(names):
        assert abs(z_score(sampled[:, i], expected[i])) < THRESHOLD, leaf


def test_at_the_exact_posterior_only_the_path_derivative_vanishes(x64, key):
    target = targets.conjugate_2d()

    def at_posterior(objective, size=200):
        return gradients(key, lambda base, key: objective(base, target, key, num_samples=3), target.posterior, size)[1]

    for objective in (objectives.elbo_stl, objectives.iwae_stl, objectives.iwae_dreg):
        assert np.abs(at_posterior(objective)).max() < 1e-12
    # The optimal scale is there 1, and estimated as 1 from any two samples.
    assert np.abs(at_posterior(objectives.elbo_control_variate)).max() < 1e-9
    assert np.abs(at_posterior(objectives.elbo)).max() > 0.1
    assert np.abs(at_posterior(objectives.iwae)).max() > 0.1


def test_the_estimated_scale_is_about_as_good_as_the_best(key):
    target, posterior = targets.conjugate_2d(), targets.conjugate_2d().posterior
    far = targets.Gaussian(posterior.loc + 1, 3 * posterior.scale_tril)
    near = targets.Gaussian(posterior.loc + 0.05, 1.02 * posterior.scale_tril)
    for base in (far, near):
        variance = {
            name: total_variance(
                gradients(key, lambda base, key: objective(base, target, key, num_samples=16), base, 4000)[1]  # noqa: B023
            )
            for name, objective in UNBIASED_ELBOS.items()
        }
        best = min(variance["plain"], variance["stl"])
        assert variance["control variate"] < 1.1 * best, variance


def test_target_gradients_are_those_of_the_plain_bound(key):
    base, target = targets.base_2d(), targets.mixture_2d()
    for plain, other in (
        (objectives.elbo, objectives.elbo_stl),
        (objectives.elbo, objectives.elbo_control_variate),
        (objectives.iwae, objectives.iwae_dreg),
    ):

        @jax.jit
        def both(target):
            return [
                jax.value_and_grad(lambda target: objective(base, target, key, num_samples=3))(target)  # noqa: B023
                for objective in (plain, other)  # noqa: B023
            ] + [
                # Also where the target is no pytree, but a function that closes over what is trained.
                jax.value_and_grad(lambda target: other(base, lambda x: target(x), key, num_samples=3))(target)  # noqa: B023
            ]

        expected, *found = both(target)
        for gradient in found:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)


def flows(key):
    standard = StandardNormal((3,))
    return {
        "coupling": coupling_flow(key, base_dist=standard, flow_layers=2, nn_width=8),
        "masked autoregressive": masked_autoregressive_flow(key, base_dist=standard, flow_layers=2, nn_width=8),
    }


FAMILIES = {
    "diagonal Gaussian": lambda key: Normal(jnp.array([0.3, -0.5, 1.0]), jnp.array([0.5, 2.0, 1.5])),
    "full-rank Gaussian": lambda key: MultivariateNormal(
        jnp.array([0.3, -0.5, 1.0]), jnp.array([[1.0, 0.3, 0.0], [0.3, 0.7, -0.2], [0.0, -0.2, 2.0]])
    ),
    "coupling": lambda key: flows(key)["coupling"],
    "masked autoregressive": lambda key: flows(key)["masked autoregressive"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_at_a_target_that_is_the_base_but_for_a_constant_nothing_is_left(x64, key, name):
    base = FAMILIES[name](key)
    # One draw after the other: FlowJAX's full-rank Gaussian solves triangular systems, which batched may not end.
    keys = jax.random.split(key, 10)

    @jax.jit
    def gradients_of_both(dynamic):
        def of(objective):
            def bound(leaves, key):
                return objective(eqx.combine(leaves, static), lambda x: base.log_prob(x) + 3.7, key)

            return jax.lax.map(lambda key: jax.grad(bound)(dynamic, key), keys)

        return of(objectives.elbo_stl), of(objectives.elbo)

    dynamic, static = eqx.partition(base, eqx.is_inexact_array)
    stl, plain = gradients_of_both(dynamic)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(dynamic))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(stl)) < 1e-10
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)) > 0.1


# Several samples.


def test_the_doubly_reparameterised_gradient_is_unbiased_and_the_path_derivative_is_not(key):
    base, target = targets.base_2d(), targets.mixture_2d()

    def sampled(objective, fold):
        return gradients(
            jax.random.fold_in(key, fold), lambda base, key: objective(base, target, key, num_samples=3), base, 100_000
        )

    _, plain, names = sampled(objectives.iwae, 0)
    _, dreg, _ = sampled(objectives.iwae_dreg, 1)
    assert_same_mean(plain, dreg, names)
    assert total_variance(dreg) < 0.7 * total_variance(plain)
    _, biased, _ = sampled(objectives.iwae_stl, 2)
    z = [two_sample_z_score(plain[:, i], biased[:, i]) for i in range(len(names))]
    assert np.abs(z).max() > 2 * THRESHOLD


def test_signal_to_noise_of_dreg_rises_with_samples_and_that_of_iwae_falls(key):
    # A base wider than the target, so that weights are bounded.
    target = targets.conjugate_2d()
    base = targets.Gaussian(target.posterior.loc + 0.5, 1.5 * target.posterior.scale_tril)

    def signal_to_noise(objective, num_samples):
        _, sampled, _ = gradients(
            key, lambda base, key: objective(base, target, key, num_samples=num_samples), base, 4000
        )
        return float(np.linalg.norm(sampled.mean(axis=0)) / np.sqrt(total_variance(sampled)))

    assert signal_to_noise(objectives.iwae_dreg, 64) > 2 * signal_to_noise(objectives.iwae_dreg, 4)
    assert signal_to_noise(objectives.iwae, 64) < 0.5 * signal_to_noise(objectives.iwae, 4)


# Annealed.


KERNELS = {
    "fresh momentum": lambda: Hamiltonian(0.3, momentum_scale=np.array([1.3, 0.8])),
    "persistent momentum": lambda: Hamiltonian(np.array([[0.3], [0.4]]), persistence=0.7),
    "langevin": lambda: Langevin(np.array([0.4, 0.6])),
}


def annealed(name):
    return Annealer(targets.base_2d(), Schedule(jnp.array([0.2, -0.3])), KERNELS[name]())


@pytest.mark.parametrize(
    "name", [pytest.param("fresh momentum", marks=pytest.mark.slow), "persistent momentum", "langevin"]
)
def test_annealed_gradients_are_unbiased(key, name):
    trained, n = (annealed(name), targets.mixture_2d()), 50_000

    def sampled(objective, num_particles, fold):
        return gradients(
            jax.random.fold_in(key, fold),
            lambda parts, key: objective(*parts, key, num_particles=num_particles),
            trained,
            n,
        )

    values, plain, names = sampled(objectives.davi, 1, 0)
    stl_values, stl, _ = sampled(objectives.davi_stl, 1, 1)
    assert abs(two_sample_z_score(values, stl_values)) < THRESHOLD
    assert_same_mean(plain, stl, names)
    of_base = [i for i, leaf in enumerate(names) if "base" in leaf]
    assert total_variance(stl[:, of_base]) < 0.8 * total_variance(plain[:, of_base])
    _, plain, _ = sampled(objectives.davi, 3, 2)
    _, dreg, _ = sampled(objectives.davi_dreg, 3, 3)
    assert_same_mean(plain, dreg, names)
    assert total_variance(dreg[:, of_base]) < 0.8 * total_variance(plain[:, of_base])
    # The same draws: only the base's gradient is another.
    same = jax.jit(
        lambda: [
            eqx.filter_value_and_grad(lambda parts: objective(*parts, key, num_particles=3))(trained)  # noqa: B023
            for objective in (objectives.davi, objectives.davi_dreg)
        ]
    )()
    (value, (annealer, target)), (other_value, (other_annealer, other_target)) = same
    pairs = [(value, other_value), (annealer.kernel, other_annealer.kernel), (target, other_target)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *zip(*pairs))
    assert np.abs(annealer.base.loc - other_annealer.base.loc).max() > 0.01


def test_one_particle_of_dreg_is_the_path_derivative(key):
    trained = annealed("persistent momentum")

    @jax.jit
    def both(trained):
        target = targets.mixture_2d()
        return (
            jax.grad(lambda annealer: objectives.davi_stl(annealer, target, key))(trained),
            jax.grad(lambda annealer: objectives.davi_dreg(annealer, target, key, num_particles=1))(trained),
        )

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *both(trained))


@pytest.mark.slow
def test_annealed_gradients_of_a_flow_are_unbiased(key):
    # The same flow for every seed: some have tails in which a few gradients are all of the variance.
    key_flow, key_moved = jax.random.split(jax.random.key(5))
    flow = coupling_flow(key_flow, base_dist=StandardNormal((2,)), flow_layers=2, nn_width=4, nn_depth=1)
    # From its start, which is nearly the identity, to where the networks matter.
    dynamic, static = eqx.partition(flow, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(dynamic)
    flow = eqx.combine(unravel(flat + 0.2 * jax.random.normal(key_moved, flat.shape)), static)
    annealer = Annealer(flow, Schedule(jnp.array([0.2, -0.3])), Hamiltonian(0.3, persistence=0.7))
    target, n = targets.mixture_2d(), 20_000

    def sampled(bound, fold):
        values, found, names = gradients(jax.random.fold_in(key, fold), bound, annealer, n)
        of_base = [i for i, name in enumerate(names) if "base" in name]
        return values, found[:, of_base], [names[i] for i in of_base]

    def davi(annealer, key):
        return objectives.davi(annealer, target, key)

    def stl(annealer, key):
        return objectives.davi_stl(annealer, target, key)

    def of_three(objective):
        return lambda annealer, key: objective(annealer, target, key, num_particles=3)

    for (values, plain, names), (other_values, other, other_names) in (
        (sampled(davi, 0), sampled(stl, 1)),
        (sampled(of_three(objectives.davi), 2), sampled(of_three(objectives.davi_dreg), 3)),
    ):
        assert abs(two_sample_z_score(values, other_values)) < THRESHOLD
        assert names == other_names
        # A unit of a network may be off at every draw, or at almost every one.
        seen = [i for i in range(len(names)) if min(np.sum(plain[:, i] != 0), np.sum(other[:, i] != 0)) > 100]
        assert len(seen) > 25
        assert_same_mean(plain[:, seen], other[:, seen], [names[i] for i in seen])
        assert total_variance(other) < 0.7 * total_variance(plain) < 15


class HeldDensity(eqx.Module):
    """A base whose density does not see that its parameters change."""

    base: Any

    def sample(self, key, shape=()):
        return self.base.sample(key, shape)

    def log_prob(self, x):
        return stop_gradient(self.base).log_prob(x)


def test_the_densities_of_the_path_are_no_scores(key):
    """To hold them too, and not only the density of x_0, is biased: the tests of unbiasedness see it."""
    annealer, target, n = annealed("persistent momentum"), targets.mixture_2d(), 50_000
    annealer = eqx.tree_at(lambda annealer: annealer.kernel, annealer, Hamiltonian(0.8, persistence=0.7))

    def stl(base, key):
        return objectives.davi_stl(eqx.tree_at(lambda annealer: annealer.base, annealer, base), target, key)

    _, sampled, names = gradients(jax.random.fold_in(key, 0), stl, annealer.base, n)
    _, biased, _ = gradients(
        jax.random.fold_in(key, 1), lambda base, key: stl(HeldDensity(base), key), annealer.base, n
    )
    z = [two_sample_z_score(sampled[:, i], biased[:, i]) for i in range(len(names))]
    assert np.abs(z).max() > 2 * THRESHOLD


# The score as a control variate of several samples, and of chains.


@pytest.mark.parametrize(("num_samples", "largest_ratio"), [(1, 0.3), (3, 0.9)])
def test_the_control_variate_of_iwae_is_unbiased(key, num_samples, largest_ratio):
    base, target, n = targets.base_2d(), targets.conjugate_2d(), 40_000

    def iwae(base, key):
        return objectives.iwae(base, target, key, num_samples=num_samples)

    def controlled(base, key):
        return objectives.iwae_control_variate(base, target, key, num_samples=num_samples, num_replicates=8)

    values, plain, names = gradients(jax.random.fold_in(key, 0), replicated(iwae, 8), base, n)
    controlled_values, sampled, _ = gradients(jax.random.fold_in(key, 1), controlled, base, n)
    assert abs(two_sample_z_score(values, controlled_values)) < THRESHOLD
    assert_same_mean(plain, sampled, names)
    assert total_variance(sampled) < largest_ratio * total_variance(plain)


def test_a_scale_from_the_same_replicates_would_be_biased(key, monkeypatch):
    """What the leave-one-out estimate is for: the tests of unbiasedness see it missing."""
    base, target, n = targets.base_2d(), targets.conjugate_2d(), 40_000

    def of_all(g, s):
        g_bar, s_bar = g.mean(axis=0), s.mean(axis=0)
        return jnp.full(len(g), -jnp.sum((g - g_bar) * (s - s_bar)) / jnp.sum((s - s_bar) ** 2))

    def iwae(base, key):
        return objectives.iwae(base, target, key, num_samples=3)

    _, plain, names = gradients(jax.random.fold_in(key, 0), replicated(iwae, 3), base, n)
    monkeypatch.setattr(control_variates, "_leave_one_out_scale", of_all)
    _, biased, _ = gradients(
        jax.random.fold_in(key, 1),
        lambda base, key: objectives.iwae_control_variate(base, target, key, num_samples=3, num_replicates=3),
        base,
        n,
    )
    z = [two_sample_z_score(plain[:, i], biased[:, i]) for i in range(len(names))]
    assert np.abs(z).max() > 2 * THRESHOLD


def test_the_control_variate_of_davi_is_unbiased(key):
    trained, n = (annealed("persistent momentum"), targets.mixture_2d()), 20_000

    def davi(parts, key):
        return objectives.davi(*parts, key, num_particles=2)

    def controlled(parts, key):
        return objectives.davi_control_variate(*parts, key, num_particles=2, num_replicates=5)

    values, plain, names = gradients(jax.random.fold_in(key, 0), replicated(davi, 5), trained, n)
    controlled_values, sampled, _ = gradients(jax.random.fold_in(key, 1), controlled, trained, n)
    assert abs(two_sample_z_score(values, controlled_values)) < THRESHOLD
    assert_same_mean(plain, sampled, names)
    of_base = [i for i, leaf in enumerate(names) if "base" in leaf]
    assert total_variance(sampled[:, of_base]) < 0.5 * total_variance(plain[:, of_base])


def test_a_control_variate_changes_the_gradient_of_the_base_alone(key):
    """The same draws: value, and gradients in schedule, kernel and target, are those of the mean of plain bounds."""
    parts = annealed("persistent momentum"), targets.mixture_2d()
    base, target = targets.base_2d(), targets.mixture_2d()
    pairs = [
        (
            parts,
            replicated(lambda parts, key: objectives.davi(*parts, key, num_particles=2), 3),
            lambda parts, key: objectives.davi_control_variate(*parts, key, num_particles=2, num_replicates=3),
        ),
        (
            (base, target),
            replicated(lambda parts, key: objectives.iwae(*parts, key, num_samples=2), 3),
            lambda parts, key: objectives.iwae_control_variate(*parts, key, num_samples=2, num_replicates=3),
        ),
    ]
    for trained, plain, controlled in pairs:
        found = jax.jit(lambda trained: [jax.value_and_grad(f)(trained, key) for f in (plain, controlled)])(trained)  # noqa: B023
        (value, (first, of_target)), (other_value, (other_first, other_of_target)) = found
        same, others = (value, of_target), (other_value, other_of_target)
        of_base, other_of_base = first, other_first
        if isinstance(first, Annealer):
            same, others = (*same, first.schedule, first.kernel), (*others, other_first.schedule, other_first.kernel)
            of_base, other_of_base = first.base, other_first.base
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), same, others)
        assert np.abs(of_base.loc - other_of_base.loc).max() > 0.01


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_every_memory_and_a_target_that_closes_over_what_is_trained(key, memory):
    annealer, target = annealed("persistent momentum"), targets.mixture_2d()

    def bound(annealer, target, memory):
        return objectives.davi_control_variate(
            annealer, lambda x: target(x), key, num_particles=2, num_replicates=3, memory=memory
        )

    expected, found = (
        jax.jit(jax.grad(lambda annealer, target: bound(annealer, target, memory), argnums=(0, 1)))(annealer, target)  # noqa: B023
        for memory in ("store", memory)
    )
    assert jnp.abs(found[1].log_mass).max() > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


def test_at_the_exact_posterior_the_control_variate_of_iwae_is_zero(x64, key):
    target = targets.conjugate_2d()

    def bound(base, key):
        return objectives.iwae_control_variate(base, target, key, num_samples=4, num_replicates=3)

    assert np.abs(gradients(key, bound, target.posterior, 200)[1]).max() < 1e-9


# Exact entropy and divergence.


def test_the_forms_of_the_bound_agree_and_so_do_their_gradients(key):
    target = targets.conjugate_2d()
    prior = MultivariateNormal(target.prior.loc, target.prior.scale_tril @ target.prior.scale_tril.T)
    base = MultivariateNormal(jnp.array([0.2, -0.4]), jnp.array([[0.5, 0.2], [0.2, 0.7]]))

    def log_likelihood(x):
        return target(x) - target.prior.log_prob(x)

    forms = [
        lambda base, key: objectives.elbo(base, target, key, num_samples=2),
        lambda base, key: objectives.elbo_exact_entropy(base, target, key, num_samples=2),
        lambda base, key: objectives.elbo_exact_kl(base, log_likelihood, prior, key, num_samples=2),
    ]
    found = [gradients(jax.random.fold_in(key, i), form, base) for i, form in enumerate(forms)]
    for values, sampled, names in found[1:]:
        assert abs(two_sample_z_score(values, found[0][0])) < THRESHOLD
        assert_same_mean(sampled, found[0][1], names)


def test_an_entropy_may_be_given(key):
    """That of log x ~ N(m, s^2) is the entropy of log x and the sum of m."""
    base = LogNormal(jnp.array([0.3, -0.4]), jnp.array([0.5, 0.8]))
    target = targets.mixture_2d()

    def entropy(base):
        return divergences.entropy(base.base_dist) + jnp.sum(base.base_dist.loc)

    def exact(base, key):
        return objectives.elbo_exact_entropy(base, target, key, num_samples=2, entropy=entropy)

    def plain(base, key):
        return objectives.elbo(base, target, key, num_samples=2)

    values, sampled, names = gradients(jax.random.fold_in(key, 0), exact, base)
    plain_values, plain_sampled, _ = gradients(jax.random.fold_in(key, 1), plain, base)
    assert abs(two_sample_z_score(values, plain_values)) < THRESHOLD
    assert_same_mean(sampled, plain_sampled, names)
    with pytest.raises(InputError, match=r"give a function entropy\(base\)"):
        objectives.elbo_exact_entropy(base, target, key)


def test_a_flow_has_no_exact_entropy(key):
    flow = flows(key)["coupling"]
    with pytest.raises(InputError, match="use objectives\\.elbo or elbo_stl"):
        objectives.elbo_exact_entropy(flow, flow.log_prob, key)
    with pytest.raises(InputError, match="give a function"):
        objectives.elbo_exact_kl(flow, flow.log_prob, Transformed(StandardNormal((3,)), Affine(jnp.ones(3))), key)


# Bad input.


def test_too_few_samples_for_a_control_variate_are_refused(key):
    base, target = targets.base_2d(), targets.mixture_2d()
    with pytest.raises(InputError, match="at least 3 samples"):
        objectives.elbo_control_variate(base, target, key, num_samples=2)
    with pytest.raises(InputError, match="at least 3 replicates"):
        objectives.iwae_control_variate(base, target, key, num_samples=5, num_replicates=2)
    with pytest.raises(InputError, match="at least 3 replicates"):
        objectives.davi_control_variate(annealed("langevin"), target, key, num_replicates=2)
    with pytest.raises(InputError, match="num_samples must be at least 1"):
        objectives.iwae_control_variate(base, target, key, num_samples=0, num_replicates=3)


@pytest.mark.parametrize("objective", [objectives.davi_stl, objectives.davi_dreg])
def test_corrected_kernels_are_refused(key, objective):
    annealer = Annealer(targets.base_2d(), Schedule.linear(2), Metropolis(Hamiltonian(0.3)))
    with pytest.raises(InputError, match="use aiwae"):
        objective(annealer, targets.mixture_2d(), key, num_particles=2)


def test_a_control_variate_of_a_corrected_kernel_is_refused(key):
    annealer = Annealer(targets.base_2d(), Schedule.linear(2), Metropolis(Hamiltonian(0.3)))
    with pytest.raises(InputError, match="use aiwae"):
        objectives.davi_control_variate(annealer, targets.mixture_2d(), key, num_replicates=3)
