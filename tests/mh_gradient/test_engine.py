"""The engine's loop, and its sum over decisions, against the plain way to write them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import mh_gradient as mh
from lehr.mh_gradient import alternatives, gradient, trace
from lehr.mh_gradient.packed_scan import scan_chains


def step(x, k, z):
    """Outputs of all kinds: one number and a few, many, flags, whole numbers, half precision, nothing."""
    x = jnp.where(z[0] > 0, x + z, -x)
    wide = jnp.arange(12.0).reshape(3, 4) * x[0]
    return x, (x, {"sum": jnp.sum(x), "up": z[0] > 0, "k": k, "ups": z > 0}, wide, x.astype(jnp.float16), None)


def by_hand(x, steps, z, axis=-1):
    of_all = jax.vmap(step, in_axes=(axis, None, axis), out_axes=axis)
    return jax.lax.scan(lambda x, of_step: of_all(x, *of_step), x, (steps, z))


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("dimension", [1, 2, 5, 20])
def test_a_row_holds_what_the_arrays_did(dimension, axis):
    """Of steps from any number on; and of positions that are too wide for it."""
    z = jnp.moveaxis(jax.random.normal(jax.random.key(0), (7, dimension, 6)), -1, axis if axis else 1)
    arguments = jnp.zeros(z.shape[1:]), jnp.arange(3, 10), z, axis
    found, expected = scan_chains(step, *arguments), by_hand(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_row_is_as_precise_as_the_numbers(x64):
    z = jax.random.normal(jax.random.key(0), (3, 2, 4))
    _, (x, *_) = scan_chains(step, jnp.zeros((2, 4)), jnp.arange(3), z, -1)
    assert x.dtype == jnp.float64
    np.testing.assert_array_equal(x, by_hand(jnp.zeros((2, 4)), jnp.arange(3), z)[1][0])


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int8])
def test_whole_numbers_in_a_row_keep_their_bits(dtype):
    """As floats they would be none, tiny, or rounded."""
    bits = np.array([-1, 1, 0, 2**24 + 1, 0x7F800001, 0x7FC00001, -(2**31), 0x807FFFFF - 2**32], np.int64)
    numbers = jnp.asarray(bits.astype(dtype)).reshape(2, 4)

    def step(x, k, z):
        return x, (z, jnp.sum(x), z + 1)

    _, found = scan_chains(step, jnp.ones(4), jnp.arange(2), numbers, -1)
    assert found[0].dtype == found[2].dtype == dtype
    np.testing.assert_array_equal(found[0], numbers)
    np.testing.assert_array_equal(found[2], numbers + 1)


def test_outputs_without_numbers():
    _, found = scan_chains(lambda x, k, z: (x, (x[:0], x)), jnp.ones((2, 4)), jnp.arange(3), jnp.zeros((3, 4)), -1)
    assert found[0].shape == (3, 0, 4)
    np.testing.assert_array_equal(found[1], np.ones((3, 2, 4)))


def test_a_loop_without_outputs():
    x, out = scan_chains(lambda x, k, z: (x + k, None), jnp.zeros(4), jnp.arange(3), jnp.zeros((3, 4)), -1)
    assert out is None
    np.testing.assert_array_equal(x, 3)


def cheap(params, row):
    return jnp.sum(params["a"] * jnp.sqrt(row)) + params["b"]


def dear(params, row):
    """The same, with a loop."""
    return jax.lax.fori_loop(0, 1, lambda _, __: cheap(params, row), jnp.zeros(()))


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("of", [cheap, dear])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
def test_the_sum_over_decisions(of, share, axis, monkeypatch):
    """Over steps in several chunks and some that are left; rows without a weight have no finite gradient."""
    monkeypatch.setattr(gradient, "_AT_ONCE", 400)
    generator = np.random.default_rng(0)
    used = generator.random((199, 5)) < share
    rows, weights = generator.random((199, 2, 5)) + 1, np.where(used, generator.normal(size=used.shape), 0)
    params = {"a": jnp.asarray([0.3, 0.7]), "b": jnp.asarray(2.0), "unused": jnp.ones((3, 2), jnp.float16)}
    filled = jnp.asarray(np.where(used[:, None], rows, -1.0), jnp.float32)
    filled = filled if axis else jnp.moveaxis(filled, -1, 1)
    found = gradient.weighted_gradient(of, params, filled, jnp.asarray(weights, jnp.float32), axis)
    expected = np.einsum("kc,kjc->j", weights, np.sqrt(rows))
    np.testing.assert_allclose(found["a"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["b"], weights.sum(), rtol=1e-4, atol=1e-5)
    assert found["unused"].dtype == jnp.float16
    np.testing.assert_array_equal(found["unused"], np.zeros((3, 2)))


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("largest_index", [gradient._LARGEST_INDEX, 10])
def test_rows_by_their_numbers(largest_index, axis, monkeypatch):
    """Also of arrays so large that a whole number of 32 bits does not count them."""
    monkeypatch.setattr(gradient, "_LARGEST_INDEX", largest_index)
    leaves = np.arange(4 * 2 * 3).reshape(4, 2, 3), np.arange(4 * 3).reshape(4, 3), None
    index = np.array([0, 1, 5, 11])
    rows = np.moveaxis(leaves[0], -1, 1)
    given = jax.tree.map(jnp.asarray, (leaves[0] if axis else rows, *leaves[1:]))
    wide, narrow, nothing = gradient.row_of(given, jnp.asarray(index), axis)
    np.testing.assert_array_equal(wide, rows.reshape(12, 2)[index])
    np.testing.assert_array_equal(narrow, index)
    assert nothing is None
    np.testing.assert_array_equal(gradient.row_of(given, jnp.asarray(5), axis)[0], wide[2])


def test_many_parameters_that_are_not_used_take_no_memory():
    """A gradient in them for each of a thousand rows would be 40 MB."""
    params = {"a": jnp.ones(2), "b": jnp.ones(()), "unused": jnp.zeros(10_000)}
    of = jax.jit(lambda *arguments: gradient.weighted_gradient(cheap, *arguments))
    memory = of.lower(params, jnp.ones((100, 2, 10)), jnp.ones((100, 10))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2e6


def test_what_is_cheap():
    """Benchmarks' normal is; loops, effects, and what cannot be looked into are not."""
    params, row = {"a": jnp.zeros(2), "b": jnp.zeros(())}, jnp.ones(2)
    like = jax.ShapeDtypeStruct((), jnp.float32)
    assert 0 < gradient.numbers_in(lambda theta, x: -jnp.sum((x - theta) ** 2) / 2, jnp.zeros(()), row) <= 20
    for unknown in (
        lambda params, row: jax.pure_callback(lambda b: b, like, params["b"]),
        lambda params, row: jax.debug.callback(lambda: None) or params["b"],
    ):
        assert gradient.numbers_in(unknown, params, row) == float("inf")
    assert gradient.numbers_in(cheap, params, row) <= 12
    assert gradient.numbers_in(jax.jit(cheap), params, row) <= 12
    assert gradient.numbers_in(dear, params, row) == float("inf")
    design = jnp.ones((500, 2))
    assert gradient.numbers_in(lambda params, row: jnp.sum(design @ row) * params["b"], params, row) >= 1000


@pytest.mark.parametrize(("loops", "searches"), [(0, False), (1, True)])
def test_only_dear_densities_are_searched_for_decisions_that_count(loops, searches, monkeypatch):
    searched = []
    over_used = gradient._over_used
    monkeypatch.setattr(gradient, "_over_used", lambda *arguments: searched.append(True) or over_used(*arguments))

    def log_density(theta, x):
        value = -jnp.sum((x - theta) ** 2) / 2
        return jax.lax.fori_loop(0, loops, lambda _, v: v, value) if loops else value

    expectation = lehr.mh_expectation(
        log_density, lambda x: x[0], mh.RandomWalk(2.38), mh.MaximalReflection(), jnp.zeros(1), num_steps=7
    )
    assert jnp.isfinite(jax.grad(expectation)(0.5, jax.random.key(0)))
    assert bool(searched) == searches


def settings(name):
    """Functions made anew: what was compiled for another layout is not taken again."""
    plain = {
        "log_density": lambda params, x: -jnp.sum((x - params) ** 2) / 2,
        "f": lambda x: x,
        "proposal": mh.RandomWalk(1.5),
        "coupling": mh.MaximalReflection(),
        "x0": jnp.zeros(2),
    }
    return (
        plain
        | {
            "plain": {},
            "slots": {"num_alternatives": 3, "has_aux": True},
            "pairs": {"f": lambda p, x, x_new: {"a": x * x_new * p, "b": x_new[0] ** 2}, "consecutive": True},
            "along paths": {"proposal": lambda params: mh.MALA(jnp.exp(params)), "f": lambda x: jnp.sum(x**3)},
            "spins": {
                "log_density": lambda params, x: params * jnp.sum(x * jnp.roll(x, 1)),
                "f": lambda x: x[0] * x[2],
                "proposal": mh.HeatBath.checkerboard(4),
                "coupling": mh.MonotoneSpin(),
                "x0": jnp.ones(4),
            },
        }[name]
    )


@pytest.mark.filterwarnings("ignore:.*the alternative has not met")
@pytest.mark.parametrize("name", ["plain", "slots", "pairs", "along paths", "spins"])
def test_chains_on_either_axis(name, monkeypatch):
    """The same numbers, over several groups of steps and some that are left."""
    monkeypatch.setattr(alternatives, "_NUMBERS", 1)

    def found():
        expectation = lehr.mh_expectation(**settings(name), num_steps=211, burn_in=10, num_chains=3)
        return jax.jacrev(expectation, has_aux=name == "slots")(0.3, jax.random.key(0))

    assert trace.chains_axis(2) == -1
    last = found()
    monkeypatch.setattr(trace, "_FEW_DIMENSIONS", 0)
    assert trace.chains_axis(2) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found(), last)
