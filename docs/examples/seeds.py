"""Germination of Orobanche seeds (Crowder 1978, table 3): four logistic models, for `lehr compare`.

On plate i, `germinated[i]` of `total[i]` seeds germinated, of type `seed_type[i]` (0: O. aegyptiaca 75, 1: 73), in an
extract of the root of a host plant, `extract[i]` (0: bean, 1: cucumber). Coefficients have standard deviation
`prior_sd`.

    python docs/examples/seeds.py docs/examples/seeds.json

checks the estimator on data simulated from the last model.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist


def _log_odds(prior_sd, **terms):
    coefficients = {name: numpyro.sample(name, dist.Normal(0.0, prior_sd)) for name in ("intercept", *terms)}
    return coefficients["intercept"] + sum(coefficients[name] * column for name, column in terms.items())


def _germination(log_odds, total, germinated):
    numpyro.sample("germinated", dist.Binomial(total, logits=log_odds), obs=germinated)


def roots(total, germinated, seed_type, extract, prior_sd):
    """The extract matters, the type of the seed does not."""
    _germination(_log_odds(prior_sd, extract=extract), total, germinated)


def additive(total, germinated, seed_type, extract, prior_sd):
    """Extract and type matter, each by itself."""
    _germination(_log_odds(prior_sd, extract=extract, type=seed_type), total, germinated)


def interaction(total, germinated, seed_type, extract, prior_sd):
    """The effect of the extract depends on the type."""
    both = extract * seed_type
    _germination(_log_odds(prior_sd, extract=extract, type=seed_type, interaction=both), total, germinated)


def plates(total, germinated, seed_type, extract, prior_sd):
    """The same, and plates differ by more than the binomial allows."""
    log_odds = _log_odds(prior_sd, extract=extract, type=seed_type, interaction=extract * seed_type)
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    # Standardised: with sd `spread` the posterior would have a funnel.
    plate = numpyro.sample("plate", dist.Normal(jnp.zeros(len(total)), 1.0).to_event(1))
    _germination(log_odds + spread * plate, total, germinated)


def check(file):
    """On 8 data sets simulated from `plates`."""
    import lehr
    from lehr.adapters.numpyro import simulator

    data = {name: jnp.asarray(value) for name, value in json.loads(Path(file).read_text()).items()}
    print(lehr.simulate_check(jax.random.key(0), simulator(plates, **data)))


if __name__ == "__main__":
    check(sys.argv[1])
