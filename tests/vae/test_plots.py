"""The pictures: readable images of a sane size, whatever the numbers."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from lehr.vae import plots


@pytest.fixture
def path(tmp_path):
    return tmp_path / "picture.png"


def look(path):
    """The picture as grey levels, which shows something and is neither tiny nor huge."""
    picture = imread(path)[:, :, :3].mean(axis=2)
    assert min(picture.shape) > 60
    assert max(picture.shape) < 3000
    assert picture.std() > 0.02
    return picture


def metrics(num_epochs, test_bound=-90.0):
    return [{"epoch": n, "train_bound": -100.0 + n, "test_bound": test_bound} for n in range(1, num_epochs + 1)]


@pytest.mark.parametrize("num_epochs", [0, 1, 5, 100])
@pytest.mark.parametrize("test_bound", [-90.0, math.nan, -math.inf])
def test_bounds(path, num_epochs, test_bound):
    """A bound that was not finite leaves a hole, not an error at the end of a long run."""
    plots.draw_bounds(path, metrics(num_epochs, test_bound), "davi")
    look(path)


@pytest.mark.parametrize(("num_images", "image_shape"), [(30, (4, 4)), (1, (2, 3)), (13, (1, 10)), (30, (784, 1))])
def test_images(path, num_images, image_shape):
    images = np.random.default_rng(0).random((num_images, image_shape[0] * image_shape[1]))
    plots.draw_samples(path, images, image_shape)
    samples = look(path)
    plots.draw_reconstructions(path, images, 1 - images, image_shape)
    reconstructions = look(path)
    assert reconstructions.shape != samples.shape or np.any(reconstructions != samples)


def test_images_are_upright_and_in_order(path):
    """One black image of three, the second; and in it, one white pixel at the top right."""
    images = np.full((3, 2, 2), 0.5)
    images[1] = [[0, 1], [0, 0]]
    plots.draw_samples(path, images.reshape(3, 4), (2, 2))
    picture = look(path)
    rows, columns = np.nonzero(picture < 0.1)
    # The title is black as well; the sheet is ten images wide, and this one is the second.
    inside = (columns < 0.4 * picture.shape[1]) & (rows > 0.2 * picture.shape[0])
    rows, columns = rows[inside], columns[inside]
    assert 0.1 * picture.shape[1] < columns.mean() < 0.25 * picture.shape[1]
    top, left = rows < (rows.min() + rows.max()) / 2, columns < (columns.min() + columns.max()) / 2
    assert np.mean(top & left) > 0.2
    assert np.mean(~top & ~left) > 0.2
    assert np.mean(top & ~left) < 0.05


@pytest.mark.parametrize("step_size", [0.1, [[0.1], [0.2], [0.3]]])
@pytest.mark.parametrize("momentum_scale", [1.0, [1.0, 2.0]])
def test_schedule(path, step_size, momentum_scale):
    summary = {"betas": [0, 0.2, 0.5, 1], "step_size": step_size, "momentum_scale": momentum_scale}
    plots.draw_schedule(path, {**summary, "persistence": 0.9})
    look(path)


def result(**changes):
    """What `lehr evaluate` reports, as far as it is drawn."""
    bound = {"mean": -80.0, "error_over_images": 1.0, "error_over_samples": 0.1}
    return {
        "method": "ais",
        "num_samples": 50,
        "log_likelihood_by_image": [-80.0, -70.0, -95.0],
        "nll": {"mean": 79.0, "error_over_images": 1.0, "error_over_chains": 0.1},
        "elbo": bound,
        "importance_bound": bound,
        "tuning": {"beta": [0.5, 1.0], "step_size": [0.1, 0.2], "acceptance": [0.6, 0.7]},
        "simulated": {
            "lower_by_image": [-80.0, -81.0],
            "upper_by_image": [-79.0, -81.0],
            "gap": {"mean": 1.0, "error": 0.5},
        },
        **changes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "dais", "tuning": {"beta": [0.5, 1.0], "step_size": [0.1, 0.1]}},
        {"method": "iwae", "tuning": None, "simulated": None},
        {
            "log_likelihood_by_image": [-80.0],
            "nll": {"mean": 80.0, "error_over_images": math.inf, "error_over_chains": math.inf},
        },
        {"log_likelihood_by_image": [-80.0, -math.inf, math.nan]},
        {
            "log_likelihood_by_image": [math.nan],
            "nll": {"mean": math.nan, "error_over_images": math.nan, "error_over_chains": math.nan},
        },
        {"log_likelihood_by_image": [-80.0] * 3},
    ],
)
def test_evaluation(path, changes):
    plots.draw_evaluation(path, result(**changes))
    look(path)
