"""The gradient through a chain is the same however little it keeps, and keeps as little as it says."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import (
    Annealer,
    Hamiltonian,
    InputError,
    Langevin,
    Metropolis,
    RandomWalk,
    Reversible,
    Schedule,
    objectives,
    reversible_chain,
    whole_numbers,
)
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


@pytest.fixture
def no_way_out(monkeypatch):
    """The chain in floats, which takes the place of one that did not come back, gives NaN."""

    def nothing(chains, keys, inputs):
        return jnp.nan * inputs.x, jnp.nan * jnp.sum(inputs.x, axis=1)

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


@pytest.mark.parametrize(
    "make", [lambda: Langevin(0.2), lambda: RandomWalk(0.1), lambda: Hamiltonian(0.1, 0.5, 1.2, 2)]
)
def test_other_kernels_can_be_checkpointed(x64, key, make):
    setting = parts("funnel", make(), num_steps=23)
    stored, checkpointed = (value_and_gradient(setting, key, memory) for memory in ("store", "checkpoint"))
    # A random walk does not see the path.
    without = ["[0].schedule.logits"] if isinstance(setting[0].kernel, RandomWalk) else []
    assert_same(stored[1], checkpointed[1], 1e-10, without=without)


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


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["gaussian", "funnel", "banana"])
def test_reconstruction_is_exact_in_a_training_loop_under_vmap(key, no_way_out, name, wide):
    with jax.enable_x64(wide):
        annealer, target = parts(name, dim=5)
        trained, rest = eqx.partition((annealer, target), eqx.is_inexact_array)

        def loss(trained, key):
            annealer, target = eqx.combine(trained, rest)

            # `shift` is closed over by the user's function.
            def bound(key, shift):
                return objectives.davi(annealer, lambda x: target(x - shift), key, num_particles=2, memory="reversible")

            keys = jax.random.split(key, 2)
            return -jnp.mean(jax.vmap(bound)(keys, trained[1].scale[:2]))

        @jax.jit
        def train(trained):
            def step(trained, key):
                value, gradient = jax.value_and_grad(loss)(trained, key)
                return jax.tree.map(lambda a, b: a - 1e-3 * b, trained, gradient), value

            return jax.lax.scan(step, trained, jax.random.split(key, 5))

        _, losses = train(trained)
        # Any wrong bit in any particle would have made all of it NaN.
        assert np.all(np.isfinite(losses))


def test_other_objectives_take_it_too(x64, key, no_way_out):
    setting = parts("funnel")
    for objective in (objectives.davi_stl, objectives.davi_dreg):
        stored, back = (value_and_gradient(setting, key, m, objective=objective) for m in ("store", "reversible"))
        assert_same(stored[1], back[1], 1e-9)


@pytest.mark.parametrize("persistence", [0.1, 0.5, 0.9, 0.99])
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
    assert errors.max() < 200
    assert 16 * len(empty) / num_steps < np.log2(1 / persistence) * 1.02 + 16 / num_steps


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
