"""DAIS on Bayesian linear regression, exactly: its gap at any number of steps, with and without gradient noise."""

from lehr.linear_regression.gap import Gap, dais_gap, perfect_gap
from lehr.linear_regression.model import LinearRegression
from lehr.linear_regression.noise import AdditiveNoise, MiniBatchNoise

__all__ = ["AdditiveNoise", "Gap", "LinearRegression", "MiniBatchNoise", "dais_gap", "perfect_gap"]
