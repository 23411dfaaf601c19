"""Two small layers, 2.9 million tokens: the models that `make quickstart` trains on two CPU cores.

They read documents that state two to seven facts, and are tested on documents of sixteen, too. Masked from the start,
so small a decoder does not learn to look facts up: with `--config.objective.ramp_from=0` training begins as NTP, and
masks come in between ramp_begin and ramp_end. Two heads of 32 learn it sooner and more surely than four of 16. What
came out is in docs/results/quickstart.md, and why the sizes are what they are in docs/results/onset.md.
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The quickstart's run; its objective is MEAP."""
    c = config.base()
    c.num_steps = 1_500
    c.global_batch_size = 8  # Splits over up to 8 devices, as a small TPU has.
    c.seq_len = 240  # The longest document, sixteen facts and as many questions, takes 235.

    c.objective.name = "meap"
    c.objective.update(dict(ramp_begin=0.4, ramp_end=0.6))
    c.objective.mask_id = 3  # [MASK] of a tokenizer that is trained on the corpus.

    c.model.num_layers = 2
    c.model.num_heads = 2
    c.model.num_kv_heads = 2
    c.model.head_dim = 32
    c.model.embed_dim = 64
    c.model.mlp_dim = 176
    c.model.vocab_size = 512
    c.model.unroll = 2

    c.optimizer.learning_rate = 2e-3

    c.data.mixture = "retrieval=1"
    c.data.retrieval.update(
        dict(
            num_keys=16,
            num_values=16,
            min_facts=2,
            num_facts=7,
            questions_per_fact=2.5,
            num_eval_facts=16,
            max_fillers=1,
            num_documents=40_000,
            num_eval_documents=300,
        )
    )

    c.log.every = 25
    c.eval.every = 150
    c.eval.max_rows = 300
    c.checkpoint.every = 300
    return c
