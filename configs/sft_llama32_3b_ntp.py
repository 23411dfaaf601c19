"""NTP fine-tuning of Llama-3.2-3B on Alpaca (section 4.2, Tables 6 and 7).

python -m meap_jax.convert import --hf=Llama-3.2-3B --out=models/llama32_3b
python -m meap_jax.main --config=configs/sft_llama32_3b_ntp.py --config.data.path=alpaca_data.json
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """4 epochs: as many tokens as two of MEAP by the paper's count, and more by ours."""
    return config.fine_tuning("llama32_3b", "ntp")
