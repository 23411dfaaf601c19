"""The extension to longer sequences, from the files of SlimPajama to its first steps, in small."""

import json

import numpy as np
import pytest
import zstandard

from configs.long_context_64k import DOMAINS, get_config
from meap_jax import main
from meap_jax.corpus import prepare
from tiny_runs import ROOT, records

SMALL = {
    "model.num_layers": 1, "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 8, "model.embed_dim": 16,
    "model.mlp_dim": 24, "data.holdout": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def slimpajama(tmp_path_factory):
    """Two files as its own are: compressed lines with a text and the domain it is of."""
    folder = tmp_path_factory.mktemp("slimpajama")
    rng = np.random.default_rng(0)
    for name in ("example_train_0", "example_train_1"):
        lines = [
            {"text": f"{domain} {i} " + "word " * int(rng.choice([10, 300])),
             "meta": {"redpajama_set_name": f"RedPajama{domain}"}}
            for domain in DOMAINS for i in range(60)
        ]  # fmt: skip
        rng.shuffle(lines)
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(content))
    return folder


def flags(config, **fields):
    settings = SMALL | {name.replace("__", "."): value for name, value in fields.items()}
    return [f"--config={ROOT / 'configs' / config}", *(f"--config.{name}={value}" for name, value in settings.items())]


def test_the_config_says_what_the_paper_does():
    c = get_config()
    assert c.seq_len == 65_536 and c.model.rope_base == 640_000
    assert 3.99e9 < c.num_steps * c.global_batch_size * c.seq_len <= 4e9
    assert sum(DOMAINS.values()) == pytest.approx(100)


def test_a_short_run_is_taken_to_longer_sequences_of_upsampled_documents(slimpajama, tmp_path, capsys, caplog):
    words = flags(
        "meap_1b.py", num_steps=1, seq_len=32, global_batch_size=8, grad_accum_steps=1, data__path=slimpajama,
    )  # fmt: skip
    main.command(["main", *words, f"--workdir={tmp_path / 'short'}"])

    words = flags(
        "long_context_64k.py", num_steps=2, seq_len=128, global_batch_size=4, data__path=slimpajama,
        data__prepared=tmp_path / "data", **{f"data__sources__{domain}__long_from": 200 for domain in DOMAINS},
    )  # fmt: skip
    capsys.readouterr()
    prepare.command(["prepare", *words])
    counts = {line["source"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(counts) == list(DOMAINS)
    for line in counts.values():
        assert sum(line["documents"].values()) == 120
        # Half of the documents are short, and a tenth of these stays.
        assert line["splits"]["train"]["documents"] < 0.75 * line["documents"]["train"]

    main.command(["main", *words, f"--config.init_from={tmp_path / 'short'}", f"--workdir={tmp_path / 'long'}"])
    assert "computed otherwise: model.rope_base was 10000.0 and is now 640000.0" in caplog.text
    last = records(tmp_path / "long")[-1]
    assert last["step"] == 2 and last["mask_fraction"] > 0
    assert all(np.isfinite(last[f"validation_{domain}/loss"]) for domain in DOMAINS)
