"""The power of the tests: mistakes that have been made before, each of which must fail the test of the weights.

A case that passes here means that the setting of `test_annealing.py` has become too easy.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lehr import Hamiltonian, Langevin, Metropolis, RandomWalk
from lehr.kernels import State, Transition
from lehr.path import Point
from tests import targets
from tests.statistics import assert_unbiased_weights
from tests.targets import MOMENTUM_SCALE


class RefreshWithTheWrongRoot(Hamiltonian):
    """sqrt(1 - g) in place of sqrt(1 - g^2)."""

    def refresh(self, state, noise):
        g = self.persistence
        return State(state.point, g * state.momentum + jnp.sqrt(1 - g) * noise)


class Dissipative(Hamiltonian):
    """Momentum damped by 5 %, the weight being right for it but for the volume."""

    def move(self, density, state, noise):
        transition = super().move(density, state, noise)
        before = transition.state.momentum
        kinetic = jnp.sum(before**2) / 2
        replaced = 0.95 * before, transition.log_ratio + (1 - 0.95**2) * kinetic
        return eqx.tree_at(lambda t: (t.state.momentum, t.log_ratio), transition, replaced)


class Stretching(Hamiltonian):
    """Positions stretched by 2 % a step."""

    def move(self, density, state, noise):
        transition = super().move(density, state, noise)
        return eqx.tree_at(lambda t: t.state.point.position, transition, replace_fn=lambda x: 1.02 * x)


class WithoutPotential(Hamiltonian):
    """A weight of the kinetic terms alone: log f_K(x_K) - log f_0(x_0) forgotten."""

    def forget(self, state):
        return State(Point(state.point.position, jnp.zeros(()), jnp.zeros(())), state.momentum)

    def init(self, key, density, position):
        return self.forget(super().init(key, density, position))

    def move(self, density, state, noise):
        transition = super().move(density, state, noise)
        return Transition(self.forget(transition.state), transition.log_ratio)


class WithoutKinetic(Hamiltonian):
    """Acceptance by the potential alone."""

    def propose(self, density, state, noise):
        transition = super().propose(density, state, noise)
        return Transition(transition.state, jnp.zeros_like(transition.log_ratio))


class WithoutReverseDraw(Langevin):
    """A Langevin proposal treated as if it were symmetric."""

    def propose(self, density, state, noise):
        transition = super().propose(density, state, noise)
        return Transition(transition.state, jnp.zeros_like(transition.log_ratio))


class MomentumOfTheWrongMass(Hamiltonian):
    """Momentum drawn with standard deviation M, divided by M and weighed as N(0, M)."""

    def draw_momentum(self, key, position):
        return self.momentum_scale * super().draw_momentum(key, position)

    def refresh(self, state, noise):
        return super().refresh(state, self.momentum_scale * noise)


class WithoutFlip(Hamiltonian):
    """Momentum kept when a move is rejected."""

    def flip(self, state):
        return state


class WithoutAcceptStep(Metropolis):
    """Every move accepted, the weight being that of an exact kernel."""

    def move(self, density, state, noise):
        return Transition(self.kernel.propose(density, state, noise[0]).state, None, jnp.ones(()))


COARSE, TEN_STEPS = (0.0, 0.2, 0.6, 1.0), np.linspace(0, 1, 11)
SMALL, LARGE = 0.6 * MOMENTUM_SCALE, 1.2 * MOMENTUM_SCALE

BUGS = {
    "wrong root": (lambda: RefreshWithTheWrongRoot(SMALL, 0.7, MOMENTUM_SCALE), COARSE),
    "wrong root in hais": (lambda: Metropolis(RefreshWithTheWrongRoot(1.4, 0.95)), TEN_STEPS),
    "dissipative": (lambda: Dissipative(SMALL, 0.7, MOMENTUM_SCALE), COARSE),
    "stretching": (lambda: Stretching(0.6), COARSE),
    "without potential": (lambda: WithoutPotential(0.15 * MOMENTUM_SCALE, 0.7, MOMENTUM_SCALE), COARSE),
    "without kinetic energy in hmc": (lambda: Metropolis(WithoutKinetic(LARGE, 0.0, MOMENTUM_SCALE)), COARSE),
    "without reverse draw in mala": (lambda: Metropolis(WithoutReverseDraw(1.2)), COARSE),
    "wrong mass": (lambda: MomentumOfTheWrongMass(SMALL, 0.7, MOMENTUM_SCALE), COARSE),
    "without flip in hais": (lambda: Metropolis(WithoutFlip(1.4, 0.95)), TEN_STEPS),
    "without accept step in hmc": (lambda: WithoutAcceptStep(Hamiltonian(LARGE, 0.0, MOMENTUM_SCALE)), COARSE),
    "without accept step in a random walk": (lambda: WithoutAcceptStep(RandomWalk(0.4)), COARSE),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_fails_the_test_of_the_weights(key, name):
    make, betas = BUGS[name]
    setting = targets.coarse_setting()
    log_weights = setting.forward(key, make(), betas).log_weights
    with pytest.raises(AssertionError, match="standard errors from 1"):
        assert_unbiased_weights(log_weights, float(setting.target.log_evidence))


def test_the_test_of_the_weights_is_not_fooled_by_their_spread():
    # All but one of a million weights at zero: the mean may be right, and nobody can tell.
    with pytest.raises(AssertionError, match="standard deviation"):
        assert_unbiased_weights(jnp.full(1_000_000, -jnp.inf).at[0].set(jnp.log(1e6)), 0.0)
    with pytest.raises(AssertionError, match="effective sample size"):
        assert_unbiased_weights(jnp.full(500, -jnp.inf).at[:2].set(jnp.log(250.0)), 0.0)
    assert_unbiased_weights(jnp.log(jax.random.exponential(jax.random.key(0), (1000,))), 0.0)
