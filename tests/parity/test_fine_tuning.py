"""Fine-tuning's loss and gradients beside PyTorch's, on rows with the official code's labels (MEAP-SFT/MEAP-SFT.py)."""

import json

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
from meap_jax.tokenizers import load
from meap_jax.tokenizers.chat import template_source
from meap_jax.train import summed_loss
from tiny_models import mesh_of, numbers
from tiny_runs import tiny_config
from tiny_samples import END, MASK, RATIO, VOCAB, batch_of, chat_store, document, plan_spec, static_masks
from tokenizer_kinds import byte_level
from tokenizers import Tokenizer, processors

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


def torch_loss(theirs, rows):
    """The mean loss of one micro-batch of rows, padded behind; (ids, labels) each."""
    longest = max(len(ids) for ids, _ in rows)
    ids, labels = (
        torch.tensor([[*row[i], *[fill] * (longest - len(row[i]))] for row in rows])
        for i, fill in ((0, 0), (1, IGNORED))
    )
    return theirs(input_ids=ids, labels=labels).loss


@pytest.mark.parametrize("arrangement", ["separate", "shared_prefix"])
def test_loss_and_gradients_are_those_of_torch_on_the_official_codes_rows(model, tmp_path, arrangement):
    definition, mesh, params, theirs = model
    rng = np.random.default_rng(0)
    documents = [document(rng, [turn]) for turn in ((10, 61), (6, 20), (30, 90), (4, 52), (12, 51))]
    rows = [row for number, own in enumerate(documents) for row in official_rows(number, own)]
    assert len(rows) == 8

    # Theirs: the mean over all labels, as their trainer takes it in one micro-batch.
    theirs.zero_grad()
    expected = torch_loss(theirs, rows)
    expected.backward()

    # Ours: samples packed into rows.
    c = tiny_config(**{"sft.masks": "static"})
    c.objective.update(dict(name="meap", mask_ratio=RATIO))
    batch = batch_of(chat_store(tmp_path, documents), plan_spec(arrangement, 256))
    inputs = make_inputs(batch, Objective.of(c), named_keys(c), jnp.int32(0))
    assert int(inputs.loss_weights.sum()) == sum(label != IGNORED for _, labels in rows for label in labels)

    def mean_loss(params):
        return summed_loss(definition, params, inputs) / inputs.loss_weights.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    found = tensors_of(grads, definition, mesh)
    for name, parameter in theirs.named_parameters():
        error = np.abs(found[name] - parameter.grad.numpy()).max()
        assert error < 1e-4 * np.abs(parameter.grad.numpy()).max(), name


def test_rows_per_mean_is_the_official_mean_over_micro_batches(model, tmp_path):
    """Of rows with a sample each, as there: the mean of each two rows, and then over those means."""
    definition, _, params, theirs = model
    rng = np.random.default_rng(1)
    documents = [document(rng, [turn]) for turn in ((10, 91), (60, 41), (5, 96), (45, 56))]
    c = tiny_config(**{"sft.masks": "static", "sft.rows_per_mean": 2, "global_batch_size": 2})
    c.objective.update(dict(name="meap", mask_ratio=RATIO))
    batch = batch_of(chat_store(tmp_path, documents), plan_spec("separate", 110))
    inputs = make_inputs(jax.tree.map(lambda x: x[:6], batch), Objective.of(c), named_keys(c), jnp.int32(0))
    ours = summed_loss(definition, params, inputs) / inputs.loss_weights.sum()

    # Their rows in the order of ours, found by the tokens that the decoder is given.
    known = {}
    for number, own in enumerate(documents):
        for ids, labels in official_rows(number, own):
            known[tuple(ids[:-1])] = ids, labels
    lengths = [len(ids) for ids in known]
    rows = [known[tuple(np.asarray(row)[: lengths[0]].tolist())] for row in inputs.tokens]
    assert len(set(lengths)) == 1 and len(rows) == 6
    with torch.no_grad():
        expected = np.mean([torch_loss(theirs, rows[i : i + 2]).item() for i in (0, 2, 4)])
        assert abs(torch_loss(theirs, rows).item() - expected) > 1e-3
    assert float(ours) == pytest.approx(expected, rel=1e-5)


SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful, excellent and smart assistant.<|eot_id|>"
ASKED = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
TALKS = [("Where is the harbor?", "It lies beyond the old town."), ("Count.", "One, two.\nThree!"), (" a  b ", "c")]


@pytest.mark.parametrize("specials", [["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], []])
def test_samples_have_the_ids_that_the_official_code_gives_them(tmp_path, specials):
    """Their template llama3, with tokenizers of Llama 3's kind that have its headers as special tokens or don't."""
    made = Tokenizer.from_str(byte_level())
    made.no_truncation(), made.no_padding()
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    made.add_special_tokens([begin, end, *specials])
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    names = dict(bos_token=begin, eos_token=end, tokenizer_class="PreTrainedTokenizerFast")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load(tmp_path)
    template = template_source("llama3", "")
    for question, answer in TALKS:
        source = theirs.encode(SYSTEM + ASKED.format(question), add_special_tokens=True)
        target = theirs.encode(answer, add_special_tokens=False)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, answers = ours.encode_conversation(messages, template)
        assert ids == [*source, *target, theirs.eos_token_id]
        assert answers == [(len(source), len(target) + 1)]
