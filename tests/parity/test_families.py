"""Models of transformers beside what comes of them here: logits, gradients, generated tokens, and what goes back."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from etils import epath
from flax import traverse_util

from chat_templates import LLAMA3, chatting
from hub_folders import BASE, NUM_IDS, read_tensors, write_tokenizer
from meap_jax.convert import import_model, open_hub_model
from meap_jax.export import export_model
from meap_jax.generator import Generator
from meap_jax.hf.weights import hub_tensors, outgoing
from meap_jax.model.visibility import Visibility, causal
from meap_jax.models import open_model
from meap_jax.sampling import Sampling, filtered

ADDED = ["<|endoftext|>", "[MASK]"]  # transformers gives the first to every Qwen2 tokenizer that lacks it.
MASK = NUM_IDS + 1
ODD = MASK + 2 - MASK % 2  # Rows of the vocabulary: at least one of padding, and an odd number in all.
LLAMA_31 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
    "llama 2": ("Llama", {}),
    "llama 3.1, one kv head": ("Llama", dict(num_key_value_heads=1, rope_parameters=LLAMA_31)),
    "llama, linear, tied": (
        "Llama",
        dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    ),
    "mistral 0.1": ("Mistral", dict(head_dim=10, hidden_size=36, sliding_window=16)),
    "mistral 0.3": ("Mistral", dict(sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen 2.5": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen 2, windows in some layers": (
        "Qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1, rms_norm_eps=1e-5)
    ),
}  # fmt: skip
PROMPTS = [np.random.default_rng(n).integers(3, NUM_IDS, n).tolist() for n in (4, 41)]


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, tmp_path_factory):
    """(transformers' model, the folder that it saved, the same model opened here)."""
    name, changes = FAMILIES[request.param]
    config = getattr(transformers, f"{name}Config")(vocab_size=ODD, attn_implementation="eager", **BASE | changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            mean = float(parameter.ndim == 1 and parameter.mean() == 1)  # Scales of norms.
            parameter.copy_(mean + 0.25 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("hub")
    theirs.save_pretrained(folder)
    write_tokenizer(folder, added=ADDED, mask_token="[MASK]")
    return theirs, folder, open_hub_model(folder, mesh=dict(fsdp=2, tensor=4))


def relative(ours, expected):
    return np.abs(np.asarray(ours) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()


def test_logits_and_gradients_are_those_of_transformers(family):
    theirs, _, opened = family
    definition = opened.model.definition
    # Beyond the length that llama3 and yarn begin at, and beyond every window.
    tokens = np.random.default_rng(0).integers(0, ODD, (2, 97), np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = theirs(input_ids=torch.tensor(inputs, dtype=torch.long)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).long().flatten())
    theirs.zero_grad()
    expected.backward()

    def loss(params):
        summed = definition.decoder(params).loss(
            jnp.asarray(inputs), causal(jnp.asarray(inputs)), jnp.asarray(targets), jnp.ones(targets.shape)
        )
        return summed / targets.size

    with jax.set_mesh(opened.model.mesh):
        ours = jax.jit(definition.apply)(opened.params, jnp.asarray(inputs), causal(jnp.asarray(inputs)))
        value, gradients = jax.jit(jax.value_and_grad(loss))(opened.params)
        assert relative(ours[..., :ODD], logits.detach()) < 1e-4
        assert abs(float(value) - expected.item()) < 1e-4 * expected.item()
        gradient_of = traverse_util.flatten_dict(gradients).__getitem__
        tensors = outgoing(gradient_of, hub_tensors(definition.config, ODD), opened.model.mesh, "float32")
        found = {tensor.name: np.concatenate([*tensor.blocks()]) for tensor in tensors}
    assert found.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert relative(found[name], parameter.grad) < 1e-3, name


def test_documents_with_positions_of_their_own_give_the_logits_of_transformers(family):
    theirs, _, opened = family
    if any(opened.model.definition.config.has_window):
        pytest.skip("transformers counts windows by places, not by positions")
    tokens = np.random.default_rng(0).integers(0, ODD, (2, 12), np.int32)
    positions = np.int32([[0, 1, 2, 7, 8, 9, 30, 31, 32, 33, 90, 91], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    segment_ids = np.int32([[1] * 12, [1] * 5 + [2] * 7])
    sees = (segment_ids[:, :, None] == segment_ids[:, None, :]) & np.tri(12, dtype=bool)
    expected = theirs(
        input_ids=torch.tensor(tokens).long(),
        position_ids=torch.tensor(positions).long(),
        attention_mask=torch.tensor(np.where(sees, 0, np.finfo(np.float32).min)[:, None], dtype=torch.float32),
    ).logits
    visibility = Visibility(jnp.asarray(segment_ids), jnp.asarray(positions))
    with jax.set_mesh(opened.model.mesh):
        ours = jax.jit(opened.model.definition.apply)(opened.params, jnp.asarray(tokens), visibility)
    assert relative(ours[..., :ODD], expected.detach()) < 1e-4


def greedy(model, prompt, never):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=64, do_sample=False, suppress_tokens=never, pad_token_id=0
    )[0, len(prompt) :].tolist()


def test_64_greedy_tokens_are_those_of_transformers(family):
    theirs, _, opened = family
    generator = Generator.of(opened, chunk=32)
    never = np.flatnonzero(generator._never[:ODD]).tolist()
    found = generator.generate(PROMPTS, max_new_tokens=64)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.tokens == greedy(theirs, prompt, never)


# Reads an exported model and writes what it gives for tokens and a text, with whatever transformers is on the path.
READER = """
import json, sys, torch, transformers
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    ids = torch.tensor([tokens[:4]])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[0, 4:]
print(json.dumps(dict(
    version=transformers.__version__, dtype=str(model.dtype), logits=logits.float().tolist(), text=text.tolist(),
    ids=tokenizer("The sky [MASK] 3.5\\n Ünï")["input_ids"], mask=tokenizer.mask_token_id, length=len(tokenizer),
)))
"""


def read_by(version, folder, tokens):
    """What READER prints under transformers 4 or 5."""
    path = [str(pathlib.Path(sys.prefix) / "transformers4")] if version == 4 else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", READER, str(folder), json.dumps(tokens)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith(f"{version}.")
    return found


def test_import_and_export_give_the_same_bytes_and_both_transformers_read_them(family, tmp_path):
    theirs, folder, _ = family
    workdir, out = epath.Path(tmp_path / "ours"), epath.Path(tmp_path / "theirs")
    import_model(folder, workdir, mesh=dict(fsdp=2, tensor=2, context=2))
    export_model(workdir, out, mesh=dict(fsdp=4, data=2))
    expected, found = read_tensors(folder), read_tensors(tmp_path / "theirs")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        rows = MASK + 1 if name in ("model.embed_tokens.weight", "lm_head.weight") else len(array)
        assert found[name].tobytes() == array[:rows].tobytes(), name

    tokens = PROMPTS[1]
    logits = theirs(input_ids=torch.tensor([tokens])).logits[0, :, : MASK + 1].detach()
    ours = Generator.of(open_model(workdir)).generate([tokens[:4]], max_new_tokens=16)[0]
    for version in (4, 5):
        read = read_by(version, out, tokens)
        assert relative(read["logits"], logits) < 1e-5
        assert read["mask"] == MASK and read["length"] == MASK + 1 and read["dtype"] == "torch.float32"
        assert read["ids"].count(MASK) == 1 and read["ids"][0] == 1
        assert MASK not in read["text"] and len(read["text"]) == len(ours.tokens)


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.7), (9, 0.5), (1, 0.1), (0, 1e-6)])
def test_top_k_and_top_p_leave_out_what_transformers_leaves_out(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (3, 40)).astype(np.float32)
    warped = torch.tensor(logits) / 1.5
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    np.testing.assert_allclose(filtered(jnp.asarray(logits) / 1.5, Sampling(1.5, top_k, top_p)), warped, rtol=1e-6)


def test_a_conversation_has_the_ids_that_transformers_gives_it(tmp_path):
    tokenizer = chatting(tmp_path, LLAMA3)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [dict(role="system", content="Be  brief.\n"), dict(role="user", content="Wo ist 日本? 🙂")]
    expected = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(talk) == expected
