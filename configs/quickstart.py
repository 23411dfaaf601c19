"""Two small layers, a few million tokens: the pair that `make quickstart` trains on two CPU cores.

They read English of the standard library and documents that state two to five facts, and are then tested on documents
of twelve facts. Of more than 16 keys, or with a wider gap between a question's key and its answer, decoders of this
size learn nothing from so few tokens but to name a value of the context.
"""

import ml_collections

from meap_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The quickstart's run; its objective is MEAP."""
    c = config.base()
    c.num_steps = 1_000
    c.global_batch_size = 16  # Splits over up to 16 devices, such as the 8 of a small TPU.
    c.seq_len = 192  # The longest document, twelve facts and as many questions, takes 182.

    c.objective.name = "meap"
    c.objective.mask_id = 3  # [MASK] of a tokenizer that is trained on the corpus.

    c.model.num_layers = 2
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 16
    c.model.embed_dim = 64
    c.model.mlp_dim = 176
    c.model.vocab_size = 640

    c.optimizer.learning_rate = 3e-3

    c.data.mixture = "retrieval=0.85,stdlib=0.15"
    c.data.retrieval.update(
        dict(
            num_keys=16,
            num_values=16,
            min_facts=2,
            num_facts=5,
            questions_per_fact=2.5,
            num_eval_facts=12,
            max_fillers=2,
            num_documents=40_000,
            num_eval_documents=300,
        )
    )

    c.log.every = 25
    c.eval.every = 100
    c.eval.max_rows = 300
    c.checkpoint.every = 250
    return c
