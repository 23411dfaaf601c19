"""MEAP pre-training of the 1,176M model of the paper (section 4.1, Tables 11 and 12).

python -m meap_jax.main --config=configs/meap_1b.py --config.data.path=/data/c4 --workdir=gs://bucket/meap_1b
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """1,176M parameters, 190,000 steps of 256 x 4,096 tokens (199.2B tokens), 15 % of input tokens masked."""
    return config.paper("1b", "meap")
