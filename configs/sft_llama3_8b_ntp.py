"""NTP fine-tuning of Llama-3-8B on Alpaca (section 4.2, Tables 5 and 8).

python -m meap_jax.convert import --hf=Meta-Llama-3-8B --out=models/llama3_8b
python -m meap_jax.main --config=configs/sft_llama3_8b_ntp.py --config.data.path=alpaca_data.json
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """4 epochs: as many tokens as two of MEAP by the paper's count, and more by ours."""
    return config.fine_tuning("llama3_8b", "ntp")
