"""The gradient through a chain is the same however little it keeps, and keeps as little as it says."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.distributions import StandardNormal
from flowjax.flows import coupling_flow

import lehr
from lehr import (
    Annealer,
    Hamiltonian,
    InputError,
    Langevin,
    LearnedReverse,
    Metropolis,
    RandomWalk,
    Reversible,
    Schedule,
    objectives,
    reversible_chain,
    whole_numbers,
)
from lehr.kernels import network_drift
from lehr.reversible import memory_of

NUM_STEPS = 130  # more than one group of steps, and some left


class Elementwise(eqx.Module):
    """Densities of few cheap operations, which a compiler fuses with their neighbours: rounding then differs most."""

    scale: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        if self.name == "gaussian":
            return -jnp.sum(((x - 0.3) / self.scale) ** 2) / 2
        if self.name == "linear":
            return 1e4 * jnp.sum(x * self.scale)
        if self.name == "funnel":
            return -(x[0] ** 2) / 4 - jnp.sum(x[1:] ** 2 * jnp.exp(-x[0] / self.scale[1:]) + x[0] / self.scale[1:]) / 2
        return -jnp.sum(x**2 / self.scale) / 2 - jnp.sum((x[1:] - x[:-1] ** 2 / 3) ** 2)


def scale(dim):
    return jnp.linspace(0.8, 1.7, dim)


class Normal(eqx.Module):
    loc: jax.Array
    log_scale: jax.Array

    def sample(self, key, shape=()):
        return self.loc + jnp.exp(self.log_scale) * jax.random.normal(key, (*shape, *self.loc.shape), self.loc.dtype)

    def log_prob(self, x):
        return -jnp.sum(((x - self.loc) * jnp.exp(-self.log_scale)) ** 2 / 2 + self.log_scale)


def parts(name="gaussian", kernel=None, dim=3, num_steps=NUM_STEPS):
    base = Normal(jnp.linspace(-0.5, 0.5, dim), jnp.linspace(-0.2, 0.2, dim))
    schedule = Schedule(jnp.linspace(-0.5, 0.5, num_steps))
    return Annealer(base, schedule, Hamiltonian(0.1, 0.9) if kernel is None else kernel), Elementwise(scale(dim), name)


def value_and_gradient(parts, key, memory, num_particles=3, objective=objectives.davi):
    trained, rest = eqx.partition(parts, eqx.is_inexact_array)

    @jax.jit
    @jax.value_and_grad
    def bound(trained):
        return objective(*eqx.combine(trained, rest), key, num_particles=num_particles, memory=memory)

    return bound(trained)


def assert_same(a, b, rtol, *, without=()):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        error, size = np.linalg.norm(np.asarray(x - y)), np.linalg.norm(np.asarray(x))
        if jax.tree_util.keystr(path) in without:
            continue
        assert size > 0, f"nothing is tested: the gradient in {jax.tree_util.keystr(path)} is zero"
        assert error <= rtol * size, f"{jax.tree_util.keystr(path)}: off by {error / size:.1e} of it"


def nothing(chains, keys, inputs):
    return jnp.nan * inputs.x, jnp.nan * jnp.sum(inputs.x, axis=1)


@pytest.fixture
def no_way_out(monkeypatch):
    """The chain in floats, which takes the place of one that did not come back, gives NaN."""
    jax.clear_caches()
    monkeypatch.setattr(reversible_chain, "_in_floats", nothing)
    yield
    jax.clear_caches()


# Three modes, one gradient.

KERNELS = {
    "by dimension": lambda: Hamiltonian(np.array([0.1, 0.07, 0.12]), 0.95, np.array([1.0, 0.8, 1.3])),
    "by step": lambda: Hamiltonian(
        np.linspace(0.05, 0.15, NUM_STEPS)[:, None], np.where(np.arange(NUM_STEPS) % 2, 0.5, 0.95)[:, None]
    ),
    "by step and dimension": lambda: Hamiltonian(
        np.linspace(0.05, 0.15, 3 * NUM_STEPS).reshape(NUM_STEPS, 3), 0.9, np.array([1.0, 0.8, 1.3])
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_all_modes_have_the_same_gradient(x64, key, no_way_out, name):
    setting = parts("banana", KERNELS[name]())
    expected = value_and_gradient(setting, key, "store")
    for memory in ("checkpoint", Reversible(0.6)):
        found = value_and_gradient(setting, key, memory)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-10)
        assert_same(expected[1], found[1], 1e-9)


def learned_reverse():
    drift = network_drift(jax.random.key(0), 3, momentum=True, width=4)
    # It begins at zero, where most of its parameters have no gradient.
    return LearnedReverse(
        Hamiltonian(0.1, 0.9), jax.tree.map(lambda a: a + 0.1 if eqx.is_inexact_array(a) else a, drift)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Langevin(0.2),
        lambda: RandomWalk(0.1),
        lambda: Hamiltonian(0.1, 0.5, 1.2, 2),
        lambda: Hamiltonian(0.1),
        learned_reverse,
    ],
    ids=["langevin", "random walk", "two leapfrogs", "fresh momentum", "learned reverse"],
)
def test_other_kernels_can_be_checkpointed(x64, key, make):
    setting = parts("funnel", make(), num_steps=23)
    stored, checkpointed = (value_and_gradient(setting, key, memory) for memory in ("store", "checkpoint"))
    # A random walk does not see the path.
    without = ["[0].schedule.logits"] if isinstance(setting[0].kernel, RandomWalk) else []
    assert_same(stored[1], checkpointed[1], 1e-10, without=without)


def test_a_flow_for_a_base(x64, key, no_way_out):
    flow = coupling_flow(jax.random.key(1), base_dist=StandardNormal((3,)), flow_layers=1, nn_width=4, nn_depth=1)
    setting = Annealer(flow, Schedule.linear(6), Hamiltonian(0.1, 0.9)), Elementwise(scale(3), "banana")
    expected, found = (value_and_gradient(setting, key, memory) for memory in ("store", "reversible"))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-10)
    expected, found = (jax.flatten_util.ravel_pytree(gradient)[0] for _, gradient in (expected, found))
    assert np.linalg.norm(found - expected) < 1e-9 * np.linalg.norm(expected)


class Around(eqx.Module):
    """A Gaussian at any place, of any scale."""

    loc: jax.Array
    log_scale: jax.Array

    def __call__(self, x):
        return -jnp.sum(((x - jax.lax.stop_gradient(self.loc)) * jnp.exp(-self.log_scale)) ** 2 / 2 + self.log_scale)


SCALES = {
    "1e-6": ((0.0, 0.0), (1e-6, 1e-6)),
    "1e-8": ((0.0, 0.0), (1e-8, 1e-8)),
    "1e8": ((0.0, 0.0), (1e8, 1e8)),
    "1e5 and 0.1": ((1e5, 0.0), (1e4, 0.1)),
    "1e-6 and 1e6": ((0.0, 1e6), (1e-6, 1e6)),
}


@pytest.mark.parametrize("num_particles", [1, 50])
def test_positions_of_any_scale(key, no_way_out, num_particles):
    def setting(loc, scale):
        kernel = Hamiltonian(0.5 * scale, 0.9)
        return Annealer(Normal(loc, jnp.log(scale)), Schedule.linear(20), kernel), Around(loc, jnp.log(0.8 * scale))

    @jax.jit
    def both(loc, scale):
        trained = setting(loc, scale)
        return [value_and_gradient(trained, key, memory, num_particles) for memory in ("store", "reversible")]

    for name, place in SCALES.items():
        loc, scale = (jnp.asarray(a, jnp.float32) for a in place)
        (value, (annealer, target)), (found_value, (found_annealer, found_target)) = both(loc, scale)
        np.testing.assert_allclose(found_value, value, atol=2e-5, err_msg=name)
        # A gradient in a logarithm or logit has no unit; that in a location is taken in units of the scale.
        pairs = (
            (annealer.kernel.log_step_size, found_annealer.kernel.log_step_size),
            (annealer.kernel.logit_persistence, found_annealer.kernel.logit_persistence),
            (annealer.schedule.logits, found_annealer.schedule.logits),
            (annealer.base.log_scale, found_annealer.base.log_scale),
            (annealer.base.loc * scale, found_annealer.base.loc * scale),
            (target.log_scale, found_target.log_scale),
        )
        for expected, found in pairs:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4, err_msg=name)


def test_forward_mode(x64, key):
    setting = parts("funnel", num_steps=23)
    for memory in ("store", "checkpoint"):
        value, slope = jax.jvp(
            lambda target: objectives.davi(setting[0], target, key, memory=memory),  # noqa: B023
            (setting[1],),
            (jax.tree.map(jnp.ones_like, setting[1]),),
        )
        expected_value, gradient = value_and_gradient(setting, key, memory, num_particles=1)
        np.testing.assert_allclose((value, slope), (expected_value, jnp.sum(gradient[1].scale)), rtol=1e-10)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(
            lambda scale: objectives.davi(setting[0], Elementwise(scale, "funnel"), key, memory="reversible"),
            (scale(3),),
            (scale(3),),
        )


def test_gradients_for_each_key_are_not_their_sum(x64, key):
    # A rule that sums over the rows of a `vmap` by itself is right for the gradient of a sum, and wrong here.
    setting = parts("banana", num_steps=23)
    trained, rest = eqx.partition(setting, eqx.is_inexact_array)
    for memory in ("checkpoint", "reversible"):

        def bound(trained, key):
            return objectives.davi(*eqx.combine(trained, rest), key, num_particles=2, memory=memory)  # noqa: B023

        keys = jax.random.split(key, 3)
        gradients = jax.jit(jax.vmap(jax.grad(bound), (None, 0)))(trained, keys)
        one = jax.jit(jax.grad(bound))
        for i in range(3):
            assert_same(one(trained, keys[i]), jax.tree.map(lambda leaf: leaf[i], gradients), 1e-9)  # noqa: B023


def test_adjoints_of_what_is_shared_are_not_held_for_each_row():
    weights, rows = jnp.ones((100, 100)) / 100, 200

    def bound(weights, memory):
        def one(key):
            annealer = parts(dim=100, num_steps=3)[0]
            return objectives.davi(annealer, lambda x: -jnp.sum((weights @ x) ** 2), key, memory=memory)

        return jnp.mean(jax.vmap(one)(jax.random.split(jax.random.key(0), rows)))

    for memory in ("store", "checkpoint"):
        compiled = jax.jit(jax.grad(bound), static_argnums=1).lower(weights, memory).compile()
        # A matrix for each row would be 8e6 bytes; a state of all rows is 8e4.
        assert compiled.memory_analysis().temp_size_in_bytes < 4e6


# Whole numbers come back.


def gradients_of_training(key, name, memory):
    """Values and gradients of five steps of training, with the bound under `vmap`."""
    annealer, target = parts(name, dim=5)
    trained, rest = eqx.partition((annealer, target), eqx.is_inexact_array)

    def loss(trained, key):
        annealer, target = eqx.combine(trained, rest)

        # `shift` is closed over by the user's function.
        def bound(key, shift):
            return objectives.davi(annealer, lambda x: target(x - shift), key, num_particles=2, memory=memory)

        keys = jax.random.split(key, 2)
        return -jnp.mean(jax.vmap(bound)(keys, trained[1].scale[:2]))

    @jax.jit
    def train(trained):
        def step(trained, key):
            found = jax.value_and_grad(loss)(trained, key)
            # The persistence stays 0.9: others are rounded, and rounding them changes more than what is compared.
            change = eqx.tree_at(lambda parts: parts[0].kernel.logit_persistence, found[1], replace_fn=jnp.zeros_like)
            return jax.tree.map(lambda a, b: a - 1e-3 * b, trained, change), found

        return jax.lax.scan(step, trained, jax.random.split(key, 5))[1]

    return train(trained)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["gaussian", "funnel", "banana"])
def test_reconstruction_is_exact_in_a_training_loop_under_vmap(key, no_way_out, name, wide):
    with jax.enable_x64(wide):
        found = gradients_of_training(key, name, "reversible")
        # Any wrong bit in any particle would have made all of it NaN.
        assert np.all(np.isfinite(found[0]))
        if not wide:
            expected = gradients_of_training(key, name, "store")
            np.testing.assert_allclose(found[0], expected[0], rtol=5e-5, atol=5e-5)
            assert_same(expected[1], found[1], 5e-5)


IN_A_PROCESS = """
import jax, numpy as np
from tests import test_memory
test_memory.reversible_chain._in_floats = test_memory.nothing
values, _ = test_memory.gradients_of_training(jax.random.key(0), "funnel", "reversible")
assert np.all(np.isfinite(values)), values
"""


def test_reconstruction_is_exact_in_optimised_code():
    # What is fused, and so how it rounds, depends on how far a compiler optimises: elsewhere in the tests it does not.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", IN_A_PROCESS], env=environment, check=True)


def test_other_objectives_take_it_too(x64, key, no_way_out):
    setting = parts("funnel")
    for objective in (objectives.davi_stl, objectives.davi_dreg):
        stored, back = (value_and_gradient(setting, key, m, objective=objective) for m in ("store", "reversible"))
        assert_same(stored[1], back[1], 1e-9)


def test_a_target_that_closes_over_what_is_trained(x64, key, no_way_out):
    annealer, target = parts("banana", num_steps=6)

    @jax.jit
    @jax.grad
    def gradients(scale):
        def closed(x):
            return Elementwise(scale, "banana")(x)

        # A module too: both are differentiated, each once.
        mixed = jax.tree_util.Partial(lambda half, x: half(x) / 2 + closed(x) / 2, Elementwise(scale, "banana"))
        return objectives.davi(annealer, closed, key, num_particles=3, memory="store") - objectives.davi_dreg(
            annealer, mixed, key, num_particles=3, memory="reversible"
        )

    np.testing.assert_allclose(gradients(target.scale), 0, atol=1e-10)


def test_arrays_of_no_size(x64, key, no_way_out):
    annealer = parts(num_steps=6)[0]
    target = jax.tree_util.Partial(lambda empty, x: jnp.sum(empty) - jnp.sum(x**2), jnp.zeros((0, 2)))
    stored, back = (
        value_and_gradient((annealer, target), key, memory)[1][0].kernel for memory in ("store", "reversible")
    )
    assert_same(stored, back, 1e-9)


@pytest.mark.parametrize("persistence", [0.001, 0.1, 0.5, 0.9, 0.99, 0.995, 0.999])
def test_a_product_with_a_fraction_comes_back(persistence):
    num_steps, rng = 2000, np.random.default_rng(0)
    fraction = whole_numbers.nearest_fraction(jnp.asarray(persistence), jnp.int32)
    np.testing.assert_allclose(fraction.value(jnp.float32), persistence, rtol=1e-6)
    num_rows = whole_numbers.rows_of_buffer(num_steps, persistence)
    plan = whole_numbers.plan(lambda k: fraction, num_steps, num_rows)
    assert not plan.overflows
    start = jnp.asarray(rng.integers(-(2**29), 2**29, 50), jnp.int32)
    noise = jnp.asarray(rng.integers(-(2**24), 2**24, (num_steps, 50)), jnp.int32)

    def forwards(carry, inputs):
        u, head, buffer = carry
        push, row, noise = inputs
        buffer, head = whole_numbers.push(buffer, head, push, row)
        product, head = whole_numbers.multiply(u, head, fraction)
        return (product + noise, head, buffer), jnp.max(jnp.abs(product - u * persistence))

    def backwards(carry, inputs):
        u, head, buffer = carry
        push, row, noise = inputs
        u, head = whole_numbers.divide(u - noise, head, fraction)
        return (u, whole_numbers.pop(buffer, head, push, row), buffer), None

    empty = whole_numbers.empty_buffer(num_rows, (50,))
    steps = (plan.push, plan.row, noise)
    end, errors = jax.lax.scan(forwards, (start, jnp.zeros(50, jnp.uint32), empty), steps)
    u, head, _ = jax.lax.scan(backwards, end, steps, reverse=True)[0]
    np.testing.assert_array_equal(u, start)
    np.testing.assert_array_equal(head, 0)
    # In units of 2^-24; float32 itself rounds u * persistence at some 20 of them.
    assert errors.max() < 100 + fraction.n
    assert 16 * len(empty) / num_steps < np.log2(1 / persistence) * 1.02 + 16 / num_steps


@pytest.mark.parametrize("smallest", [0.01, 0.5, 0.89, 0.985])
def test_the_buffer_suffices_for_every_persistence_above(smallest):
    gammas = jnp.linspace(smallest, 0.999, 30)
    fractions, num_steps = whole_numbers.nearest_fraction(gammas, jnp.int32), 3000
    rows = whole_numbers.rows_of_buffer(num_steps, smallest)
    pushes = jax.jit(jax.vmap(lambda fraction: jnp.sum(whole_numbers.plan(lambda k: fraction, num_steps, rows).push)))(
        fractions
    )
    assert rows - 2 <= max(pushes) <= rows
    off = np.abs(fractions.value(jnp.float32) - gammas) / np.minimum(gammas, 1 - gammas)
    assert np.max(off) < 1 / 127


def test_bits_kept_per_parameter_and_step():
    for num_steps in (100, 1000, 10_000):
        shape = whole_numbers.empty_buffer(
            whole_numbers.rows_of_buffer(num_steps, Reversible().smallest_persistence), (4, 7)
        ).shape
        assert 16 * shape[0] / num_steps <= 0.17


# What cannot be reconstructed is not believed.


FAULTS = ["out of range", "buffer too small", "a wrong head", "a wrong end"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_chain_that_does_not_come_back_is_replaced(x64, key, monkeypatch, fault):
    jax.clear_caches()
    setting, memory = parts("banana"), Reversible(0.89)
    if fault == "out of range":
        # Momenta reach 1024 in float64.
        setting = parts("linear")
    elif fault == "buffer too small":
        setting, memory = parts("banana", Hamiltonian(0.1, 0.5)), Reversible(0.999)
    elif fault == "a wrong head":
        pop = whole_numbers.pop
        monkeypatch.setattr(whole_numbers, "pop", lambda *args: pop(*args) ^ jnp.uint32(1))
    else:
        divide = whole_numbers.divide
        monkeypatch.setattr(whole_numbers, "divide", lambda u, *args: divide(u + 1, *args))
    if fault == "out of range":
        # The value too: a number that left its range has wrapped.
        expected, found = value_and_gradient(setting, key, "store"), value_and_gradient(setting, key, memory)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-9)
        assert_same(expected[1], found[1], 1e-9)
    else:
        # All that the way out says is taken, and nothing else.
        monkeypatch.setattr(reversible_chain, "_in_floats", lambda chains, keys, inputs: (inputs.x, 7 * inputs.x[:, 0]))
        gradient = value_and_gradient(setting, key, memory)[1]
        np.testing.assert_array_equal(gradient[0].kernel.log_step_size, 0)
        assert abs(gradient[0].base.loc[0]) > 1
    jax.clear_caches()


# Nor a rounding that changes the chain.


def test_steps_too_small_for_the_grid_are_taken_in_floats(key, monkeypatch):
    # The grid must reach as far as the longest step, 0.3, and the shortest is 1e-5: a few units.
    setting = parts("gaussian", Hamiltonian(np.geomspace(0.3, 1e-5, 20)[:, None], 0.9), num_steps=20)
    expected, found = (value_and_gradient(setting, key, memory) for memory in ("store", "reversible"))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert_same(expected[1], found[1], 1e-4)
    jax.clear_caches()
    monkeypatch.setattr(reversible_chain, "_in_floats", nothing)
    assert np.isnan(objectives.davi(*setting, key, memory="reversible")), "the chain in floats was not taken"
    jax.clear_caches()


def test_persistence_near_an_end(x64, key, monkeypatch):
    def every_one(memory, transform=jax.value_and_grad):
        @jax.jit
        @transform
        def bound(persistence):
            # Traced: it has no value to look at.
            annealer, target = parts("banana", Hamiltonian(0.1, persistence), num_steps=40)
            return objectives.davi(annealer, target, key, num_particles=3, memory=memory)

        return {persistence: bound(persistence) for persistence in (0.002, 0.999, 5e-4, 0.9999)}

    expected, found = every_one("store"), every_one(Reversible(0.002))
    for persistence in expected:
        np.testing.assert_allclose(found[persistence], expected[persistence], rtol=1e-8, err_msg=str(persistence))
    jax.clear_caches()
    monkeypatch.setattr(reversible_chain, "_in_floats", nothing)
    values = every_one(Reversible(0.002), transform=lambda bound: bound)
    taken = {persistence: bool(np.isnan(value)) for persistence, value in values.items()}
    assert taken == {0.002: False, 0.999: False, 5e-4: True, 0.9999: True}
    for persistence in (5e-4, 0.9999):
        with pytest.raises(InputError, match=f"needs a persistence from 1/1024 to 1023/1024, but it is {persistence}"):
            objectives.davi(*parts("banana", Hamiltonian(0.1, persistence)), key, memory="reversible")
    jax.clear_caches()


# Memory.


def test_compiled_memory():
    setting, size = parts("gaussian", dim=200, num_steps=4000), {}
    trained, rest = eqx.partition(setting, eqx.is_inexact_array)

    def bound(trained, key, memory):
        return objectives.davi(*eqx.combine(trained, rest), key, num_particles=2, memory=memory)

    for memory in ("store", "checkpoint", "reversible"):
        compiled = jax.jit(jax.grad(bound), static_argnums=2).lower(trained, jax.random.key(0), memory).compile()
        size[memory] = compiled.memory_analysis().temp_size_in_bytes
    assert size["checkpoint"] < size["store"] / 10
    assert size["reversible"] < size["store"] / 10


# What is refused.


def test_what_is_refused(key):
    def run(kernel, memory):
        return objectives.davi(*parts("gaussian", kernel, num_steps=3), key, memory=memory)

    # The runtime type checks of the tests may complain first.
    with pytest.raises((InputError, TypeError), match="memory"):
        run(Hamiltonian(0.1, 0.9), "less")
    with pytest.raises(InputError, match='memory must be "store", "checkpoint" or "reversible", but it is \'less\''):
        memory_of("less", Hamiltonian(0.1, 0.9))
    for kernel, message in (
        (Langevin(0.1), 'needs a lehr.Hamiltonian, not a Langevin: use memory="checkpoint"'),
        (Hamiltonian(0.1), "needs a persistence above 0"),
        (Hamiltonian(0.1, 0.9, num_leapfrog=2), "needs num_leapfrog=1, but it is 2"),
    ):
        with pytest.raises(InputError, match=message):
            run(kernel, "reversible")
    with pytest.raises(InputError, match="smallest_persistence must be inside"):
        Reversible(1.0)
    # Exact kernels have no gradient to keep anything for.
    annealer, target = parts("gaussian", Metropolis(Hamiltonian(0.1)), num_steps=3)
    assert np.isfinite(lehr.anneal(key, annealer, target, 2, memory="reversible").log_evidence)
