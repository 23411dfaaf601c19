"""NTP fine-tuning of Mistral-7B-v0.2 on Alpaca (section 4.2, Tables 6 and 7).

python -m meap_jax.convert import --hf=Mistral-7B-v0.2 --out=models/mistral_7b_v02
python -m meap_jax.main --config=configs/sft_mistral_7b_v02_ntp.py --config.data.path=alpaca_data.json
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """4 epochs: as many tokens as two of MEAP by the paper's count, and more by ours."""
    return config.fine_tuning("mistral_7b_v02", "ntp")
