"""placeholder until recipe is tuned."""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The quickstart's run; its objective is MEAP."""
    c = config.base()
    c.objective.mask_id = 3
    c.model.vocab_size = 512
    c.data.mixture = "retrieval=1"
    return c
