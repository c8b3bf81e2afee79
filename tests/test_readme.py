"""The README runs: its Python block as it stands, and its commands at least parse."""

import math
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr import cli, linear_regression, mh_gradient, objectives

README = (Path(__file__).parents[1] / "README.md").read_text()
GRADIENT_NOISE = (Path(__file__).parents[1] / "docs" / "gradient-noise.md").read_text()
MH_GRADIENTS = (Path(__file__).parents[1] / "docs" / "mh-gradients.md").read_text()
TRAINING = (Path(__file__).parents[1] / "docs" / "training.md").read_text()


def test_python_blocks_run_and_print_the_truth_that_they_state(capsys):
    block = "".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    truth = float(re.search(r"= log\(pi\) = (\d\.\d+)|log\(pi\) = (\d\.\d+)", block).group(2))
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    estimate, error = map(float, re.search(r"log Z = (\S+) \+- (\S+)", printed).groups())
    assert 0 < error < 0.1
    assert abs(estimate - truth) < 5 * error
    bound = float(re.search(r"after training: (\S+)", printed).group(1))
    found, error = map(float, re.search(r"log evidence +(\S+) ± (\S+)", printed).groups())
    # The target is Gaussian, so that a fitted base is exact, to float error.
    assert abs(found - truth) < 5 * error + 1e-3
    # One noisy draw of a lower bound that training has brought near: before it, it is below zero.
    assert truth - 0.7 < bound < truth + 0.7


def test_the_block_of_the_page_on_training_runs_and_prints_the_truth_that_it_states(capsys):
    block = "".join(re.findall(r"```python\n(.*?)```", TRAINING, flags=re.DOTALL))
    truth = float(re.search(r"log\(2 pi 0.3\) = (\d\.\d+)", block).group(1))
    assert truth == pytest.approx(math.log(2 * math.pi * 0.3), abs=1e-4)
    exec(compile(block, "training.md", "exec"), {"__name__": "training"})
    printed = capsys.readouterr().out
    start, tuned, trained = map(float, re.search(r"start (\S+), tuned (\S+), trained (\S+)", printed).groups())
    estimate, error = map(float, re.search(r"log Z = (\S+) \+- (\S+)", printed).groups())
    # The bounds are of 2,000 chains each, and their errors a few hundredths.
    assert start < tuned - 0.5 < trained - 0.5
    assert truth - 0.4 < trained < truth + 0.1
    assert 0 < error < 0.05
    assert abs(estimate - truth) < 5 * error


def test_the_block_of_the_page_on_gradient_noise_warns_and_mends(capsys):
    block = "".join(re.findall(r"```python\n(.*?)```", GRADIENT_NOISE, flags=re.DOTALL))
    with pytest.warns(RuntimeWarning, match="lower the bound") as caught:
        exec(compile(block, "gradient-noise.md", "exec"), {"__name__": "gradient-noise"})
    predicted = float(re.search(r"by about (\S+) \+-", str(caught[0].message)).group(1))
    stated = float(re.search(r"warns: about (\d+) nats", block).group(1))
    printed = capsys.readouterr().out
    naive, surrogate = (
        float(re.search(rf"{name}: +(-\d+\.\d)", printed).group(1)) for name in ("batches", "surrogate")
    )
    assert predicted == pytest.approx(stated, rel=0.3)
    assert surrogate - naive == pytest.approx(predicted, rel=0.3)
    estimate, error = map(float, re.search(r"log Z = (\S+) \+- (\S+)", printed).groups())
    # By quadrature, below.
    assert abs(estimate - _log_evidence_of_the_page(block)) < 5 * error


def test_the_block_of_the_page_on_mh_gradients_runs_and_prints_the_truth(capsys):
    block = "".join(re.findall(r"```python\n(.*?)```", MH_GRADIENTS, flags=re.DOTALL))
    exec(compile(block, "mh-gradients.md", "exec"), {"__name__": "mh-gradients"})
    printed = capsys.readouterr().out
    numbers = map(float, re.search(r"value (\S+) \+- (\S+), gradient (\S+) \+- (\S+)", printed).groups())
    value, value_error, gradient, gradient_error = numbers
    assert abs(value - (1.5**2 + 1)) < 5 * value_error
    assert abs(gradient - 2 * 1.5) < 5 * gradient_error
    assert 0 < gradient_error < 0.2


def _log_evidence_of_the_page(block):
    names = {}
    exec(compile(block.split("annealer =")[0], "gradient-noise.md", "exec"), names)
    grid = np.stack(np.meshgrid(np.linspace(0.5, 1.6, 120), np.linspace(-1.1, 0.1, 120), indexing="ij"), -1)
    values = np.asarray(jax.lax.map(names["target"], jnp.asarray(grid.reshape(-1, 2)), batch_size=240), np.float64)
    cell = (1.1 / 119) * (1.2 / 119)
    return float(np.log(np.sum(np.exp(values - values.max())) * cell) + values.max())


@pytest.mark.parametrize("command", re.findall(r"^lehr (.*)$", README, flags=re.MULTILINE))
def test_commands_parse(command):
    cli.parse(shlex.split(command))


def test_the_two_commands_are_there():
    assert "\npip install . && lehr train\n" in README
    assert '\npip install -e ".[test]" && pytest\n' in README


def test_every_file_it_names_is_there():
    for name in re.findall(r"\]\(([^):]+)\)", README):
        assert (Path(__file__).parents[1] / name).exists(), f"README.md links to {name}"


DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    "index": [getattr(lehr, name) for name in lehr.__all__ if name not in (*lehr._SUBPACKAGES, "mh_expectation")],
    "objectives": [getattr(objectives, name) for name in objectives.__all__],
    "linear_regression": [getattr(linear_regression, name) for name in linear_regression.__all__],
    # Of the package, what it imports by name; not its modules.
    "mh_gradient": [found for name, found in vars(mh_gradient).items() if name[0] != "_" and callable(found)],
}


@pytest.mark.parametrize("page", PAGES)
def test_the_reference_has_every_public_name(page):
    """At its home, from where a page takes its docstring."""
    text = (DOCS / "reference" / f"{page}.md").read_text()
    entries = set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)) - {f"lehr.{page}"}
    assert entries == {f"{found.__module__}.{found.__qualname__}" for found in PAGES[page]}
    assert all(found.__doc__ for found in PAGES[page])
