"""Loading images: the data sets, where they are looked for, and every fault a user can bring."""

import gzip
import hashlib
import os
from pathlib import Path

import jax
import numpy as np
import pooch
import pytest
import scipy.io

from lehr.errors import InputError
from lehr.vae import data

TRAIN_FILE, TEST_FILE = data._MNIST_SHA256
REAL_DATA = Path(os.environ.get("LEHR_DATA", "no folder"))


def real(path):
    return pytest.mark.skipif(not (REAL_DATA / path).is_file(), reason=f"LEHR_DATA has no {path}")


@pytest.fixture
def no_folder(monkeypatch):
    monkeypatch.delenv("LEHR_DATA", raising=False)


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """An MNIST of 3 + 2 images of 2x4 pixels, whose hashes are those that `load` expects."""
    hashes = {}
    for name, count in ((TRAIN_FILE, 3), (TEST_FILE, 2)):
        header = np.array([0x803, count, 2, 4], ">i4").tobytes()
        content = header + bytes(range(count * 8))
        (tmp_path / name).write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "_MNIST_SHA256", hashes)
    return tmp_path


def fails(*args, names, **kwargs):
    """`load` refuses with one line that contains each of `names`: the fault and its remedy."""
    with pytest.raises(InputError) as caught:
        data.load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert str(name) in message
    return message


def write(tmp_path, **arrays):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    return path


# Names


@pytest.mark.parametrize(("name", "near"), [("mnits", "'mnist'"), ("MNIST", "'mnist'"), ("digit", "'digits'")])
def test_unknown_name_offers_near_matches(name, near):
    fails(name, names=[f"unknown data set '{name}'; did you mean {near}? Known: digits, mnist, omniglot, npz"])


def test_unknown_name_without_near_match_lists_names():
    assert "did you mean" not in fails("cifar", names=["unknown data set 'cifar'", "Known: digits, mnist"])


@pytest.mark.parametrize(("name", "file"), [("npz", None), ("mnist", Path("mine.npz"))])
def test_array_file_and_npz_go_together(name, file):
    fails(name, file=file, names=["'npz' needs your array file", "give file="])


# Digits


def test_digits():
    digits = data.load("digits")
    assert digits.train.shape == (1437, 64)
    assert digits.test.shape == (360, 64)
    assert digits.image_shape == (8, 8)
    assert digits.train.dtype == digits.test.dtype == np.float32
    assert digits.train.min() == 0
    assert digits.train.max() == 1


def test_fingerprint_is_that_of_the_contents():
    digits, again = data.load("digits"), data.load("digits")
    assert digits.fingerprint == again.fingerprint
    again.test[0, 0] += 1
    assert digits.fingerprint != again.fingerprint


# MNIST


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("subfolder", [".", "mnist"])
@pytest.mark.parametrize("by_argument", [False, True])
def test_mnist_is_found(tiny_mnist, monkeypatch, gzipped, subfolder, by_argument):
    (tiny_mnist / subfolder).mkdir(exist_ok=True)
    for name in (TRAIN_FILE, TEST_FILE):
        content = (tiny_mnist / name).read_bytes()
        (tiny_mnist / name).unlink()
        target = tiny_mnist / subfolder / (f"{name}.gz" if gzipped else name)
        target.write_bytes(gzip.compress(content) if gzipped else content)
    monkeypatch.setenv("LEHR_DATA", "elsewhere" if by_argument else str(tiny_mnist))
    mnist = data.load("mnist", tiny_mnist if by_argument else None)
    assert mnist.image_shape == (2, 4)
    np.testing.assert_allclose(mnist.train, np.arange(24).reshape(3, 8) / 255, rtol=1e-6)
    np.testing.assert_allclose(mnist.test, np.arange(16).reshape(2, 8) / 255, rtol=1e-6)


def test_mnist_missing_from_given_folder(tmp_path):
    fails("mnist", tmp_path, names=["there is no", tmp_path / "mnist" / TRAIN_FILE, "put", f"{TRAIN_FILE}.gz"])


def test_mnist_with_wrong_hash(tiny_mnist):
    path = tiny_mnist / TEST_FILE
    path.write_bytes(path.read_bytes()[:-1])
    fails("mnist", tiny_mnist, names=[path, "damaged or another file", "SHA-256", "delete it or replace it"])


@pytest.mark.parametrize("spoil", [lambda gz: gz[:-12], lambda gz: gz[:12], lambda gz: gz[:10] + b"\xff" * 20])
def test_mnist_with_broken_gzip(tiny_mnist, spoil):
    plain = tiny_mnist / TRAIN_FILE
    path = tiny_mnist / f"{TRAIN_FILE}.gz"
    path.write_bytes(spoil(gzip.compress(plain.read_bytes())))
    plain.unlink()
    fails("mnist", tiny_mnist, names=[path, "truncated or broken", "delete it or replace it"])


@pytest.mark.parametrize("environment", [None, "a folder without the files"])
def test_mnist_is_downloaded_and_checked(tiny_mnist, monkeypatch, environment):
    urls = []

    def retrieve(url, *, fname, **_):
        urls.append(url)
        path = tiny_mnist / fname
        path.write_bytes(gzip.compress((tiny_mnist / path.stem).read_bytes()))
        return str(path)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    if environment is None:
        monkeypatch.delenv("LEHR_DATA", raising=False)
    else:
        monkeypatch.setenv("LEHR_DATA", environment)
    assert data.load("mnist").train.shape == (3, 8)
    assert urls == [f"https://storage.googleapis.com/cvdf-datasets/mnist/{n}.gz" for n in (TRAIN_FILE, TEST_FILE)]

    (tiny_mnist / TRAIN_FILE).write_bytes(b"<html>sign in to the network</html>")
    fails("mnist", names=[tiny_mnist / TRAIN_FILE, "damaged or another file", "delete it"])


def test_mnist_without_network(no_folder, monkeypatch):
    def retrieve(*_, **__):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    fails("mnist", names=["could not be downloaded (name resolution failed)", "check the network", "LEHR_DATA"])


@real("mnist/train-images-idx3-ubyte.gz")
def test_real_mnist():
    mnist = data.load("mnist")
    assert mnist.train.shape == (60000, 784)
    assert mnist.test.shape == (10000, 784)
    assert mnist.train.max() == 1
    # Upright digits are taller than they are wide.
    ink = mnist.test.reshape(-1, *mnist.image_shape) > 0.5
    assert ink.any(2).sum(1).mean() > 1.2 * ink.any(1).sum(1).mean()


# Omniglot


@pytest.mark.parametrize("published", [False, True])
def test_omniglot_is_upright(tmp_path, published):
    """The published file is grey and column by column; thresholded copies are row by row."""
    (tmp_path / "omniglot").mkdir()
    upright = np.zeros((3, 28, 28))
    upright[:, 2, 3:20] = 0.5 if published else 1
    columns = (upright.transpose(0, 2, 1) if published else upright).reshape(3, -1).T
    if not published:
        columns = columns.astype(np.uint8)
    scipy.io.savemat(tmp_path / "omniglot" / "chardata.mat", {"data": columns, "testdata": columns[:, :2]})
    omniglot = data.load("omniglot", tmp_path)
    assert omniglot.image_shape == (28, 28)
    assert omniglot.train.dtype == np.float32
    np.testing.assert_array_equal(omniglot.train, upright.reshape(3, -1))
    np.testing.assert_array_equal(omniglot.test, upright[:2].reshape(2, -1))


def test_omniglot_is_not_downloaded(no_folder):
    fails("omniglot", names=["not found", data._OMNIGLOT_URL, "folder omniglot", "LEHR_DATA"])


def test_omniglot_missing_from_given_folder(tmp_path):
    fails("omniglot", tmp_path, names=["there is no", tmp_path / "omniglot" / "chardata.mat", "put chardata.mat there"])


@pytest.mark.parametrize("fault", ["text", "truncated", "other arrays", "other size"])
def test_omniglot_damaged(tmp_path, fault):
    path = tmp_path / "chardata.mat"
    rows = 100 if fault == "other size" else 784
    pixels = np.random.default_rng(0).integers(0, 2, (rows, 20)).astype(float)
    key = "letters" if fault == "other arrays" else "data"
    scipy.io.savemat(path, {key: pixels, "testdata": pixels}, do_compression=True)
    if fault == "text":
        path.write_text("not a MATLAB file")
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    fails("omniglot", tmp_path, names=[path, "damaged or another file", "'data' and 'testdata'", "replace it"])


def test_omniglot_out_of_range(tmp_path):
    pixels = np.full((784, 2), 255.0)
    scipy.io.savemat(tmp_path / "chardata.mat", {"data": pixels, "testdata": pixels})
    fails("omniglot", tmp_path, names=["chardata.mat", "values from 255 to 255", "rescale"])


@real("omniglot/chardata.mat")
def test_real_omniglot():
    omniglot = data.load("omniglot")
    assert omniglot.train.shape == (24345, 784)
    assert 0 <= omniglot.train.min() < omniglot.train.max() <= 1
    # Over all alphabets, upright characters are a little taller than wide (15.6 pixels by 14.7).
    ink = omniglot.train.reshape(-1, *omniglot.image_shape) > 0.5
    assert ink.any(2).sum(1).mean() > 1.03 * ink.any(1).sum(1).mean()


# The user's own arrays


def test_npz_train_and_test(tmp_path):
    images = np.random.default_rng(0).random((5, 3, 4))
    mine = data.load("npz", file=write(tmp_path, train=images, test=images[:2], labels=np.arange(5)))
    assert mine.image_shape == (3, 4)
    np.testing.assert_array_equal(mine.train, images.reshape(5, 12).astype(np.float32))
    np.testing.assert_array_equal(mine.test, mine.train[:2])


@pytest.mark.parametrize("others", [{}, {"labels": np.arange(20)}])
def test_npz_holds_out_every_tenth(tmp_path, others):
    images = np.linspace(0, 1, 20)[:, None] * np.ones(9)
    mine = data.load("npz", file=write(tmp_path, images=images, **others))
    np.testing.assert_allclose(mine.test, images[[0, 10]], rtol=1e-6)
    assert len(mine.train) == 18


@pytest.mark.parametrize(("num_pixels", "image_shape"), [(9, (3, 3)), (10, (1, 10))])
def test_npz_of_flat_images(tmp_path, num_pixels, image_shape):
    mine = data.load("npz", file=write(tmp_path, whatever=np.ones((4, num_pixels), bool)))
    assert mine.image_shape == image_shape
    assert mine.train.dtype == np.float32


GOOD = np.full((4, 9), 0.5)


@pytest.mark.parametrize(
    ("arrays", "names"),
    [
        ({"images": (GOOD * 255).astype(np.uint8)}, ["'images'", "uint8", "divide by 255"]),
        ({"images": GOOD.astype(np.int64)}, ["int64", "divide by 255"]),
        ({"images": GOOD.astype(str)}, ["dtype <U", "give floats in [0, 1]"]),
        ({"images": GOOD.astype(object)}, ["Python objects", "write plain float arrays"]),
        ({"images": GOOD * 3}, ["values from 1.5 to 1.5", "rescale them to [0, 1]"]),
        ({"images": GOOD - 1}, ["values from -0.5 to -0.5", "rescale them to [0, 1]"]),
        ({"images": GOOD + np.inf}, ["values from inf to inf", "rescale them to [0, 1]"]),
        ({"images": np.where(np.eye(4, 9) == 1, np.nan, GOOD)}, ["NaN", "remove or mend"]),
        ({"images": GOOD[0]}, ["shape (9,)", "give (n, height, width) or (n, num_pixels)"]),
        ({"images": GOOD.reshape(4, 3, 3, 1)}, ["shape (4, 3, 3, 1)", "give (n, height, width)"]),
        ({"images": GOOD[:0]}, ["empty", "(0, 9)", "at least one image"]),
        ({"images": GOOD[:1]}, ["holds one image", "give at least two"]),
        ({"train": GOOD, "test": GOOD[:0]}, ["'test'", "empty"]),
        ({"train": GOOD, "test": GOOD[:, :8]}, ["(9,) and (8,)", "give both the same"]),
        (
            {"train": GOOD.reshape(-1, 2, 6), "test": GOOD.reshape(-1, 6, 2)},
            ["(2, 6) and (6, 2)", "give both the same"],
        ),
        ({"a": GOOD, "b": GOOD}, ["must hold the arrays 'train' and 'test', or 'images'", "it has: a, b"]),
        ({}, ["it has: none"]),
    ],
)
def test_npz_refused(tmp_path, arrays, names):
    path = write(tmp_path, **arrays)
    fails("npz", file=path, names=[path, *names])


def test_npz_missing(tmp_path):
    fails("npz", file=tmp_path / "none.npz", names=["there is no array file", "none.npz", "give the path"])


@pytest.mark.parametrize("fault", ["text", "empty", "npy", "truncated"])
def test_not_an_npz_file(tmp_path, fault):
    path = write(tmp_path, images=GOOD)
    content = {"text": b"hello", "empty": b"", "npy": b"\x93NUMPY\x01\x00", "truncated": path.read_bytes()[:-60]}
    path.write_bytes(content[fault])
    fails("npz", file=path, names=[path, "not an npz file", "write it again with np.savez"])


def test_npz_with_damaged_array(tmp_path):
    path = write(tmp_path, images=GOOD)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    fails("npz", file=path, names=[path, "damaged", "np.savez"])


# Binarisation


def test_binarise_has_the_grey_levels_as_means():
    grey = np.tile(np.array([0, 0.25, 0.9, 1], np.float32), (20_000, 1))
    pixels = data.binarise(jax.random.key(0), grey)
    assert pixels.shape == grey.shape
    assert pixels.dtype == np.float32
    assert set(np.unique(pixels)) == {0, 1}
    # Standard error of each mean: at most 0.5 / sqrt(20000) = 0.0035.
    np.testing.assert_allclose(pixels.mean(0), grey[0], atol=0.015)
    np.testing.assert_array_equal(pixels[:, [0, 3]].mean(0), [0, 1])


def test_binarise_works_under_jit_and_varies_with_the_key():
    grey = np.full((10, 10), 0.5, np.float32)
    draw = jax.jit(data.binarise)
    np.testing.assert_array_equal(draw(jax.random.key(1), grey), data.binarise(jax.random.key(1), grey))
    assert (draw(jax.random.key(1), grey) != draw(jax.random.key(2), grey)).any()


def test_fixed_binarisation_is_fixed():
    grey = np.full((4, 6), 0.5, np.float32)
    once = data.fixed_binarisation(grey)
    assert isinstance(once, np.ndarray)
    np.testing.assert_array_equal(once, data.fixed_binarisation(grey))
    assert (once != data.fixed_binarisation(grey, seed=1)).any()
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(once, data.fixed_binarisation(grey))
