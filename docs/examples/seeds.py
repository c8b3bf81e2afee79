"""Germination of Orobanche seeds (Crowder 1978, table 3): four logistic models, for `lehr compare`.

    lehr compare docs/examples/seeds.py:{roots,both,interaction,plates} --data docs/examples/seeds.json

On plate i, `germinated[i]` of `total[i]` seeds germinated, of type `seed_type[i]` (0: O. aegyptiaca 75, 1: O. aegyptiaca
73) in an extract of the root of a host plant, `extract[i]` (0: bean, 1: cucumber).
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist


def _germination(log_odds, total, germinated):
    numpyro.sample("germinated", dist.Binomial(total, logits=log_odds), obs=germinated)


def _coefficient(name):
    # Odds between two plants are rarely more than 20 to 1: log 20 = 3 is two standard deviations.
    return numpyro.sample(name, dist.Normal(0.0, 1.5))


def roots(total, germinated, seed_type, extract):
    """The extract matters, the type of the seed does not."""
    _germination(_coefficient("intercept") + _coefficient("extract") * extract, total, germinated)


def both(total, germinated, seed_type, extract):
    """Extract and type matter, each by itself."""
    log_odds = _coefficient("intercept") + _coefficient("extract") * extract + _coefficient("type") * seed_type
    _germination(log_odds, total, germinated)


def _interacting(seed_type, extract):
    both = _coefficient("extract") * extract + _coefficient("type") * seed_type
    return _coefficient("intercept") + both + _coefficient("interaction") * extract * seed_type


def interaction(total, germinated, seed_type, extract):
    """The effect of the extract depends on the type."""
    _germination(_interacting(seed_type, extract), total, germinated)


def plates(total, germinated, seed_type, extract):
    """The same, and plates differ by more than the binomial allows."""
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    # Standardised, so that the posterior has no funnel.
    plate = numpyro.sample("plate", dist.Normal(jnp.zeros(len(total)), 1.0).to_event(1))
    _germination(_interacting(seed_type, extract) + spread * plate, total, germinated)


if __name__ == "__main__":
    import json
    import sys

    import lehr
    from lehr.adapters.numpyro import simulator

    with open(sys.argv[1]) as file:
        data = {name: jnp.asarray(column) for name, column in json.load(file).items()}
    print(lehr.simulate_check(jax.random.key(0), simulator(plates, **data), num_simulations=8))
