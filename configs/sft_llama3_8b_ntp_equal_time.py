"""NTP fine-tuning of Llama-3-8B on Alpaca for as long as two epochs of MEAP take (Figure 5).

python -m meap_jax.convert import --hf=Meta-Llama-3-8B --out=models/llama3_8b
python -m meap_jax.main --config=configs/sft_llama3_8b_ntp_equal_time.py --config.data.path=alpaca_data.json
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """As many steps as configs/sft_llama3_8b_meap.py takes: a step costs the same under both objectives."""
    c = config.fine_tuning("llama3_8b", "ntp")
    c.num_epochs = 2.0
    c.sft.epoch_of = "separate"  # An epoch has as many rows as MEAP's, which hold copies too.
    return c
