"""The command line as a user meets it: every fault is one sentence and exit code 2, and nothing is ever lost."""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.image import imread

import lehr
from lehr.cli import main
from lehr.vae import command_train, session
from tests.statistics import SEED
from tests.vae import TINY, tiny_images


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """What this process and its children compile is kept for both: most of a tiny run is compilation."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def only_at_the_ends():
    """Checkpoints at the start and the end only: those between come by the clock, and on a busy machine earlier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "CHECKPOINT_SECONDS", math.inf)
        yield


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def call(*arguments) -> Answer:
    """`lehr ARGUMENTS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    answer = Answer(stopped.value.code, out.getvalue(), err.getvalue())
    assert "Traceback" not in answer.err + answer.out
    return answer


def refused(*arguments) -> str:
    """The sentence with which `lehr ARGUMENTS` is refused."""
    answer = call(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    *before, last = answer.err.splitlines()
    assert last.startswith("lehr: ")
    assert not any(line.startswith("lehr: ") for line in before)
    assert len(last) > 30
    return last.removeprefix("lehr: ")


def options(**changes):
    """A tiny run, as options."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, **changes}.items()]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, images=tiny_images())
    return path


@pytest.fixture(scope="module")
def train(images):
    """`lehr train` on the tiny images."""
    data = ["--data=npz", f"--file={images}"]
    return lambda *arguments, **changes: call("train", *data, *options(**changes), *arguments)


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """The answer and the folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(f"--out={folder}"), folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[1], tmp_path / "run"))


def contents(folder):
    """Every file with its hash."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def strict(text):
    """JSON without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def report(folder):
    return strict((folder / "report.json").read_text())


# Starting


def in_child(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_answers_within_a_second_and_imports_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys, lehr.cli\ntry: lehr.cli.main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    child = in_child(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert child.returncode == 0
    for word in ("train", "evaluate", "differentiate"):
        assert word in child.stdout
    heavy = {"jax", "jaxlib", "equinox", "numpy", "matplotlib", "orbax", "optax", "sklearn"}
    assert not heavy & set(child.stderr.split())
    # The processor's time, because the wall's depends on who else is at work here.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    ("command", "words"),
    [("train", ("--step-size", "--resume", "davi-adapt")), ("evaluate", ("--num-temperatures", "hais", "--json"))],
)
def test_help_of_a_command_names_its_options(command, words):
    answer = call(command, "--help")
    assert answer.code == 0
    for word in words:
        assert word in answer.out


def test_importing_lehr_is_light():
    child = in_child("import sys, lehr; dir(lehr); assert not {'jax', 'equinox', 'numpy'} & set(sys.modules)")
    assert child.returncode == 0, child.stderr


def test_every_public_name_is_there():
    assert {"Annealer", "anneal", "anneal_reverse", "objectives", "Schedule", "Hamiltonian"} <= set(lehr.__all__)
    assert dir(lehr) == sorted(lehr.__all__)
    for name in lehr.__all__:
        value = getattr(lehr, name)
        assert getattr(value, "__name__", name).rpartition(".")[2] == name
    assert lehr.objectives.davi is importlib.import_module("lehr.objectives").davi
    with pytest.raises(AttributeError, match="module 'lehr' has no attribute 'aneal'"):
        _ = lehr.aneal
    child = in_child("from lehr import *; print(Annealer.__name__, objectives.davi.__name__)")
    assert child.stdout.split() == ["Annealer", "davi"]


def test_the_installed_command_is_main():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="lehr")
    assert entry.value == "lehr.cli:main"


# A run


def test_a_run_from_the_first_epoch_to_the_report(finished):
    answer, folder = finished
    assert answer.code == 0
    assert "npz: 36 images to train, 4 to test; objective davi" in answer.err
    assert "epoch 4/4" in answer.err
    values = report(folder)
    assert f"test bound {values['test_bound']:.2f} nats" in answer.out
    assert f"test negative log-likelihood {values['test_nll']['mean']:.2f} nats" in answer.out
    assert f"lehr evaluate {folder}" in answer.out
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "metrics.jsonl", "checkpoints", "report.json"),
        *("bounds.png", "reconstructions.png", "samples.png", "schedule.png"),
    }


def test_the_files_of_a_run(finished, images):
    _, folder = finished
    config = strict((folder / "config.json").read_text())
    assert config.keys() == {"setting", "data", "versions"}
    assert config["setting"] == {**TINY, "objective": "davi", "step_size": 0.1, "persistence": 0.9, "seed": 0}
    assert config["data"]["name"] == "npz"
    assert Path(config["data"]["file"]) == images
    assert len(config["data"]["fingerprint"]) == 16
    assert config["versions"].keys() == {"lehr", "jax", "python"}

    metrics = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in metrics] == [1, 2, 3, 4]
    assert all(row.keys() == {"epoch", "train_bound", "test_bound", "learning_rate"} for row in metrics)

    values = report(folder)
    assert values["epochs"] == 4
    assert values["train_bound"] == metrics[-1]["train_bound"]
    assert values["test_bound"] == metrics[-1]["test_bound"]
    assert values["images_per_second"] > 0
    nll = values["test_nll"]
    assert 4 < nll["mean"] < 12
    assert nll["num_images"] == 4
    assert nll["error_over_images"] > 0
    assert nll["error_over_chains"] > 0
    assert 0.4 < nll["mean_acceptance"] < 0.9
    assert values["sampler"]["betas"][0] == 0
    assert values["sampler"]["betas"][-1] == 1

    for path in folder.glob("*.png"):
        height, width, _ = imread(path).shape
        assert 100 < height < 3000
        assert 300 < width < 3000


def test_a_run_without_a_folder_is_named_after_its_data_and_objective(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "run", lambda *_, **__: (_ for _ in ()).throw(session.Interrupted("stopped")))
    for _ in range(3):
        assert train().code == 130
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["npz-davi", "npz-davi-2", "npz-davi-3"]


def test_the_same_seed_gives_the_same_metrics(finished, train, tmp_path, monkeypatch):
    monkeypatch.setattr("lehr.vae.report.write_report", lambda *_: "")
    train(f"--out={tmp_path / 'same'}")
    assert (tmp_path / "same" / "metrics.jsonl").read_bytes() == (finished[1] / "metrics.jsonl").read_bytes()


# Options that cannot be


def test_unknown_names_offer_near_ones(tmp_path):
    objectives = "Known: elbo, iwae, davi, davi-adapt, aiwae"
    for arguments, sentence in {
        ("train", "--data=mnits"): "unknown data set 'mnits'; did you mean 'mnist'? Known: digits, mnist, omniglot, ",
        ("train", "--objective=davi-adpt"): f"unknown objective 'davi-adpt'; did you mean 'davi-adapt'? {objectives}",
        ("train", "--objective=wake-sleep"): f"unknown objective 'wake-sleep'. {objectives}",
        ("train", "--objective=aiwe"): f"unknown objective 'aiwe'; did you mean 'aiwae' or 'iwae'? {objectives}",
        ("evaluate", tmp_path, "--method=haiss"): "unknown method 'haiss'; did you mean 'hais' or 'ais'? Known: iwae, ",
        ("evaluate", tmp_path, "--base=prio"): "unknown base 'prio'; did you mean 'prior'? Known: posterior, prior",
    }.items():
        assert refused(*arguments).startswith(sentence)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--epochs=0", "epochs must be at least 1, but it is 0"),
        ("--batch-size=0", "batch_size must be at least 1, but it is 0"),
        ("--num-steps=-3", "num_steps must be at least 1, but it is -3"),
        ("--num-particles=0", "num_particles must be at least 1, but it is 0"),
        ("--num-leapfrog=0", "num_leapfrog must be at least 1, but it is 0"),
        ("--latent-dim=0", "latent_dim must be at least 1, but it is 0"),
        ("--hidden=0", "hidden must be at least 1, but it is 0"),
        ("--step-size=-1", "step_size must be positive and finite, but it is -1.0"),
        ("--step-size=0", "step_size must be positive and finite, but it is 0.0"),
        ("--step-size=nan", "step_size must be positive and finite, but it is nan"),
        ("--step-size=inf", "step_size must be positive and finite, but it is inf"),
        ("--persistence=1.0", "persistence must be in [0, 1), but it is 1.0"),
        ("--persistence=-0.1", "persistence must be in [0, 1), but it is -0.1"),
        ("--persistence=nan", "persistence must be in [0, 1), but it is nan"),
        ("--seed=-1", "seed must be in [0, 2^32), but it is -1"),
        ("--seed=4294967296", "seed must be in [0, 2^32), but it is 4294967296"),
    ],
)
def test_training_options_out_of_range(tmp_path, option, sentence):
    assert refused("train", option, f"--out={tmp_path / 'run'}") == sentence
    assert not (tmp_path / "run").exists()


def test_a_negative_number_may_follow_its_option(tmp_path):
    """Not taken for another option."""
    assert refused("train", "--step-size", "-1") == "step_size must be positive and finite, but it is -1.0"


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--num-temperatures=0", "num_temperatures must be at least 1, but it is 0"),
        ("--num-chains=0", "num_chains must be at least 1, but it is 0"),
        ("--num-leapfrog=0", "num_leapfrog must be at least 1, but it is 0"),
        ("--num-images=0", "num_images must be at least 1, but it is 0"),
        ("--num-samples=0", "num_samples must be at least 1, but it is 0"),
        ("--num-simulated=-1", "num_simulated must be 0 or more, but it is -1"),
        ("--persistence=1", "persistence must be in [0, 1), but it is 1.0"),
        ("--seed=4294967296", "seed must be in [0, 2^32), but it is 4294967296"),
    ],
)
def test_evaluation_options_out_of_range(finished, option, sentence):
    before = contents(finished[1])
    assert refused("evaluate", finished[1], option) == sentence
    assert contents(finished[1]) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--epoch=3"],
        ["train", "--epochs=many"],
        ["evaluate"],
        ["evaluate", "run", "--chains=3"],
        ["trian"],
        [],
    ],
)
def test_unknown_options_and_commands_have_tyros_message(arguments):
    answer = call(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert "--help" in answer.err


# Data


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda pixels: 255 * pixels, "rescale them to [0, 1]"),
        (lambda pixels: pixels - 1, "rescale them to [0, 1]"),
        (lambda pixels: np.where(pixels > pixels.mean(), np.nan, pixels), "holds NaN: remove or mend those images"),
        (lambda pixels: pixels[0, 0], "give (n, height, width) or (n, num_pixels)"),
        (lambda pixels: pixels[None], "give (n, height, width) or (n, num_pixels)"),
        (lambda pixels: (255 * pixels).astype(np.uint8), "divide by 255 and give floats in [0, 1]"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, spoil, sentence):
    np.savez(tmp_path / "mine.npz", images=spoil(tiny_images()))
    found = refused("train", "--data=npz", f"--file={tmp_path / 'mine.npz'}", f"--out={tmp_path / 'run'}")
    assert str(tmp_path / "mine.npz") in found
    assert sentence in found
    assert not (tmp_path / "run").exists()


def test_files_that_are_missing_or_broken(tmp_path):
    given = f"--data-dir={tmp_path}"
    missing = refused("train", "--data=mnist", given)
    assert missing.startswith(f"there is no {tmp_path}/mnist/train-images-idx3-ubyte: put train-images-idx3-ubyte or ")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(1000))[:-10])
    assert refused("train", "--data=mnist", given) == (
        f"{path} is damaged or another file (its gzip stream is truncated or broken): "
        "delete it or replace it with a fresh copy."
    )
    path.write_bytes(gzip.compress(bytes(1000)))
    assert "(the SHA-256 of its uncompressed content is not the published" in refused("train", "--data=mnist", given)
    assert "put chardata.mat there" in refused("train", "--data=omniglot", given)
    assert refused("train", "--data=npz", f"--file={tmp_path / 'no.npz'}").startswith("there is no array file")


def test_an_array_file_and_its_data_set_go_together(images):
    for arguments in (["--data=npz"], [f"--file={images}"]):
        assert refused("train", *arguments) == "--data npz and --file go together: give both or neither"


def test_a_batch_larger_than_the_data(images, tmp_path):
    arguments = ["--data=npz", f"--file={images}", "--batch-size=37", f"--out={tmp_path / 'run'}"]
    sentence = refused("train", *arguments)
    assert sentence == "a batch of 37 is larger than the 36 training images: give --batch-size 36 or less"
    assert not (tmp_path / "run").exists()


# The folder


def test_a_folder_that_holds_another_run_is_left_alone(run, images):
    before, times = contents(run), {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    sentence = refused("train", "--data=npz", f"--file={images}", *options(seed=5), f"--out={run}")
    assert sentence == f"{run} already holds a run: go on with it by --resume {run}, or give another folder with --out"
    assert contents(run) == before
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == times


def test_a_folder_from_which_orbax_could_not_read(train, tmp_path):
    folder = tmp_path / "run [bold]"
    answer = train(f"--out={folder}")
    assert answer.code == 2
    sentence = f"lehr: {folder} cannot hold a run, because its checkpoints could not be read: use a path without ["
    assert answer.err.splitlines() == [sentence]
    assert not folder.exists()


@pytest.mark.parametrize("place", ["file/run", "file", "/dev/full"])
def test_a_folder_that_cannot_be(train, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    answer = train(f"--out={tmp_path / place}")
    assert answer.code == 2
    assert f"lehr: cannot write to {tmp_path / place} (" in answer.err
    assert "use another folder" in answer.err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_that_may_not_be_read_or_written(tmp_path, monkeypatch):
    """Root may write anywhere, so the system's answer is made up."""

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "closed"))

    monkeypatch.setattr(command_train.RunFolder, "open", denied)
    sentence = refused("evaluate", tmp_path)
    assert sentence.startswith(f"cannot read or write {tmp_path / 'closed'} (Permission denied): check its permissions")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_is_full(train, finished, tmp_path, capfd):
    """One sentence, and once there is room the run goes on as if nothing had been."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        answer = train(f"--out={tmp_path / 'run'}")
        assert answer.code == 2
        sentence = answer.err.splitlines()[-1]
        assert sentence == (
            f"lehr: cannot write to {tmp_path / 'run'} (No space left on device): make room there, mend its "
            "permissions, or use another folder; what was saved before is kept"
        )
        assert "Traceback" not in "".join(capfd.readouterr())
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True)
        assert call("train", f"--resume={tmp_path / 'run'}").code == 0
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (finished[1] / "metrics.jsonl").read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("arguments", [["evaluate", "FOLDER"], ["train", "--resume=FOLDER"]])
@pytest.mark.parametrize("name", [".", "none"])
def test_a_folder_that_holds_no_run(tmp_path, arguments, name):
    folder = tmp_path / name
    sentence = refused(*(argument.replace("FOLDER", str(folder)) for argument in arguments))
    assert sentence == f"{folder} holds no run (config.json is missing): give the folder that lehr train wrote"


DATA = '{"name": "digits", "file": null, "fingerprint": ""}'


@pytest.mark.parametrize("command", [["evaluate"], ["train", "--resume"]])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"setting": {"ep', "config.json is damaged ("),
        ("[3]", "config.json is damaged ("),
        ("[]", "config.json is not one that lehr train wrote ("),
        ('{"setting": 5, "data": 6}', "config.json is not one that lehr train wrote ("),
        (f'{{"setting": {{"epoch": 3}}, "data": {DATA}}}', "config.json is not one that lehr train wrote ("),
        (f'{{"setting": {{"epochs": 0}}, "data": {DATA}}}', "epochs must be at least 1, but it is 0"),
    ],
)
def test_a_damaged_configuration(run, command, content, sentence):
    (run / "config.json").write_text(content)
    before = contents(run)
    assert sentence in refused(*command, run)
    assert contents(run) == before


# Going on with a run


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--epochs=9", "--epochs 9 differs from 4 of the run RUN"),
        ("--seed=1", "--seed 1 differs from 0 of the run RUN"),
        ("--objective=elbo", "--objective elbo differs from davi of the run RUN"),
        # Equal to the default, and yet not what the run has.
        ("--hidden=200", "--hidden 200 differs from 8 of the run RUN"),
        ("--batch_size=128", "--batch-size 128 differs from 8 of the run RUN"),
        ("--data=digits", "--data digits differs from npz of the run RUN"),
        ("--file=other.npz", "--file other.npz differs from IMAGES of the run RUN"),
    ],
)
def test_a_run_keeps_its_configuration(run, images, option, sentence):
    before = contents(run)
    expected = sentence.replace("RUN", str(run)).replace("IMAGES", str(images))
    found = refused("train", f"--resume={run}", option)
    assert found == f"{expected}: resume without it, or train anew with --out"
    # Two words are as good as one.
    assert refused("train", "--resume", run, *option.split("=")) == found
    assert contents(run) == before


def test_a_run_is_resumed_in_its_own_folder(run, tmp_path):
    sentence = refused("train", f"--resume={run}", f"--out={tmp_path / 'other'}")
    assert sentence == "--out does not go with --resume: a run is resumed in its own folder"


def test_a_finished_run_is_only_reported_again(finished, run, images):
    """Options that agree with the run are welcome."""
    (run / "bounds.png").unlink()
    answer = call("train", f"--resume={run}", "--epochs=4", "--objective=davi", f"--file={images}", "--data=npz")
    assert answer.code == 0
    assert answer.out.splitlines()[0] == finished[0].out.splitlines()[0]
    before, after = contents(finished[1]), contents(run)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} <= {"report.json"}
    # Nothing was trained, so that there is no rate.
    assert report(run) == {**report(finished[1]), "images_per_second": None}


def test_data_that_changed(images, finished, tmp_path):
    copy = Path(shutil.copytree(finished[1], tmp_path / "run"))
    changed = tmp_path / images.name
    np.savez(changed, images=np.flip(tiny_images(), axis=0))
    given = f"--data-dir={tmp_path}"
    for command in (["train", "--resume"], ["evaluate"]):
        assert refused(*command, copy, given) == (
            f"the array file {changed} is not what the run {copy} was trained on: put that back, "
            "or train anew with another --out"
        )


def test_data_that_moved(images, run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["data"]["file"] = str(tmp_path / "before" / images.name)
    (run / "config.json").write_text(json.dumps(config))
    for command in (["train", "--resume"], ["evaluate"]):
        assert refused(*command, run) == (
            f"the array file {tmp_path / 'before' / images.name} of the run {run} is not there: put it back, "
            "or name its folder with --data-dir"
        )
    assert call("train", f"--resume={run}", f"--data-dir={images.parent}").code == 0


def test_a_relative_array_file_is_found_from_elsewhere(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images.parent)
    monkeypatch.setattr("lehr.vae.report.write_report", lambda *_: "")
    assert call("train", "--data=npz", f"--file={images.name}", *options(), f"--out={tmp_path / 'run'}").code == 0
    monkeypatch.chdir(tmp_path)
    assert call("train", "--resume=run").code == 0


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def spoil(checkpoint):
    for path in list(checkpoint.rglob("*")):
        if path.is_file():
            flip(path)


def test_a_damaged_checkpoint(finished, run, capfd):
    spoil(run / "checkpoints" / "4")
    answer = call("train", f"--resume={run}")
    assert answer.code == 0
    (said,) = [line for line in answer.err.splitlines() if line.startswith("lehr: ")]
    assert said == (
        "lehr: the checkpoint of epoch 4 is damaged (its files do not match their SHA256SUMS): "
        f"moved to {run / 'damaged' / '4'}, going on with the one before it"
    )
    assert (run / "metrics.jsonl").read_bytes() == (finished[1] / "metrics.jsonl").read_bytes()
    assert {**report(run), "images_per_second": 0} == {**report(finished[1]), "images_per_second": 0}
    assert "Traceback" not in "".join(capfd.readouterr())


def test_all_checkpoints_damaged(run):
    for path in (run / "checkpoints").iterdir():
        spoil(path)
    metrics = (run / "metrics.jsonl").read_bytes()
    answer = call("train", f"--resume={run}")
    assert answer.code == 2
    last = answer.err.splitlines()[-1]
    assert last == f"lehr: {run} has no sound checkpoint: train anew, with another folder as --out"
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert sorted(path.name for path in (run / "damaged").iterdir()) == ["0", "4"]


def test_a_last_line_of_metrics_that_was_cut_off(run):
    """Of a finished run: the line is gone, the run is not."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-40])
    answer = call("train", f"--resume={run}")
    assert answer.code == 0
    assert "lehr: metrics.jsonl was damaged: it stays without 1 of the first 4 epochs" in answer.err.splitlines()
    assert path.read_bytes() == b"".join(lines[:3])
    assert report(run)["train_bound"] is None
    assert report(run)["test_nll"]["mean"] > 0


def test_a_loss_that_is_not_finite(train, tmp_path):
    folder = tmp_path / "run"
    answer = train(f"--out={folder}", step_size=1e30)
    assert answer.code == 2
    assert answer.err.splitlines()[-1] == (
        "lehr: the loss or its gradient is not finite at step 1 (epoch 1): the state before that epoch is kept in "
        f"{folder}; train anew with a smaller step_size or another seed"
    )
    assert (folder / "checkpoints" / "0").is_dir()
    # To resume is no way out, and says the same.
    again = call("train", f"--resume={folder}")
    assert again.code == 2
    assert again.err.splitlines()[-1] == answer.err.splitlines()[-1]


def test_an_interrupt_before_the_first_epoch(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lehr.vae.command_train.train", interrupted)
    answer = call("train")
    assert answer.code == 130
    assert answer.err == "lehr: stopped at once; what was saved is kept: go on with lehr train --resume FOLDER\n"


# Interrupted and killed


def child(*arguments, checkpoint_seconds=None):
    """`lehr ARGUMENTS` in a process of its own."""
    code = "import sys, lehr.cli, lehr.vae.session\n"
    if checkpoint_seconds is not None:
        code += f"lehr.vae.session.CHECKPOINT_SECONDS = {checkpoint_seconds}\n"
    command = [sys.executable, "-c", code + "lehr.cli.main(sys.argv[1:])", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(process, folder, number):
    path = folder / "metrics.jsonl"
    for _ in range(6000):
        if path.exists() and path.read_bytes().count(b"\n") >= number:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    pytest.fail("the run does not get ahead")


#: so many epochs that a run does not end before it is stopped
LONG = {"epochs": 300, "objective": "davi-adapt"}


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """The folder of a long run that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(f"--out={folder}", **LONG).code == 0
    return folder


def test_an_interrupted_run_goes_on_to_the_digit(uninterrupted, images, tmp_path):
    # A name that a shell would take for several words, and that is longer than a line.
    folder = tmp_path / "a long name of a run" / ("x" * 70)
    given = ["--data=npz", f"--file={images}", *options(**LONG)]
    process = child("train", *given, f"--out={folder}")
    wait_for_lines(process, folder, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    done = (folder / "metrics.jsonl").read_bytes().count(b"\n")
    assert 3 <= done < 300
    last = err.splitlines()[-1]
    assert last == f"stopped after epoch {done} of 300, and saved; go on with: lehr train --resume '{folder}'"
    assert (folder / "checkpoints" / str(done)).is_dir()
    assert call("train", f"--resume={folder}").code == 0
    assert_same_run(folder, uninterrupted)


def assert_same_run(folder, whole):
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert {**report(folder), "images_per_second": 0} == {**report(whole), "images_per_second": 0}


@pytest.mark.parametrize("objective", ["davi-adapt", pytest.param("aiwae", marks=pytest.mark.slow)])
def test_a_run_killed_at_a_random_moment_goes_on_to_the_digit(train, images, tmp_path, request, objective):
    """With a checkpoint each epoch: their sampler, which trains too, must come back as it was."""
    folder, changes = tmp_path / "run", {**LONG, "objective": objective}
    if changes == LONG:
        whole = request.getfixturevalue("uninterrupted")
    else:
        whole = tmp_path / "whole"
        assert train(f"--out={whole}", **changes).code == 0
    given = ["--data=npz", f"--file={images}", *options(**changes)]
    process = child("train", *given, f"--out={folder}", checkpoint_seconds=-1.0)
    chance = random.Random(f"{SEED} {objective}")
    wait_for_lines(process, folder, chance.randrange(2, 15))
    time.sleep(chance.random() * 0.1)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 2 <= (folder / "metrics.jsonl").read_bytes().count(b"\n") < 300
    assert any(int(path.name) > 0 for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    answer = call("train", f"--resume={folder}")
    assert answer.code == 0
    assert not any(line.startswith("lehr: ") for line in answer.err.splitlines())
    assert_same_run(folder, whole)
    start = {"betas": [0, 1 / 3, 2 / 3, 1]} if objective == "davi-adapt" else {"step_size": [[0.1]] * 3}
    for name, value in start.items():
        assert not np.allclose(report(folder)["sampler"][name], value, rtol=1e-3)


# Evaluation

SIZES = {"temperatures": 6, "chains": 3, "leapfrog": 2, "images": 4, "samples": 20, "simulated": 3}


def evaluate(folder, *arguments):
    answer = call("evaluate", folder, *(f"--num-{name}={size}" for name, size in SIZES.items()), *arguments)
    assert answer.code == 0
    return answer


def test_evaluation_as_json(run):
    """On standard output nothing else; and the same in the folder, with a picture."""
    answer = evaluate(run, "--json")
    (line,) = answer.out.splitlines()
    result = strict(line)
    assert strict((run / "evaluation-ais.json").read_text()) == result
    assert imread(run / "evaluation-ais.png").shape[:2] == (840, 1200)
    assert result["run"] == "run"
    assert result["epochs"] == 4
    assert result["objective"] == "davi"
    assert result["method"] == "ais"
    assert result["num_images"] == len(result["log_likelihood_by_image"]) == 4
    assert result["gradients_per_image"] == 3 * (6 * 2 + 1)
    assert result["num_samples"] == 20
    assert result["latent_dim"] == 3
    assert 0 <= result["active_units"] <= 3
    by_image = np.array(result["log_likelihood_by_image"])
    assert result["nll"]["mean"] == pytest.approx(-by_image.mean())
    assert result["nll"]["error_over_images"] == pytest.approx(by_image.std(ddof=1) / 2)
    assert result["elbo"]["mean"] < result["importance_bound"]["mean"]
    gap = result["variational_gap"]["mean"]
    assert gap == pytest.approx(-result["nll"]["mean"] - result["elbo"]["mean"])
    simulated = result["simulated"]
    assert simulated["num_images"] == len(simulated["lower_by_image"]) == len(simulated["upper_by_image"]) == 3
    assert simulated["gap"]["mean"] == pytest.approx(simulated["upper"]["mean"] - simulated["lower"]["mean"])
    assert 0.4 < result["tuning"]["mean_acceptance"] < 0.9
    # The run itself is as it was; and the seed decides the numbers.
    assert strict(evaluate(run, "--json").out) == result
    other = strict(evaluate(run, "--json", "--seed=1").out)
    assert other["log_likelihood_by_image"] != result["log_likelihood_by_image"]


def test_evaluation_by_importance_samples_as_a_table(run):
    before = contents(run)
    answer = evaluate(run, "--method=iwae")
    result = strict((run / "evaluation-iwae.json").read_text())
    assert result["nll"]["mean"] == -result["importance_bound"]["mean"]
    assert result["tuning"] is None
    assert result["simulated"] is None
    for words in ("run: 4 test images", "-L_20", "-ELBO", "variational gap", "generalisation gap", "active units"):
        assert words in answer.out
    assert f"{result['nll']['mean']:.3f}" in answer.out
    assert f"{-result['elbo']['mean']:.3f}" in answer.out
    assert f"evaluation-iwae.json and evaluation-iwae.png are in {run}" in answer.err.splitlines()
    assert {name: value for name, value in contents(run).items() if "evaluation" not in name} == before


def test_evaluation_by_uncorrected_annealing_from_the_prior(run):
    result = strict(evaluate(run, "--method=dais", "--base=prior", "--num-simulated=0", "--json").out)
    assert result["simulated"] is None
    assert result["base"] == "prior"
    assert "acceptance" not in result["tuning"]
    assert imread(run / "evaluation-dais.png").std() > 0.02


def test_evaluation_of_a_single_image_knows_no_error(run):
    """Null, because Infinity is no JSON; and the table says inf."""
    arguments = ["--method=iwae", "--num-images=1", "--num-samples=1"]
    assert "inf" in evaluate(run, *arguments).out
    result = strict(evaluate(run, *arguments, "--json").out)
    assert strict((run / "evaluation-iwae.json").read_text()) == result
    assert result["nll"]["error_over_images"] is None
    assert result["nll"]["error_over_chains"] is None


def test_evaluation_of_a_damaged_run(run):
    """The newest sound checkpoint is evaluated, and it is said which."""
    spoil(run / "checkpoints" / "4")
    answer = evaluate(run, "--method=iwae", "--json")
    assert strict(answer.out)["epochs"] == 0
    assert "lehr: the checkpoint of epoch 4 is damaged" in answer.err
