"""`lehr evidence` and `lehr compare` as a user meets them; all estimates but one share what is compiled."""

import json
import math
import os
import subprocess
import sys
import types

import jax
import pytest
from matplotlib.image import imread

from lehr.errors import InputError
from lehr.model_file import load
from lehr.path import Problem
from lehr.progress import Progress
from lehr.reference import NAMES
from tests.test_cli import call, refused, strict

#: two coordinates, each log-gamma: Z is a product of gamma functions
MODELS = """
import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.distributions import Normal

import lehr

print("the user's file prints this")
SIZE = 3


class LogGamma(eqx.Module):
    shape: jax.Array

    def __call__(self, x):
        return jnp.sum(self.shape * x - jnp.exp(x))


def of_shape(shape):
    print("and this")
    return lehr.Problem(Normal(jnp.zeros(2), 2.0), LogGamma(jnp.asarray(shape, float)))


def scaled(shape, factor=1.0):
    return of_shape(factor * shape)


def wrong(shape):
    return shape


def broken(shape):
    raise RuntimeError("no luck")


def empty(value):
    return lehr.from_function(lambda x: 0.1 * value, {})


problem = of_shape([1.5, 3.0])
other = of_shape([1.2, 2.5])
"""

NUMPYRO = """
import jax.numpy as jnp
import numpyro
from numpyro import distributions as dist

import lehr


def normal(y, noise=1.0):
    with numpyro.plate("one", 1):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mean, noise), obs=y)


def discrete(y):
    numpyro.sample("which", dist.Bernoulli(0.5))


def observed_only(y):
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def adapted(y):
    return lehr.from_numpyro(normal, y, noise=2.0)


conditioned = numpyro.handlers.condition(normal, {"mean": jnp.zeros(1)})
"""

#: little work, and a tolerance that is met with it whatever the random numbers
BUDGET = "--max-gradients=6e4"
LOOSE = "--tolerance=0.5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a user."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "models.py").write_text(MODELS)
    (folder / "sites.py").write_text(NUMPYRO)
    (folder / "shape.json").write_text('{"shape": [1.5, 3.0]}')
    (folder / "y.json").write_text('{"y": [0.3, -0.2, 1.1]}')
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return f"{folder / 'models.py'}"


def assert_right(result, *shapes):
    """Twice the bracket, in JSON, holds the truth: the bracket itself would fail for one seed in twenty."""
    low, high = result["bracket"]
    truth = sum(math.lgamma(shape) for shape in shapes)
    assert low - (high - low) / 2 < truth < high + (high - low) / 2
    assert high - low < 1


# Results


def test_a_problem_as_json(models):
    """On standard output there is nothing else, whatever the user's file prints."""
    answer = call("evidence", f"{models}:problem", "--json", BUDGET, LOOSE)
    assert answer.code == 0, answer.err
    (line,) = answer.out.splitlines()
    result = strict(line)
    assert result["converged"]
    assert_right(result, 1.5, 3.0)
    assert result["num_gradients"] <= 60_000
    assert result["tolerance"] == 0.5
    assert "reference" not in result
    assert "log Z = " in answer.err


def test_a_table_and_a_picture(models, folder, tmp_path):
    """Of a function called with the data; the same seed gives the same numbers, another one others."""
    places = [f"{models}:of_shape", f"--data={folder / 'shape.json'}", BUDGET, LOOSE]
    answer = call("evidence", *places, f"--plot={tmp_path / 'out.png'}")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("log evidence  ")
    assert "converged     yes" in answer.out
    assert "and this" in answer.err
    height, width, _ = imread(tmp_path / "out.png").shape
    assert height > 300
    assert width > 300
    again, other = (call("evidence", *places, f"--seed={seed}").out.splitlines()[0] for seed in (0, 1))
    assert again == answer.out.splitlines()[0]
    assert other != again


def test_exit_code_3_without_convergence(models, tmp_path):
    """And there is a picture all the same."""
    answer = call("evidence", f"{models}:problem", BUDGET, "--tolerance=1e-6", f"--plot={tmp_path / 'o.png'}")
    assert answer.code == 3
    assert "NOT CONVERGED" in answer.out
    assert imread(tmp_path / "o.png").size


def test_a_comparison(models, tmp_path):
    arguments = ["compare", f"{models}:problem", f"{models}:other", BUDGET]
    answer = call(*arguments, LOOSE, f"--plot={tmp_path / 'out.png'}")
    assert answer.code == 0, answer.err
    assert "log Bayes factor" in answer.out
    assert "problem: log evidence " in answer.err
    assert imread(tmp_path / "out.png").size
    # One that did not converge is reported, but the exit code tells.
    answer = call(*arguments, "--tolerance=1e-6", "--json")
    assert answer.code == 3
    result = strict(answer.out)
    assert {model["name"] for model in result["models"]} == {"problem", "other"}
    for name, shapes in {"problem": (1.5, 3.0), "other": (1.2, 2.5)}.items():
        assert_right(result["results"][name], *shapes)


def test_names_of_a_comparison(models, folder, tmp_path):
    """As short as tells them apart. (Without parameters there is nothing to compile.)"""
    for place in ("again.py", "deep/models.py", "deep/again.py"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(MODELS)
    (tmp_path / "data.json").write_text('{"value": 2.5}')

    def names(*places):
        answer = call("compare", *places, f"--data={tmp_path / 'data.json'}", "--json")
        return {model["name"] for model in strict(answer.out)["models"]}

    again, deep = f"{tmp_path / 'again.py'}:empty", f"{tmp_path / 'deep' / 'models.py'}:empty"
    deeper = f"{tmp_path / 'deep' / 'again.py'}:empty"
    assert names(again, deep) == {"again:empty", "models:empty"}
    assert names(again, deep, deeper) == {again, "models:empty", deeper}


def test_a_reference_target_comes_with_its_truth(monkeypatch):
    """The difference is of the estimate from the truth."""
    from lehr import command_evidence
    from lehr.adapters.functions import from_function

    truth = command_evidence.Reference(from_function(lambda x: 2.0, {}), 1.75, 0.01, "by thought")
    monkeypatch.setattr(command_evidence, "reference", lambda name, data_dir: truth)
    answer = call("evidence", "sonar")
    assert answer.code == 0
    *_, reference, difference = answer.out.splitlines()
    assert reference == "reference     1.75 ± 0.01 nats (by thought)"
    assert difference == "difference    +0.2500 nats"
    result = strict(call("evidence", "sonar", "--json").out)
    assert result["reference"] == {"log_evidence": 1.75, "error": 0.01, "difference": 0.25, "how": "by thought"}


def test_every_reference_target_is_named_in_the_help():
    words = call("evidence", "--help").out
    for name in NAMES:
        assert name in words.replace(",", " ").replace(".", " ").split()
    assert "Exit code 0 if" in words


def test_the_command_itself_in_float64(folder):
    """Its own process: the result on standard output, to more digits than float32 has."""
    (folder / "value.json").write_text('{"value": 1.2345678901234}')
    arguments = ["evidence", f"{folder / 'models.py'}:empty", f"--data={folder / 'value.json'}", "--x64", "--json"]
    child = subprocess.run(
        [sys.executable, "-m", "lehr.cli", *arguments], capture_output=True, text=True, cwd=folder, env=os.environ
    )
    assert child.returncode == 0, child.stderr
    assert strict(child.stdout)["log_evidence"] == pytest.approx(0.12345678901234, abs=1e-14)
    assert not (folder / "__pycache__").exists()
    assert not jax.config.jax_enable_x64


# What a model may be


def test_a_numpyro_model(folder):
    pytest.importorskip("numpyro")
    # No more gradients than needed for an estimate: the model has to be compiled for everything that uses them.
    answer = call(
        "evidence", f"{folder / 'sites.py'}:normal", f"--data={folder / 'y.json'}", "--max-gradients=5e3", "--json"
    )
    result = strict(answer.out)
    assert answer.code == (0 if result["converged"] else 3)
    y, n = [0.3, -0.2, 1.1], 3
    # y ~ N(0, I + 1 1^T)
    square = sum(value**2 for value in y) - sum(y) ** 2 / (n + 1)
    truth = -0.5 * (square + math.log(n + 1) + n * math.log(2 * math.pi))
    # The posterior is Gaussian, and so is a fitted base: then all is exact, to float error.
    assert result["log_evidence"] == pytest.approx(truth, abs=5 * result["standard_error"] + 1e-4)
    assert 0 <= result["standard_error"] < 0.2


@pytest.mark.parametrize(("name", "dim"), [("normal", 1), ("observed_only", 0), ("adapted", 1), ("conditioned", 0)])
def test_what_counts_as_a_numpyro_model(folder, name, dim):
    """A model without latent sites too; but not a function that makes a problem of a NumPyro model."""
    pytest.importorskip("numpyro")
    problem = load(f"{folder / 'sites.py'}:{name}", folder / "y.json")
    assert isinstance(problem, Problem)
    assert problem.position.shape == (dim,)
    x = jax.numpy.zeros(dim)
    noise = 2.0 if name == "adapted" else 1.0
    log_lik = sum(-0.5 * (v / noise) ** 2 - math.log(noise) - 0.5 * math.log(2 * math.pi) for v in (0.3, -0.2, 1.1))
    prior = 0.0 if name == "observed_only" else -0.5 * math.log(2 * math.pi)
    assert float(problem.log_prob(x)) == pytest.approx(log_lik + prior, rel=1e-5)


def test_a_pymc_model(folder, tmp_path, monkeypatch):
    """Its adapter is tested elsewhere: here only that it is called, because PyMC takes seconds to import."""
    pymc = types.SimpleNamespace(Model=type("Model", (), {}))
    problem = load(f"{folder / 'models.py'}:problem", None)
    monkeypatch.setitem(sys.modules, "pymc", pymc)
    monkeypatch.setitem(sys.modules, "lehr.adapters.pymc", types.SimpleNamespace(from_pymc=lambda model: problem))
    (tmp_path / "by_pymc.py").write_text("import pymc\nmodel = pymc.Model()\ndef make(shape): return model\n")
    assert load(f"{tmp_path / 'by_pymc.py'}:model", None) is problem
    assert load(f"{tmp_path / 'by_pymc.py'}:make", folder / "shape.json") is problem


def test_without_numpyro(folder, models, monkeypatch, tmp_path):
    """A problem needs none, and a model says what to install."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "numpyro"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numpyro", None)
    assert load(f"{models}:of_shape", folder / "shape.json").position.shape == (2,)
    (tmp_path / "inside.py").write_text("def model():\n    import numpyro\n")
    (tmp_path / "outside.py").write_text("import numpyro\n")
    for name in ("inside", "outside"):
        assert "needs numpyro: pip install 'lehr[numpyro]'" in refused("evidence", f"{tmp_path / name}.py:model")


def test_a_file_may_import_its_neighbour(tmp_path):
    """As when Python runs it; and more than one model is taken from one run of it."""
    (tmp_path / "a_neighbour.py").write_text("import lehr\nmake = lambda: lehr.from_function(lambda x: 1.0, {})\n")
    (tmp_path / "main.py").write_text("print('once')\nfrom a_neighbour import make\none = make()\ntwo = make()\n")
    answer = call("compare", f"{tmp_path / 'main.py'}:one", f"{tmp_path / 'main.py'}:two")
    assert answer.code == 0
    assert answer.err.count("once") == 1


# Faults of the model


def test_targets_that_are_not_there(models, tmp_path, monkeypatch):
    unknown = refused("evidence", "sonr")
    assert "did you mean sonar?" in unknown
    assert "many-well; a model of your own is given as FILE.py:NAME" in unknown
    assert f"give {models}:NAME" in refused("evidence", models)
    assert f"there is no file {tmp_path / 'no.py'}: " in refused("evidence", f"{tmp_path / 'no.py'}:model")
    assert f"there is no file {tmp_path}: " in refused("evidence", f"{tmp_path}:model")
    found = refused("evidence", f"{models}:modle")
    assert found.startswith("there is no 'modle' in ")
    assert found.endswith("it has of_shape, scaled, wrong, broken, empty, problem, other")
    assert "is of type int, neither a model nor a problem: it has of_shape" in refused("evidence", f"{models}:SIZE")
    assert "a model is given as FILE.py:NAME" in refused("evidence", f"{models}:")
    monkeypatch.delenv("LEHR_DATA", raising=False)
    assert "sonar.csv is not part of lehr: set LEHR_DATA" in refused("evidence", "sonar")
    assert f"there is no {tmp_path / 'sonar.csv'}: " in refused("evidence", "sonar", f"--data-dir={tmp_path}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1\ny = (2 +\n", "fails with SyntaxError in line 2 of bad.py ('(' was never closed): mend it"),
        ("x = 1\n\n1 / 0\n", "fails with ZeroDivisionError in line 3 of bad.py (division by zero): mend it"),
        ("import json\njson.loads('{')\n", "fails with JSONDecodeError in line 2 of bad.py (Expecting"),
        ("import no_such_thing\n", "fails with ModuleNotFoundError in line 1 of bad.py (No module named"),
        ("raise SystemExit(3)\n", "fails with SystemExit in line 1 of bad.py (3): mend it"),
        ("raise ValueError\n", "fails with ValueError in line 1 of bad.py (no message): mend it"),
        ("\0\x01\x02", "fails with "),
        ("x = 1\n", "there is no 'model' in "),
    ],
)
def test_files_that_fail(tmp_path, content, words):
    (tmp_path / "bad.py").write_text(content)
    assert words in refused("evidence", f"{tmp_path / 'bad.py'}:model").replace(f"{tmp_path}/", "")


def test_functions_that_fail(models, folder):
    data = f"--data={folder / 'shape.json'}"
    assert "models.py:broken fails with RuntimeError in line " in refused_last("evidence", f"{models}:broken", data)
    assert "and returns something of type ArrayImpl: a function must be" in refused_last(
        "evidence", f"{models}:wrong", data
    )


def refused_last(*arguments):
    """As `refused`, for files that print."""
    answer = call(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    return answer.err.splitlines()[-1]


def test_a_discrete_latent_site(folder):
    pytest.importorskip("numpyro")
    words = refused("evidence", f"{folder / 'sites.py'}:discrete", f"--data={folder / 'y.json'}")
    assert words.startswith("the latent site 'which' is discrete: observe it, or sum it out")


# Faults of the data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{'shape': 1}", "is no JSON (Expecting property name"),
        ("", "is no JSON (Expecting value"),
        (b"\xff\xfe\x00", "is no JSON ('utf-8' codec"),
        ("[1, 2]", "holds something of type list and no JSON object"),
        ('{"shape": [[1, 2], [3]]}', "the rows of 'shape' in data.json differ in length"),
        ('{"shape": [1, "a"]}', "'shape' in data.json is a list of other things than numbers"),
        ('{"shape": [1, null]}', "'shape' in data.json is a list of other things than numbers"),
        ('{"shape": [1, 3000000000]}', "'shape' in data.json has integers beyond 32 bits"),
        ('{"shap": [1, 2]}', "models.py:of_shape takes the arguments (shape), and the data are shap (missing a"),
        ('{"shape": [1, 2], "n": 3}', "got an unexpected keyword argument 'n'"),
        ("{}", "models.py:of_shape takes the arguments (shape), and the data are nothing"),
    ],
)
def test_data_that_do_not_fit(models, tmp_path, content, words):
    path = tmp_path / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refused("evidence", f"{models}:of_shape", f"--data={path}")
    assert words in found.replace(f"{tmp_path}/", "")


def test_data_where_there_should_be_none_and_the_reverse(models, folder, tmp_path):
    data = f"--data={folder / 'shape.json'}"
    assert "has its data already: leave --data out" in refused("evidence", f"{models}:problem", data)
    assert "sonar is a reference target: leave it out" in refused("evidence", "sonar", data)
    assert f"there is no data file {tmp_path / 'no.json'}" in refused(
        "evidence", f"{models}:of_shape", f"--data={tmp_path / 'no.json'}"
    )
    assert "missing a required argument: 'shape'" in refused("evidence", f"{models}:of_shape")


def test_data_by_kind(folder, tmp_path):
    """Lists are arrays of the kind that was written; all else is what JSON makes of it."""
    from lehr.model_file import read

    content = {"x": [[1, 2], [3, 4]], "y": [1.5, 2], "z": [True, False], "n": 3, "s": "text", "b": True, "o": None}
    (tmp_path / "data.json").write_text(json.dumps(content))
    found = read(tmp_path / "data.json")
    assert [found[name].dtype.kind for name in "xyz"] == ["i", "f", "b"]
    assert found["x"].shape == (2, 2)
    assert {name: found[name] for name in "nsbo"} == {"n": 3, "s": "text", "b": True, "o": None}
    (tmp_path / "data.json").write_text('{"shape": [1.0, 2.0], "factor": 2}')
    problem = load(f"{folder / 'models.py'}:scaled", tmp_path / "data.json")
    assert problem.log_target.shape.tolist() == [2.0, 4.0]
    (tmp_path / "data.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is no JSON"):
        read(tmp_path / "data.json")


# Options


@pytest.mark.parametrize("command", ["evidence", "compare"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--tolerance=0", "the tolerance must be a positive number of nats, but it is 0"),
        ("--tolerance=nan", "the tolerance must be a positive number of nats, but it is nan"),
        ("--max-gradients=0", "max_gradients must be at least 1 and finite, but it is 0"),
        ("--max-gradients=inf", "max_gradients must be at least 1 and finite, but it is inf"),
        ("--seed=-1", "seed must be in [0, 2^32), but it is -1"),
        ("--batch-size=1", "a population needs at least 2 particles"),
        ("--plot=/no/such/folder/out.png", "there is no folder /no/such/folder for the picture out.png: make it"),
        ("--plot=/", "the picture cannot be written to /"),
        ("--plot=out.docx", "a picture cannot be written as 'out.docx': end its name with .png, .pdf or .svg"),
    ],
)
def test_options_out_of_range(models, command, option, words):
    """Before anything is estimated."""
    places = [f"{models}:problem", f"{models}:other"][: 1 if command == "evidence" else 2]
    assert words in refused(command, *places, option)


def test_comparisons_that_cannot_be(models):
    assert "needs two models or more, but 1 is given" in refused("compare", f"{models}:problem")
    assert "needs two models or more, but 0 is given" in refused("compare")
    assert "is given twice: give each model once" in refused("compare", *[f"{models}:problem"] * 2)
    assert "a model is given as FILE.py:NAME, but this is 'sonar'" in refused("compare", f"{models}:problem", "sonar")
    assert "there is no 'no' in" in refused("compare", f"{models}:problem", f"{models}:no")


# Interrupts


def test_an_interrupt_during_the_run(models, monkeypatch):
    """`evidence` reports what it has; a comparison that lacks a model is none, and its next model is not begun."""

    def at(self, done, text):
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "at", at)
    answer = call("evidence", f"{models}:problem", BUDGET)
    assert answer.code == 3
    assert "It was interrupted." in answer.out
    answer = call("compare", f"{models}:problem", f"{models}:other", BUDGET)
    assert answer.code == 130
    assert answer.out == ""
    assert "problem: log evidence " in answer.err
    assert "other: " not in answer.err
    assert answer.err.splitlines()[-1].startswith("lehr: stopped at once; not every model was estimated")


def test_an_interrupt_before_there_is_anything(models, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "at", stop)
    answer = call("evidence", f"{models}:problem", BUDGET)
    assert answer.code == 130
    assert answer.out == ""
    assert answer.err.splitlines()[-1] == "lehr: stopped at once; there was no estimate yet"
