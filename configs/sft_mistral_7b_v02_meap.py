"""MEAP fine-tuning of Mistral-7B-v0.2 on Alpaca (section 4.2, Tables 6 and 7).

python -m meap_jax.convert import --hf=Mistral-7B-v0.2 --out=models/mistral_7b_v02
python -m meap_jax.main --config=configs/sft_mistral_7b_v02_meap.py --config.data.path=alpaca_data.json
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """2 epochs; copies of answers longer than 50 tokens, 10 % of them masked."""
    return config.fine_tuning("mistral_7b_v02", "meap")
