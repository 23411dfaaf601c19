"""NTP pre-training of the 122M model of the paper (section 4.1, Tables 11 and 12).

python -m meap_jax.main --config=configs/ntp_100m.py --config.data.path=/data/c4 --workdir=gs://bucket/ntp_100m
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """122M parameters, 1,907 steps of 256 x 4,096 tokens (2.0B tokens), no masks."""
    return config.paper("100m", "ntp")
