"""A coupling flow fitted to draws: it follows what a Gaussian cannot, goes on from where it was, and refuses NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.distributions import StandardNormal, Transformed

from lehr import InputError
from lehr.bases import moment_matched
from lehr.flows import flow_matched


def funnel(key, num_draws):
    """x_1 is exp(x_0) wide, x_0 standard; scaled to about unit variance."""
    z = jax.random.normal(key, (num_draws, 2))
    return jnp.stack([z[:, 0], z[:, 1] * jnp.exp(z[:, 0]) / 2.5], axis=1)


def log_prob(bijection, draws):
    return Transformed(StandardNormal(draws.shape[1:]), bijection).log_prob(draws)


@pytest.fixture(scope="module")
def fitted():
    key = jax.random.key(3)
    return flow_matched(key, funnel(jax.random.fold_in(key, 1), 1024)[:, None])


def test_it_follows_a_funnel(fitted):
    draws = funnel(jax.random.key(11), 2000)
    exact = jax.scipy.stats.norm.logpdf(draws[:, 0])
    exact += jax.scipy.stats.norm.logpdf(draws[:, 1], scale=jnp.exp(draws[:, 0]) / 2.5)
    flow, gaussian = log_prob(fitted, draws), log_prob(moment_matched(draws), draws)
    # Of the divergence of the best Gaussian, which is large, the flow leaves little.
    lost, gaussian_lost = float(jnp.mean(exact - flow)), float(jnp.mean(exact - gaussian))
    assert gaussian_lost > 0.5
    assert -0.05 < lost < 0.3 * gaussian_lost


def test_its_density_is_normalised(fitted):
    # Importance weights from a wide proposal average to one if the determinant is right.
    z = 2.5 * jax.random.normal(jax.random.key(4), (40_000, 2))
    proposal = jnp.sum(jax.scipy.stats.norm.logpdf(z, scale=2.5), axis=1)
    weights = np.exp(np.asarray(log_prob(fitted, z) - proposal))
    assert abs(weights.mean() - 1) < 5 * weights.std() / np.sqrt(len(weights))


def test_it_maps_there_and_back(fitted):
    z = jax.random.normal(jax.random.key(5), (100, 2))
    x, log_det = jax.vmap(fitted.transform_and_log_det)(z)
    np.testing.assert_allclose(jax.vmap(fitted.inverse)(x), z, atol=1e-3)
    jacobians = jax.vmap(jax.jacobian(fitted.transform))(z)
    np.testing.assert_allclose(np.linalg.slogdet(np.asarray(jacobians))[1], log_det, atol=1e-3)


def test_far_away_it_stays_finite(fitted):
    # Where there were no draws, scales go on, but bounded, so that nothing overflows.
    far = 100 * jnp.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert np.all(np.isfinite(jax.vmap(fitted.transform)(far)))
    assert np.all(np.isfinite(log_prob(fitted, far)))


def test_it_goes_on_from_a_flow(fitted):
    draws = funnel(jax.random.key(6), 1024)
    further = flow_matched(jax.random.key(7), draws[:, None], start=fitted)
    held_out = funnel(jax.random.key(8), 2000)
    assert jax.tree.structure(further) == jax.tree.structure(fitted)
    assert float(jnp.mean(log_prob(further, held_out) - log_prob(fitted, held_out))) > -0.05


def test_the_same_key_gives_the_same_flow(fitted):
    key = jax.random.key(3)
    again = flow_matched(key, funnel(jax.random.fold_in(key, 1), 1024)[:, None])
    z = jnp.array([0.4, -1.3])
    np.testing.assert_array_equal(again.transform(z), fitted.transform(z))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_draws_that_are_not_finite(bad):
    with pytest.raises(InputError, match="not finite"):
        flow_matched(jax.random.key(0), jnp.zeros((200, 1, 2)).at[3, 0, 1].set(bad))


def test_families_are_held_out_whole():
    """Of draws that come in tight families a flow learns the families, unless whole ones say when to stop."""
    key_centres, key_spread, key_fit = jax.random.split(jax.random.key(12), 3)
    centres = jax.random.normal(key_centres, (48, 1, 2))
    families = centres + 0.02 * jax.random.normal(key_spread, (48, 16, 2))
    by_family = flow_matched(key_fit, families)
    by_draw = flow_matched(key_fit, families.reshape(-1, 1, 2))
    fresh = jax.random.normal(jax.random.key(13), (4000, 2))
    exact = jnp.sum(jax.scipy.stats.norm.logpdf(fresh), axis=1)
    lost_by_family, lost_by_draw = (float(jnp.mean(exact - log_prob(flow, fresh))) for flow in (by_family, by_draw))
    assert lost_by_family < 0.5
    assert lost_by_draw > 2 * lost_by_family


def test_few_families():
    with pytest.raises(InputError, match="at least 16 families"):
        flow_matched(jax.random.key(0), jnp.ones((8, 4, 2)))
