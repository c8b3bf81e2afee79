"""The number of gradients and of density values is asserted, not hoped for: it is what the papers count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import Hamiltonian, Langevin, Metropolis, RandomWalk, Schedule
from tests import targets

NUM_PARTICLES, NUM_STEPS = 2, 5


def log_target(x):
    return -jnp.sum((x - 1) ** 2)


class Counted:
    """A log density that counts, while the compiled program runs, its values and its gradients."""

    def __init__(self, log_density):
        self.values = self.gradients = 0

        @jax.custom_vjp
        def counted(x):
            # `x` is passed so that `vmap` calls back once for each particle.
            jax.debug.callback(self._count_value, x)
            return log_density(x)

        def forward(x):
            jax.debug.callback(self._count_gradient, x)
            return log_density(x), x

        counted.defvjp(forward, lambda x, g: (g * jax.grad(log_density)(x),))
        self.log_prob = counted

    def _count_value(self, x):
        self.values += 1

    def _count_gradient(self, x):
        self.gradients += 1

    @property
    def per_particle(self):
        jax.effects_barrier()
        return {"values": self.values / NUM_PARTICLES, "gradients": self.gradients / NUM_PARTICLES}


class CountedBase(Counted):
    def __init__(self, base):
        super().__init__(base.log_prob)
        self.sample = base.sample


CASES = {
    # DAIS: one gradient per leapfrog, and two log-density values in all, one of the target and one of the base.
    "dais": (lambda: Hamiltonian(0.3), {"values": 1, "gradients": NUM_STEPS}),
    "dais with persistence": (lambda: Hamiltonian(0.3, 0.9), {"values": 1, "gradients": NUM_STEPS}),
    "three leapfrogs": (lambda: Hamiltonian(0.3, num_leapfrog=3), {"values": 1, "gradients": 3 * NUM_STEPS}),
    "langevin": (lambda: Langevin(0.3), {"values": 0, "gradients": NUM_STEPS + 1}),
    "random walk": (lambda: RandomWalk(0.3), {"values": NUM_STEPS + 1, "gradients": 0}),
    # Corrected: the first point, then the work of the move; the values come in the same pass as the gradients.
    "hmc": (lambda: Metropolis(Hamiltonian(0.3)), {"values": 0, "gradients": NUM_STEPS + 1}),
    "hais with three leapfrogs": (
        lambda: Metropolis(Hamiltonian(0.3, 0.9, num_leapfrog=3)),
        {"values": 0, "gradients": 3 * NUM_STEPS + 1},
    ),
    "mala": (lambda: Metropolis(Langevin(0.3)), {"values": 0, "gradients": NUM_STEPS + 1}),
    "random-walk metropolis": (lambda: Metropolis(RandomWalk(0.3)), {"values": NUM_STEPS + 1, "gradients": 0}),
}


@pytest.mark.parametrize(
    ("name", "direction"),
    [(name, "forward") for name in CASES]
    + [(name, "reverse") for name in ("dais", "langevin", "hais with three leapfrogs", "random-walk metropolis")],
)
def test_work_of_annealing(key, name, direction):
    make, expected = CASES[name]
    base, target = CountedBase(targets.base_2d()), Counted(log_target)
    annealer = lehr.Annealer(base, Schedule.linear(NUM_STEPS), make())
    if direction == "forward":
        run = functools.partial(lehr.anneal, num_particles=NUM_PARTICLES)
    else:
        run = functools.partial(lehr.anneal_reverse, samples=jnp.zeros((NUM_PARTICLES, 2)))
    result = run(key, annealer, target.log_prob)
    assert np.all(np.isfinite(result.log_weights))
    # The base is evaluated wherever the target is.
    assert target.per_particle == expected
    assert base.per_particle == expected


def test_work_of_the_objectives(key):
    base, target = CountedBase(targets.base_2d()), Counted(log_target)
    lehr.objectives.iwae(base, target.log_prob, key, num_samples=NUM_PARTICLES)
    assert target.per_particle == base.per_particle == {"values": 1, "gradients": 0}
    base, target = CountedBase(targets.base_2d()), Counted(log_target)
    annealer = lehr.Annealer(base, Schedule.linear(NUM_STEPS), Hamiltonian(0.3, 0.5))
    lehr.objectives.davi(annealer, target.log_prob, key, num_particles=NUM_PARTICLES)
    assert target.per_particle == base.per_particle == {"values": 1, "gradients": NUM_STEPS}


@pytest.mark.parametrize("num_leapfrog", [1, 2])
def test_tuning_counts_its_gradients(num_leapfrog):
    density = Counted(log_target)
    start = lehr.Annealer(targets.base_2d(), Schedule.linear(2), Hamiltonian(0.1, num_leapfrog=num_leapfrog))
    _, gradients = lehr.tune(jax.random.key(0), start, density.log_prob, num_particles=8)
    jax.effects_barrier()
    assert density.gradients == gradients
