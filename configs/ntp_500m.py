"""NTP pre-training of the 481M model of the paper (section 4.1, Tables 11 and 12).

python -m meap_jax.main --config=configs/ntp_500m.py --config.data.path=/data/c4 --workdir=gs://bucket/ntp_500m
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """481M parameters, 10,000 steps of 256 x 4,096 tokens (10.5B tokens), no masks."""
    return config.paper("500m", "ntp")
