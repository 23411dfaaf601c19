"""The paper's 1.1B decoder taken from 4K to 64K tokens (section 4.1.2), on 4 billion tokens of SlimPajama.

python -m meap_jax.corpus.prepare --config=configs/long_context_64k.py --config.data.path='/slimpajama/chunk1/*' ...
python -m meap_jax.main --config=configs/long_context_64k.py --config.init_from=gs://bucket/meap_1b ...

The paper names the corpus, the tokens, RoPE's base and the method of Fu et al.: every domain of SlimPajama keeps its
share, and within it a tenth of the documents below 4,096 tokens stays (https://arxiv.org/abs/2402.10171, and its code).
It doesn't say whether masking goes on: here it does, and `--config.objective.name=ntp` ends it. Nor does it give a
learning rate or a batch: the rate is that of DIFF Transformer (https://arxiv.org/abs/2410.05258, section 3.3), which it
says to follow, and a step has the million tokens that a step of pre-training has.
"""

import ml_collections

from meap_jax import config

# Shares of SlimPajama's tokens in percent, from its dataset card, by `meta.redpajama_set_name` without "RedPajama".
DOMAINS = {
    "CommonCrawl": 52.2,
    "C4": 26.7,
    "Github": 5.2,
    "ArXiv": 4.6,
    "Book": 4.2,
    "Wikipedia": 3.8,
    "StackExchange": 3.3,
}


def get_config() -> ml_collections.ConfigDict:
    """Sixteen rows a step, the sequence of each over four devices."""
    c = config.paper("1b", "meap")
    c.seq_len = 65_536
    c.global_batch_size = 16
    c.grad_accum_steps = 1
    c.num_steps = 4_000_000_000 // (c.global_batch_size * c.seq_len)
    c.model.rope_base = 640_000.0
    c.model.remat = "full"
    c.optimizer.learning_rate = 8e-5
    c.mesh.context = 4

    with c.unlocked():
        del c.data.sources["text"]
    for domain in DOMAINS:
        config.add_source(
            c,
            domain,
            path=c.data.get_ref("path"),  # All of them read the same files.
            where=f"meta.redpajama_set_name=RedPajama{domain}",
            long_from=4_096,
            keep_shorter=0.1,
        )
    c.data.mixture = ",".join(f"{domain}={share}" for domain, share in DOMAINS.items())

    c.eval.every = 500
    c.eval.max_rows = 64
    c.checkpoint.every = 500
    return c
