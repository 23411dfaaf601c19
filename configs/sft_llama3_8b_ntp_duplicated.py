"""A control that the paper lacks: NTP fine-tuning of Llama-3-8B on MEAP's data, copies included, without masks.

python -m meap_jax.convert import --hf=Meta-Llama-3-8B --out=models/llama3_8b
python -m meap_jax.main --config=configs/sft_llama3_8b_ntp_duplicated.py --config.data.path=alpaca_data.json
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The rows of configs/sft_llama3_8b_meap.py; what is masked there is an answer like any other here."""
    c = config.fine_tuning("llama3_8b", "ntp")
    c.num_epochs = 2.0
    c.sft.arrangement = "separate"
    return c
