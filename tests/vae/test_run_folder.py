"""The folder of a run: nothing is lost or mixed up, whatever happens to its files."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lehr.errors import InputError
from lehr.vae.run_folder import RunFolder, to_json


class State(eqx.Module):
    weight: jnp.ndarray
    epoch: jnp.ndarray
    static: str = eqx.field(static=True, default="kept")


def state(epoch):
    # Random, so that it is not compressed away: the largest file is the one with these numbers.
    return State(jnp.asarray(np.random.default_rng(epoch).random((100, 50)), jnp.float32), jnp.asarray(epoch))


def row(epoch, **changes):
    return {"epoch": epoch, "train_bound": -epoch / 3, "test_bound": -epoch / 7, **changes}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"seed": 1})
    yield folder
    folder.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of epochs 1, 2 and 3, to be copied."""
    folder = RunFolder.create(tmp_path_factory.mktemp("saved") / "run", {})
    for epoch in (1, 2, 3):
        folder.save(epoch, state(epoch))
        folder.append_metrics(row(epoch))
    folder.close()
    return folder.path


@pytest.fixture
def copy(saved, tmp_path):
    folder = RunFolder.open(Path(shutil.copytree(saved, tmp_path / "run")))
    yield folder
    folder.close()


def restored(folder):
    said = []
    found = folder.restore(state(0), said.append)
    np.testing.assert_array_equal(found.weight, state(int(found.epoch)).weight)
    assert found.static == "kept"
    return int(found.epoch), said


# Configuration


def test_a_new_folder_holds_its_configuration(tmp_path):
    RunFolder.create(tmp_path / "a" / "b", {"seed": 3})
    assert RunFolder.open(tmp_path / "a" / "b").config() == {"seed": 3}


def test_a_folder_with_other_files_may_hold_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("left", ["config.json", "metrics.jsonl", "checkpoints"])
def test_what_is_left_of_a_run_is_not_built_upon(saved, tmp_path, left):
    """A checkpoint of another run would be taken for one of this run."""
    (shutil.copytree if (saved / left).is_dir() else shutil.copy)(saved / left, tmp_path / left)
    with pytest.raises(InputError, match=f"{tmp_path} already holds a run: go on with it by --resume .*--out"):
        RunFolder.create(tmp_path, {})


def test_a_folder_without_a_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            InputError, match=r"holds no run \(config.json is missing\): give the folder that lehr train"
        ):
            RunFolder.open(path)


@pytest.mark.parametrize("content", [b"", b'{"seed": 1', b"\xff\xfe\x00{", b"not json"])
def test_a_damaged_configuration_is_named(folder, content):
    (folder.path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config.json is damaged \(.*\): restore it, or train anew"):
        folder.config()


# Metrics


def test_metrics_are_lines_of_json(folder):
    rows = [row(1), row(2, test_bound=math.nan, train_bound=-math.inf)]
    for each in rows:
        folder.append_metrics(each)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == rows[0]
    # Not finite is null: NaN and Infinity are no JSON.
    assert json.loads(lines[1], parse_constant=pytest.fail) == row(2, test_bound=None, train_bound=None)
    assert math.isnan(folder.metrics()[1]["test_bound"])


def test_a_folder_without_metrics_has_none(folder):
    assert folder.metrics() == []


@pytest.mark.parametrize("left", [0, 1, 20, 60])
def test_a_last_line_that_was_cut_off_does_not_count(folder, left):
    for epoch in (1, 2, 3):
        folder.append_metrics(row(epoch))
    path = folder.path / "metrics.jsonl"
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[: min(left, len(last) - 5)])
    assert folder.metrics() == [row(1), row(2)]
    # And the next line is not glued to what is left of it.
    folder.rewind_metrics(2)
    folder.append_metrics(row(3))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"\x00\xff\xfe", b'{"epoch": 2}', b"17", b'{"epoch": "two"}', b"[]", b""])
def test_a_damaged_line_costs_that_line_only(folder, damage):
    lines = [to_json(row(1)).encode(), damage, to_json(row(3)).encode()]
    (folder.path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert folder.metrics() == [row(1), row(3)]
    assert folder.rewind_metrics(3) == [row(1), row(3)]


def test_metrics_are_rewound_to_an_epoch(folder):
    for epoch in (1, 2, 3):
        folder.append_metrics(row(epoch))
    before = (folder.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert folder.rewind_metrics(2) == [row(1), row(2)]
    assert (folder.path / "metrics.jsonl").read_bytes() == b"".join(before[:2])


def test_json_is_strict():
    content = {"a": [1.5, math.inf, (math.nan, -math.inf)], "b": {"c": math.nan}, "d": "NaN", "e": None, "f": True}
    text = to_json(content)
    expected = {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": "NaN", "e": None, "f": True}
    assert json.loads(text, parse_constant=pytest.fail) == expected


def test_a_file_is_whole_or_as_it_was(folder, monkeypatch):
    """A crash while it is written leaves the old one."""
    before = (folder.path / "config.json").read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.write_json("config.json", {"seed": 2})
    assert (folder.path / "config.json").read_bytes() == before


# Checkpoints


def test_the_newest_three_checkpoints_are_kept(folder):
    for epoch in range(5):
        folder.save(epoch, state(epoch))
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == ["2", "3", "4"]
    assert restored(folder) == (4, [])


def test_saving_an_epoch_again_is_no_fault(folder):
    for _ in range(2):
        folder.save(1, state(1))
    assert restored(folder) == (1, [])


def test_a_new_run_is_fresh_until_something_is_saved(folder):
    assert folder.is_fresh()
    folder.save(0, state(0))
    assert not folder.is_fresh()
    folder.close()
    shutil.rmtree(folder.path / "checkpoints")
    assert folder.is_fresh()
    # Metrics without checkpoints: something was lost, and is not to be overwritten.
    folder.append_metrics(row(1))
    assert not folder.is_fresh()


def files(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def largest(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


DAMAGE = {
    "flipped byte": lambda newest: flip(largest(newest)),
    "truncated": lambda newest: largest(newest).write_bytes(largest(newest).read_bytes()[:3000]),
    "missing file": lambda newest: largest(newest).unlink(),
    "missing state": lambda newest: shutil.rmtree(newest / "state"),
    "state of another": lambda newest: shutil.copytree(
        newest.parent / "2" / "state", newest / "state", dirs_exist_ok=True
    ),
    "flipped sum": lambda newest: flip(newest / "SHA256SUMS"),
    "empty": lambda newest: [path.unlink() for path in newest.rglob("*") if path.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy, damage):
    newest = copy.path / "checkpoints" / "3"
    DAMAGE[damage](newest)
    remains = files(newest)
    epoch, said = restored(copy)
    assert epoch == 2
    assert len(said) == 1
    aside = copy.path / "damaged" / "3"
    assert said[0].startswith("the checkpoint of epoch 3 is damaged (")
    assert said[0].endswith(f"): moved to {aside}, going on with the one before it")
    assert "\n" not in said[0]
    assert files(aside) == remains
    # Its epoch can be saved again, and is then the newest.
    copy.save(3, state(3))
    assert restored(copy) == (3, [])


def test_a_flipped_byte_in_any_file_never_gives_a_wrong_state(saved, tmp_path):
    """Whichever file: the values are right (`restored` compares them), of the newest or of the one before."""
    fell_back = 0
    for number, name in enumerate(files(saved / "checkpoints" / "3")):
        folder = RunFolder.open(Path(shutil.copytree(saved, tmp_path / str(number))))
        flip(folder.path / "checkpoints" / "3" / name)
        epoch, said = restored(folder)
        folder.close()
        assert (epoch, len(said)) in [(3, 0), (2, 1)]
        fell_back += epoch == 2
    assert fell_back >= 3


def test_a_checkpoint_without_sums_is_used(copy):
    """The run was killed in the instant before they were written; or is from an older version."""
    (copy.path / "checkpoints" / "3" / "SHA256SUMS").unlink()
    (copy.path / "checkpoints" / "3" / ".SHA256SUMS.partial").write_text("12")
    assert restored(copy) == (3, [])


def test_an_epoch_may_be_damaged_twice(copy):
    for name in ("3", "3-2", "3-3"):
        flip(largest(copy.path / "checkpoints" / "3"))
        copy.close()
        epoch, said = restored(copy)
        assert epoch == 2
        assert f"moved to {copy.path / 'damaged' / name}" in said[0]
        copy.save(3, state(3))
    assert restored(copy) == (3, [])


def test_all_checkpoints_damaged(copy):
    for epoch in (1, 2, 3):
        flip(largest(copy.path / "checkpoints" / str(epoch)))
    said = []
    with pytest.raises(InputError, match="has no sound checkpoint: train anew, with another folder as --out"):
        copy.restore(state(0), said.append)
    assert len(said) == 3
    assert sorted(path.name for path in (copy.path / "damaged").iterdir()) == ["1", "2", "3"]
    # Still no fresh run: to begin again there would mix two runs.
    assert not copy.is_fresh()


def test_the_rest_of_an_interrupted_save_is_ignored(copy):
    shutil.copytree(copy.path / "checkpoints" / "3", copy.path / "checkpoints" / "4.orbax-checkpoint-tmp")
    assert restored(copy) == (3, [])
    copy.save(4, state(4))
    assert restored(copy) == (4, [])


# A disk that is full


def assert_says_full(error, path):
    message = str(error.value)
    assert message.startswith(f"cannot write to {path} (No space left on device): make room there")
    assert message.endswith("what was saved before is kept")
    assert "\n" not in message


@pytest.mark.parametrize(
    "raised",
    [
        OSError(28, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error writing \"['a']/0\"\nFailed to write [os_error_code='28']"),
    ],
)
def test_no_space_for_a_checkpoint_whatever_is_raised(copy, monkeypatch, raised):
    def save(*_, **__):
        raise raised

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(InputError) as error:
        copy.save(4, state(4))
    assert_says_full(error, copy.path)
    assert restored(copy) == (3, [])


@pytest.mark.parametrize("raised", [ValueError("first line\nsecond line"), RuntimeError()])
def test_other_faults_of_saving_are_one_line(copy, monkeypatch, raised):
    def save(*_, **__):
        raise raised

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(InputError, match=rf"cannot write to .* \({'first line' if raised.args else 'RuntimeError'}\)"):
        copy.save(4, state(4))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if (
        sys.platform != "linux"
        or shutil.which("mount") is None
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk(small_disk, capfd):
    folder = RunFolder.create(small_disk / "run", {})
    folder.save(1, state(1))
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
    with pytest.raises(InputError) as error:
        folder.save(2, state(2))
    assert_says_full(error, folder.path)
    with pytest.raises(InputError) as error:  # noqa: PT012
        while True:
            folder.append_metrics(row(2))
    assert_says_full(error, folder.path)
    with pytest.raises(InputError) as error:
        RunFolder.create(small_disk / "other", {"x": "x" * 10_000})
    assert_says_full(error, small_disk / "other")
    assert restored(folder) == (1, [])
    folder.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_path_under_a_file_cannot_hold_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file/run \(Not a directory\): .* or use another folder"):
        RunFolder.create(tmp_path / "file" / "run", {})


def test_absl_speaks_again_afterwards(copy):
    before = logging.getLogger("absl").level
    assert before < logging.CRITICAL
    flip(largest(copy.path / "checkpoints" / "3"))
    restored(copy)
    assert logging.getLogger("absl").level == before
