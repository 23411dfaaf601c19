"""Two small layers that are fine-tuned as the paper fine-tunes 8 billion parameters, by `experiments.fine_tuning`.

The experiment pre-trains a decoder of this size, and sets `init_from`, `data.path` and the fields that differ between
its runs. By itself, from a folder that `meap_jax.convert import` wrote:

python -m meap_jax.main --config=configs/sft_quickstart.py --config.init_from=DIR --config.data.path=FILE.json
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Three epochs of MEAP, with a row of its own for each copy."""
    c = config.base()
    c.num_epochs = 3.0
    c.global_batch_size = 8
    c.seq_len = (
        448  # A context of eight documents, its answer and a second copy of that take 281; two samples fit in a row.
    )

    c.objective.update(dict(name="meap", mask_ratio=0.10, mask_id=3))
    # Two heads of 32 learn to look facts up sooner than four of 16.
    c.model.update(dict(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, embed_dim=64, mlp_dim=176))
    c.model.vocab_size = 512
    c.optimizer.update(dict(learning_rate=1e-3, final_fraction=0.0))

    c.init_from = "models/sft_quickstart"
    c.data.update(dict(mixture="text=1", tokenizer=c.get_ref("init_from") + "/tokenizer", holdout=0.1))
    c.data.sources.text.format = "chat"
    c.sft.template = "configs/sft_quickstart.jinja"
    c.sft.arrangement = "separate"

    c.log.every = 10
    c.eval.every = c.checkpoint.every = 0  # At the end of each epoch.
    c.eval.tasks = "validation"
    c.eval.batch_size = 50
    c.eval.seq_len = 448  # Questions about sixteen documents take 296, and 100 tokens are kept free for answers.
    return c
