"""Runs independent populations along one tuned path, forwards and back, and counts their gradients."""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lehr.annealer import Annealer
from lehr.annealing import anneal_reverse
from lehr.fitting import Fitted
from lehr.path import LogDensity
from lehr.smc import Population, smc, systematic
from lehr.tuned_path import TunedPath

#: the error from the spread of fewer populations is not to be relied on
FEWEST_TO_JUDGE = 16
#: independent populations that run together on a device, so that matrix products are large
_TOGETHER = 4


class Engine:
    """Runs blocks of independent populations along one tuned path, and counts gradients."""

    def __init__(self, fitted: Fitted, num_particles: int, batch_size: int | None, max_gradients: int):
        self.fitted, self.candidate, self.max_gradients = fitted, fitted.best, max_gradients
        self.problem = self.candidate.problem
        self.spent = fitted.num_gradients
        self.path = TunedPath.from_pilot(self.candidate.run)
        devices = jax.local_devices()
        self.num_together = _TOGETHER * len(devices)
        if batch_size is not None:
            num_particles = min(num_particles, batch_size)
            self.num_together = min(self.num_together, max(1, batch_size // num_particles))
        # A small budget is better spent on few particles in enough populations than the other way round; then on a
        # short path.
        while self.path.num_steps > 8 and not self._suffices(num_particles):
            if num_particles > 16:
                num_particles //= 2
            else:
                self.path = TunedPath.from_pilot(self.candidate.run, max_steps=max(8, self.path.num_steps // 2))
        self.num_particles = num_particles
        self.sharding = None
        if self.num_together % len(devices) == 0 and len(devices) > 1:
            mesh = jax.sharding.Mesh(np.array(devices), ("populations",))
            self.sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("populations"))

    def _suffices(self, num_particles: int) -> bool:
        block = self.num_together * num_particles * self.path.num_gradients
        return self.max_gradients - self.spent >= self._fewest_blocks * block

    @property
    def _fewest_blocks(self) -> int:
        """Two to tune, and forwards and back as many populations as it takes to tell the error."""
        return 2 + 2 * FEWEST_TO_JUDGE // self.num_together

    @property
    def enough(self) -> int:
        """Gradients for that, with those spent on the base."""
        return self.fitted.num_gradients + self._fewest_blocks * self.cost

    @property
    def cost(self) -> int:
        """Gradients of a block in one direction."""
        return self.num_together * self.num_particles * self.path.num_gradients

    @property
    def annealer(self) -> Annealer:
        return self.path.annealer(self.problem.base, self.problem.position.dtype)

    def tune(self, key: PRNGKeyArray) -> None:
        """Two blocks whose statistics, not estimates, are used."""
        for i in range(2):
            if self.spent + 3 * self.cost > self.max_gradients:
                return
            self.path = self.path.after(self.forward(jax.random.fold_in(key, i)).path)

    def forward(self, key: PRNGKeyArray) -> Population:
        self.spent += self.cost
        return _forward(self.keys(key), self.annealer, self.problem.log_target, self.num_particles)

    def backward(self, key: PRNGKeyArray, positions: Array, log_weights: Array) -> Array:
        self.spent += self.cost
        return _backward(self.keys(key), self.annealer, self.problem.log_target, positions, log_weights)

    def keys(self, key: PRNGKeyArray) -> Array:
        keys = jax.random.split(key, self.num_together)
        return keys if self.sharding is None else jax.device_put(keys, self.sharding)


@eqx.filter_jit
def _forward(keys: Array, annealer: Annealer, log_target: LogDensity, num_particles: int) -> Population:
    return jax.vmap(lambda key: smc(key, annealer, log_target, num_particles))(keys)


@eqx.filter_jit
def _backward(keys: Array, annealer: Annealer, log_target: LogDensity, positions: Array, log_weights: Array) -> Array:
    """Minus the log estimate of 1/Z by each population's weighted positions."""

    def one(key, positions, log_weights):
        key_draw, key_run = jax.random.split(key)
        draws = positions[systematic(key_draw, jax.nn.softmax(log_weights))]
        return -anneal_reverse(key_run, annealer, log_target, draws).log_evidence

    return jax.vmap(one)(keys, positions, log_weights)
