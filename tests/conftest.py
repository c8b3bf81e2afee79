"""What every test shares: runtime checks of shapes and types, one settable seed, and the choice of slow tests."""

import os
import zlib
from importlib.metadata import version

# The tests compile much and run little: unoptimised code compiles in half the time, and by the older emitters, one
# object file a function, in half of that. A flag that XLA does not know ends the process, so that these two are left to
# the versions they were tried with.
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1",
    )
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest
from jaxtyping import install_import_hook

from tests.statistics import SEED

# Before anything imports lehr: every annotated shape is checked at run time in the tests.
install_import_hook("lehr", "beartype.beartype")


@pytest.fixture
def key(request):
    """A key of its own for each test; LEHR_TEST_SEED changes them all."""
    return jax.random.fold_in(jax.random.key(SEED), zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def x64():
    """Float64 for the test: finite differences and Jacobians need it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What a file has compiled is dropped after it: a process may have 65,530 memory maps, and all files take more."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(config, items):
    if "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
