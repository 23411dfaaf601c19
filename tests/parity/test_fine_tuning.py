"""Fine-tuning's loss and gradients beside PyTorch's, on rows with the official code's labels (MEAP-SFT/MEAP-SFT.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util

from meap_jax.hf.weights import hub_tensors, outgoing
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.objective import Objective, make_inputs, named_keys
from meap_jax.train import summed_loss
from tiny_models import mesh_of, numbers
from tiny_runs import tiny_config
from tiny_samples import END, MASK, RATIO, VOCAB, batch_of, chat_store, document, plan_spec, static_masks

IGNORED = -100  # What torch's cross-entropy leaves out.


def official_rows(number, own):
    """(input ids, labels) of a sample of one turn: the clean row, and for long answers the masked one.

    Which tokens are masked is drawn by our rule, as many as the official code draws.
    """
    [(start, length, *_)] = own.spans
    source, target = own.ids[:start], own.ids[start : start + length - 1]
    rows = [([*source, *target, END], [IGNORED] * len(source) + [*target, END])]
    if len(target) > 50:
        is_masked = static_masks(number, own)[: len(source) + len(target)]
        assert is_masked.sum() == max(1, int(len(target) * RATIO)) and not is_masked[: len(source)].any()
        masked, labels = np.array([*source, *target]), np.full(len(is_masked), IGNORED)
        labels[is_masked] = masked[is_masked]
        masked[is_masked] = MASK
        rows.append(([*masked.tolist(), END], [*labels.tolist(), IGNORED]))
    return rows


@pytest.fixture(scope="module")
def model():
    """Our decoder with its parameters, and transformers' Llama with the same."""
    c = tiny_config()
    definition, mesh = define(ModelConfig.of(c.model, "cpu")), mesh_of(data=1)
    params = jax.tree.map(lambda p: 0.5 * p, numbers(definition))
    m = definition.config
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=m.embed_dim, intermediate_size=m.mlp_dim, num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads, head_dim=m.head_dim,
        rms_norm_eps=m.norm_eps, rope_theta=m.rope_base, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict({name: torch.tensor(array) for name, array in tensors_of(params, definition, mesh).items()})
    return definition, mesh, params, theirs


def tensors_of(params, definition, mesh):
    """A tree like the parameters as {transformers' name: array}."""
    flat = traverse_util.flatten_dict(params).__getitem__
    tensors = outgoing(flat, hub_tensors(definition.config, VOCAB), mesh, "float32")
    return {tensor.name: np.concatenate([*tensor.blocks()]) for tensor in tensors}


@pytest.mark.parametrize("arrangement", ["separate", "shared_prefix"])
def test_loss_and_gradients_are_those_of_torch_on_the_official_codes_rows(model, tmp_path, arrangement):
    definition, mesh, params, theirs = model
    rng = np.random.default_rng(0)
    documents = [document(rng, [turn]) for turn in ((10, 61), (6, 20), (30, 90), (4, 52), (12, 51))]
    rows = [row for number, own in enumerate(documents) for row in official_rows(number, own)]
    assert len(rows) == 8

    # Theirs: padded rows, the mean over all labels, as their trainer takes it in one micro-batch.
    longest = max(len(ids) for ids, _ in rows)
    ids, labels = (
        torch.tensor([[*row[i], *[fill] * (longest - len(row[i]))] for row in rows])
        for i, fill in ((0, 0), (1, IGNORED))
    )
    theirs.zero_grad()
    expected = theirs(input_ids=ids, labels=labels)  # Padding is behind all that counts.
    expected.loss.backward()

    # Ours: samples packed into rows.
    c = tiny_config(**{"sft.masks": "static"})
    c.objective.update(dict(name="meap", mask_ratio=RATIO))
    batch = batch_of(chat_store(tmp_path, documents), plan_spec(arrangement, 256))
    inputs = make_inputs(batch, Objective.of(c), named_keys(c), jnp.int32(0))
    assert int(inputs.loss_weights.sum()) == int((labels[:, 1:] != IGNORED).sum())

    def mean_loss(params):
        return summed_loss(definition, params, inputs) / inputs.loss_weights.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert float(loss) == pytest.approx(expected.loss.item(), rel=1e-5)
    found = tensors_of(grads, definition, mesh)
    for name, parameter in theirs.named_parameters():
        error = np.abs(found[name] - parameter.grad.numpy()).max()
        assert error < 1e-4 * np.abs(parameter.grad.numpy()).max(), name
