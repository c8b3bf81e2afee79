"""Image data for the variational autoencoders: digits, MNIST, Omniglot, or arrays of the user's own.

Files are looked for in `data_dir`, else in the folder that the environment variable `LEHR_DATA` names, either
directly there or in a subfolder called after the data set. Every fault in them is an `InputError`.
"""

import gzip
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lehr.errors import InputError
from lehr.vae.setting import check_name

NAMES = ("digits", "mnist", "omniglot", "npz")

_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
# SHA-256 of the uncompressed content: gzip headers differ from mirror to mirror, the images do not.
_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}
_OMNIGLOT_URL = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"


@dataclass(frozen=True, eq=False)
class ImageData:
    """Grey images in two parts, one flattened image a row.

    Attributes:
        name: the data set's name.
        train: (n_train, num_pixels) float32 in [0, 1].
        test: (n_test, num_pixels) float32 in [0, 1].
        image_shape: (height, width); `row.reshape(image_shape)` is the upright image.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    image_shape: tuple[int, int]

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of a SHA-256 of the contents, by which a resumed run knows its data."""
        digest = hashlib.sha256(repr((self.train.shape, self.test.shape, self.image_shape)).encode())
        digest.update(self.train.tobytes())
        digest.update(self.test.tobytes())
        return digest.hexdigest()[:16]


def load(name: str, data_dir: Path | None = None, *, file: Path | None = None) -> ImageData:
    """Load a data set by its name.

    - `digits`: scikit-learn's 1,797 digits of 8x8 pixels; every fifth image is test.
    - `mnist`: LeCun, Cortes and Burges, 28x28, the official idx files, gzipped or not; downloaded when no `data_dir`
      is given and `LEHR_DATA` has no such file.
    - `omniglot`: Lake et al. (2015), 28x28, as `chardata.mat` of Burda et al. (2016).
    - `npz`: the arrays `train` and `test` of `file`; or its array `images`, or its only array, of which every tenth
      image is test. Shape (n, height, width) or (n, num_pixels), floats in [0, 1].

    Args:
        name: one of `NAMES`.
        data_dir: the folder with the files; `LEHR_DATA` when None.
        file: the user's array file; only with `npz`.

    Raises:
        InputError: the name is unknown, or a file is missing, damaged, or holds no such images.
    """
    check_name("data set", name, NAMES)
    if (name == "npz") != (file is not None):
        raise InputError("the data set 'npz' needs your array file, and only it takes one: give file= with 'npz'.")
    if file is not None:
        return _load_npz(Path(file))
    return {"digits": _load_digits, "mnist": _load_mnist, "omniglot": _load_omniglot}[name](data_dir)


def binarise(key: PRNGKeyArray, images: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Draw each pixel of `images`, grey levels in [0, 1], as a Bernoulli variable with that mean; uses up `key`.

    With a new key for each batch this is the dynamic binarisation of Burda, Grosse and Salakhutdinov (2016).
    Returns float32 zeros and ones of the same shape.
    """
    return jax.random.bernoulli(key, images).astype(jnp.float32)


def fixed_binarisation(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw a `binarise` on the host, the same in every run with this `seed`: float32 of the shape of `images`."""
    # The generator is named, so that the user's jax_default_prng_impl does not change the test set.
    return np.asarray(binarise(jax.random.key(seed, impl="threefry2x32"), images))


def fixed_subset(images: np.ndarray, size: int) -> np.ndarray:
    """The first `size` images of a fixed shuffle, in their `fixed_binarisation`: (min(size, n), num_pixels) float32.

    Files are often sorted (Omniglot by alphabet), so the first images of a file are no fair sample; and a larger subset
    holds every smaller one, image for image.
    """
    order = np.random.default_rng(0).permutation(len(images))
    return fixed_binarisation(images)[order[:size]]


def _load_digits(data_dir: Path | None) -> ImageData:
    from sklearn.datasets import load_digits  # ships inside scikit-learn, so no folder is looked into

    images, _ = load_digits(return_X_y=True)
    train, test = _hold_out(np.asarray(images, np.float32) / 16, every=5)
    return ImageData("digits", train, test, (8, 8))


def _load_mnist(data_dir: Path | None) -> ImageData:
    parts = []
    for stem, sha256 in _MNIST_SHA256.items():
        path = _find("mnist", (stem, f"{stem}.gz"), data_dir) or _download(f"{_MNIST_URL}{stem}.gz")
        content = _read(path, sha256)
        # An idx3 file: a magic number, the number of images, height, width (big-endian int32), then the pixels.
        count, height, width = map(int, np.frombuffer(content, ">i4", count=3, offset=4))
        pixels = np.frombuffer(content, np.uint8, offset=16).reshape(count, height * width)
        parts.append((pixels.astype(np.float32) / 255, (height, width)))
    (train, image_shape), (test, _) = parts
    return ImageData("mnist", train, test, image_shape)


def _load_omniglot(data_dir: Path | None) -> ImageData:
    from scipy.io import loadmat

    path = _find("omniglot", ("chardata.mat",), data_dir)
    if path is None:
        # Not downloaded: no checksum of the published file was at hand, and none can be pinned unseen.
        where = "put it into the folder omniglot under the folder that LEHR_DATA names"
        raise InputError(f"Omniglot's chardata.mat was not found: download {_OMNIGLOT_URL} and {where}.")
    try:
        with path.open("rb") as stream:
            arrays = loadmat(stream, variable_names=("data", "testdata"))
        columns = [arrays[key].astype(np.float32) for key in ("data", "testdata")]
        parts = [part.T.reshape(part.shape[1], 28, 28) for part in columns]
    except Exception as error:  # scipy raises many kinds on a damaged file, its own and Python's
        raise _damaged(path, "it has no MATLAB arrays 'data' and 'testdata' of 784 rows, a column an image") from error
    # The published grey images are stored column by column (so the loader of yburda/iwae transposes them); copies
    # thresholded to 0 and 1 from Lake's pictures are stored row by row. Both must come out upright.
    if ((parts[0] > 0) & (parts[0] < 1)).any():
        parts = [part.transpose(0, 2, 1) for part in parts]
    train, test = (_checked(part, f"Omniglot in {path}").reshape(-1, 28 * 28) for part in parts)
    return ImageData("omniglot", train, test, (28, 28))


def _load_npz(file: Path) -> ImageData:
    if not file.is_file():
        raise InputError(f"there is no array file {file}: give the path of a file written with np.savez.")
    if not zipfile.is_zipfile(file):
        raise InputError(f"{file} is not an npz file, or is truncated: write it again with np.savez.")
    with np.load(file, allow_pickle=False) as archive:
        names = archive.files
        keys = next((keys for keys in (["train", "test"], ["images"]) if set(keys) <= set(names)), names)
        if len(keys) != 1 and keys != ["train", "test"]:
            found = ", ".join(names) or "none"
            raise InputError(f"{file} must hold the arrays 'train' and 'test', or 'images' (it has: {found}).")
        try:
            arrays = [np.asarray(archive[key]) for key in keys]
        except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            message = f"{file} is damaged or holds Python objects: write plain float arrays with np.savez."
            raise InputError(message) from error
    images, *rest = (_checked(array, f"array {key!r} in {file}") for key, array in zip(keys, arrays))
    if not rest and len(images) < 2:
        raise InputError(f"{file} holds one image: give at least two, so that one can be held out as test.")
    train, test = (images, *rest) if rest else _hold_out(images, every=10)
    if train.shape[1:] != test.shape[1:]:
        shapes = f"{train.shape[1:]} and {test.shape[1:]}"
        raise InputError(f"'train' and 'test' in {file} hold images of shapes {shapes}: give both the same shape.")
    image_shape = _image_shape(train.shape[1:])
    return ImageData("npz", train.reshape(len(train), -1), test.reshape(len(test), -1), image_shape)


def _checked(images: np.ndarray, what: str) -> np.ndarray:
    """`images` as float32, known to be a non-empty stack of images with every pixel in [0, 1]."""
    if images.dtype.kind not in "fb":
        remedy = "divide by 255 and give" if images.dtype.kind in "iu" else "give"
        raise InputError(f"{what} has dtype {images.dtype}: {remedy} floats in [0, 1].")
    if images.ndim not in (2, 3):
        raise InputError(f"{what} has shape {images.shape}: give (n, height, width) or (n, num_pixels).")
    if images.size == 0:
        raise InputError(f"{what} is empty, of shape {images.shape}: give at least one image.")
    low, high = images.min(), images.max()
    if np.isnan(low):
        raise InputError(f"{what} holds NaN: remove or mend those images.")
    if low < 0 or high > 1:
        raise InputError(f"{what} has values from {low:g} to {high:g}: rescale them to [0, 1].")
    return images.astype(np.float32)


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The height and width of images of `shape`; a flat image is square when it can be, else a single row."""
    if len(shape) == 1:
        side = math.isqrt(shape[0])
        return (side, side) if side * side == shape[0] else (1, shape[0])
    height, width = shape
    return height, width


def _hold_out(images: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Split into train and test, where the first image of each run of `every` is test."""
    is_test = np.arange(len(images)) % every == 0
    return images[~is_test], images[is_test]


def _find(name: str, filenames: Sequence[str], data_dir: Path | None) -> Path | None:
    """The first of `filenames` that exists, None when the user named no folder and it may be had elsewhere."""
    folder = data_dir if data_dir is not None else os.environ.get("LEHR_DATA")
    if not folder:
        return None
    folder = Path(folder).expanduser()
    candidates = (parent / filename for parent in (folder / name, folder) for filename in filenames)
    found = next(filter(Path.is_file, candidates), None)
    if found is not None or data_dir is None:
        return found
    wanted = " or ".join(filenames)
    raise InputError(f"there is no {folder / name / filenames[0]}: put {wanted} there, or give another data folder.")


def _download(url: str) -> Path:
    import pooch

    try:
        # No hash here: `_read` checks the uncompressed content, in the cache as elsewhere.
        return Path(pooch.retrieve(url, known_hash=None, fname=url.rpartition("/")[2], path=pooch.os_cache("lehr")))
    except OSError as error:  # the base of every fault of requests, and of a cache that cannot be written
        remedy = "check the network, or put the file into the folder mnist under the folder that LEHR_DATA names"
        raise InputError(f"{url} could not be downloaded ({error}): {remedy}.") from error


def _read(path: Path, sha256: str) -> bytes:
    """The content of a file, gzipped or not, that must have the given SHA-256 when uncompressed."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, "its gzip stream is truncated or broken") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _damaged(path, "the SHA-256 of its uncompressed content is not the published one")
    return content


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged or another file ({why}): delete it or replace it with a fresh copy.")
