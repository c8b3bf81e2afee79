"""Models against each other: Bayes factors and posterior model probabilities, with what the errors leave open."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lehr.errors import InputError
from lehr.report import Evidence, in_words, jsonable, table

_NUM_SIMULATIONS = 20_000
#: log Bayes factors in nats at which the next word of Kass and Raftery (1995, section 3.2) begins: 2 log B = 2, 6, 10
_STRENGTHS = (
    (5.0, "very strong"),
    (3.0, "strong"),
    (1.0, "positive"),
    (-math.inf, "not worth more than a bare mention"),
)


class RankedModel(NamedTuple):
    """One model of a comparison.

    Attributes:
        name: as given.
        log_evidence: in nats.
        standard_error: of the log evidence, in nats.
        bracket: of the log evidence, in nats, at 95 %.
        converged: whether its estimation converged.
        log_bayes_factor: log (Z_model / Z_best), in nats: 0 for the best, negative for the others.
        log_bayes_factor_error: sqrt(se_model^2 + se_best^2), in nats: 0 for the best.
        prior: prior probability of the model.
        probability: posterior probability of the model.
        probability_interval: its central 95 % interval under the errors of all log evidences.
        not_separated_from: the better models that the errors do not tell it from.
    """

    name: str
    log_evidence: float
    standard_error: float
    bracket: tuple[float, float]
    converged: bool
    log_bayes_factor: float
    log_bayes_factor_error: float
    prior: float
    probability: float
    probability_interval: tuple[float, float]
    not_separated_from: tuple[str, ...]

    @property
    def strength(self) -> str:
        """How strongly the best model is preferred to this one, in the words of Kass and Raftery 1995; "" if unknown.

        The words begin at log Bayes factors of 1 ("positive"), 3 ("strong") and 5 nats ("very strong").
        """
        if self.log_bayes_factor == 0 or not math.isfinite(self.log_bayes_factor_error):
            return ""
        return next(word for least, word in _STRENGTHS if -self.log_bayes_factor >= least)


class Comparison(NamedTuple):
    """Models in the order of their log evidence, the best first, and one sentence for each reservation."""

    models: tuple[RankedModel, ...]
    warnings: tuple[str, ...]

    @property
    def best(self) -> RankedModel:
        """The model with the largest log evidence, though the errors may not tell it from the next."""
        return self.models[0]

    @property
    def ranked(self) -> bool:
        """Whether every estimation converged and the errors tell every model from every other."""
        return not self.warnings

    def __str__(self) -> str:
        rows = []
        for model in self.models:
            low, high = model.probability_interval
            rows.append(
                (
                    model.name if len(model.name) <= 24 else model.name[:23] + "…",
                    in_words(model.log_evidence, model.standard_error),
                    in_words(model.log_bayes_factor, model.log_bayes_factor_error)
                    if model is not self.best
                    else "best",
                    f"{model.probability:.3f} [{low:.3f}, {high:.3f}]",
                    "yes" if model.converged else "NO",
                )
            )
        titles = ("model", "log evidence", "log Bayes factor", "probability [95 %]", "converged")
        widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
        lines = [
            "  ".join(
                f"{cell:<{width}}" if not column else f"{cell:>{width}}" for column, (cell, width) in enumerate(line)
            )
            for line in (list(zip(row, widths)) for row in [titles, *rows])
        ]
        conclusion = "\n".join(self.warnings) or "The errors tell every model from every other."
        strengths = [f"{self.best.name} over {m.name}: {m.strength}" for m in self.models[1:] if self._is_told(m)]
        notes = [("evidence", "\n".join(strengths))] if strengths else []
        return "\n".join([*lines, "", table([*notes, ("ranking" if self.ranked else "CAUTION", conclusion)])])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the models by rank and the warnings; numbers that are not finite become "inf", "-inf" or "nan"."""
        models = [model._asdict() | {"strength": model.strength} for model in self.models]
        return jsonable({"models": models, "warnings": self.warnings, "ranked": self.ranked})

    def plot(self, path: str | Path | None = None) -> Figure:
        """Two pictures, of the log evidences and the probabilities; written to `path` (PNG, PDF) if given."""
        from lehr.report_plot import draw_comparison

        return draw_comparison(self, path)

    def _is_told(self, model: RankedModel) -> bool:
        return bool(model.strength) and self.best.name not in model.not_separated_from


def compare(results: Mapping[str, Evidence], *, prior: Mapping[str, float] | None = None) -> Comparison:
    """Ranks models by their log evidence.

        log B_m = log Z_m - log Z_best,     se^2 = se_m^2 + se_best^2,
        P(m | data) = p_m Z_m / sum_j p_j Z_j,

    with errors that are independent, because every result comes from its own run (give each its own key). The interval
    of a probability is that of 20,000 draws of all log evidences from normal distributions with their standard errors;
    it does not know of a bias, such as that of a run that did not converge.

    Two models count as not separated if their brackets overlap. (The estimates then differ by at least the sum of both
    half widths, which is more than twice the error of their difference.)

    Arguments:
        results: what was estimated, by the name of the model; all for the same data.
        prior: prior probabilities by the same names, which sum to 1; equal by default.

    Raises `lehr.errors.InputError` for fewer than two models, a log evidence that is not finite, and prior
    probabilities that are negative, do not sum to 1, or belong to other names.

    **Gradient**: none.

    Source: Kass, Raftery 1995.
    """
    if len(results) < 2:
        raise InputError(f"a comparison needs at least two models, but there is {len(results)}: give each by its name")
    for name, result in results.items():
        if not math.isfinite(value := float(result.log_evidence)):
            raise InputError(f"the log evidence of '{name}' is {value}, which cannot be compared: leave the model out")
    names = sorted(results, key=lambda name: -float(results[name].log_evidence))
    prior = _checked_prior(results, prior)
    values = np.array([float(results[name].log_evidence) for name in names])
    errors = np.array([float(results[name].standard_error) for name in names])
    log_prior = np.array([math.log(prior[name]) if prior[name] > 0 else -math.inf for name in names])
    probabilities = _normalised(log_prior + values)
    intervals = _probability_intervals(log_prior, values, errors)
    models = tuple(
        RankedModel(
            name,
            float(values[rank]),
            float(errors[rank]),
            results[name].bracket,
            results[name].converged,
            float(values[rank] - values[0]),
            math.hypot(errors[rank], errors[0]) if rank else 0.0,
            prior[name],
            float(probabilities[rank]),
            intervals[rank],
            tuple(better for better in names[:rank] if not results[better].bracket[0] > results[name].bracket[1]),
        )
        for rank, name in enumerate(names)
    )
    return Comparison(models, _warnings(models))


def _checked_prior(results: Mapping[str, Evidence], prior: Mapping[str, float] | None) -> dict[str, float]:
    if prior is None:
        return dict.fromkeys(results, 1 / len(results))
    if set(prior) != set(results):
        raise InputError(
            f"prior probabilities are given for {', '.join(sorted(prior))}, but the models are "
            f"{', '.join(sorted(results))}: give one for each"
        )
    for name, value in prior.items():
        if not value >= 0:
            raise InputError(f"a prior probability is at least 0, but that of '{name}' is {value}")
    total = math.fsum(prior.values())
    if not abs(total - 1) < 1e-6:
        raise InputError(f"prior probabilities must sum to 1, but these sum to {total:g}")
    return {name: float(value) for name, value in prior.items()}


def _normalised(log_values: np.ndarray) -> np.ndarray:
    values = np.exp(log_values - np.max(log_values, axis=-1, keepdims=True))
    return values / np.sum(values, axis=-1, keepdims=True)


def _probability_intervals(log_prior: np.ndarray, values: np.ndarray, errors: np.ndarray) -> list[tuple[float, float]]:
    """Central 95 % intervals; the delta method would leave [0, 1] where the errors are large."""
    if not np.all(np.isfinite(errors)):
        # A model without an error could have any evidence.
        return [(0.0, 1.0)] * len(values)
    noise = np.random.default_rng(0).standard_normal((_NUM_SIMULATIONS, len(values)))
    low, high = np.quantile(_normalised(log_prior + values + errors * noise), [0.025, 0.975], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high)]


def _warnings(models: tuple[RankedModel, ...]) -> tuple[str, ...]:
    sentences = [
        f"'{model.name}' did not converge: its log evidence may be off by more than its error."
        for model in models
        if not model.converged
    ]
    for model in models:
        if model.not_separated_from:
            others = " and ".join(f"'{name}'" for name in model.not_separated_from)
            sentences.append(f"The errors do not tell '{model.name}' from {others}: run them longer to rank them.")
    return tuple(sentences)
