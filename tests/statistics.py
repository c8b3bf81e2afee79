"""Tests of random numbers, with one threshold for all: |z| < 5 fails by chance once in two million."""

import os

import numpy as np

THRESHOLD = 5.0
SEED = int(os.environ.get("LEHR_TEST_SEED", "0"))


def z_score(samples, expected) -> float:
    """How many standard errors the mean of independent `samples` is away from `expected`."""
    samples = np.asarray(samples, np.float64)
    return float((samples.mean() - expected) / (samples.std(ddof=1) / np.sqrt(len(samples))))


def two_sample_z_score(a, b) -> float:
    """How many standard errors the means of two independent samples are apart."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float((a.mean() - b.mean()) / np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))


def assert_mean(samples, expected) -> None:
    z = z_score(samples, expected)
    assert abs(z) < THRESHOLD, f"the mean {np.mean(samples)} is {z:.1f} standard errors from {expected}"


def weight_z_score(log_weights, log_z) -> float:
    """The z-score of the mean of w/Z against 1.

    The mean of the weights themselves is unbiased; that of log-mean-exp is not. A few giant weights would make both the
    mean and its standard error meaningless, and so hide a bias: the spread is asserted first.
    """
    w = np.exp(np.asarray(log_weights, np.float64) - log_z)
    assert np.all(np.isfinite(w))
    assert w.std() < 30, f"the weights' standard deviation is {w.std():.3g}: this setting cannot test anything"
    effective = w.sum() ** 2 / (w**2).sum()
    assert effective > 0.01 * len(w), f"the effective sample size is {effective:.0f} of {len(w)}"
    return z_score(w, 1.0)


def assert_unbiased_weights(log_weights, log_z) -> None:
    z = weight_z_score(log_weights, log_z)
    assert abs(z) < THRESHOLD, f"the mean of w/Z is {z:.1f} standard errors from 1"
