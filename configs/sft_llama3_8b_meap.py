"""MEAP fine-tuning of Llama-3-8B on Alpaca (section 4.2, Tables 5 and 8).

python -m meap_jax.convert import --hf=Meta-Llama-3-8B --out=models/llama3_8b
python -m meap_jax.main --config=configs/sft_llama3_8b_meap.py --config.data.path=alpaca_data.json
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """2 epochs; copies of answers longer than 50 tokens, 10 % of them masked."""
    return config.fine_tuning("llama3_8b", "meap")
