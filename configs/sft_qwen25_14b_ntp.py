"""NTP fine-tuning of Qwen2.5-14B on Alpaca (section 4.2, Tables 6 and 7).

python -m meap_jax.convert import --hf=Qwen2.5-14B --out=models/qwen25_14b
python -m meap_jax.main --config=configs/sft_qwen25_14b_ntp.py --config.data.path=alpaca_data.json
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """4 epochs: as many tokens as two of MEAP by the paper's count, and more by ours."""
    return config.fine_tuning("qwen25_14b", "ntp")
