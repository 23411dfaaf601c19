"""What generation gives is what the whole forward pass says, in any batch, bucket, chunk and mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meap_jax import decoding
from meap_jax.errors import ConfigError, DataError
from meap_jax.generate import command
from meap_jax.generator import Generator
from meap_jax.model import attention_slots, attention_splash
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal
from meap_jax.models import Model
from meap_jax.sampling import Sampling
from tiny_models import mesh_of, numbers
from tiny_runs import tiny_config
from tokenizer_kinds import kind

V = 640
LENGTHS = (1, 3, 16, 17, 40, 70)
PROMPTS = [np.random.default_rng(n).integers(4, 600, n).tolist() for n in LENGTHS]


def generator(mesh=None, changes=None, **options):
    """A tiny decoder with the vocabulary of the tokenizer bpe, and its parameters."""
    config = tiny_config(**{"model.vocab_size": V, "seq_len": 160, **(changes or {})})
    model = Model(config, mesh_of(**(mesh or {})), define(ModelConfig.of(config.model, "cpu")))
    params = jax.tree.map(lambda x: x * 0.7, numbers(model.definition))
    params = jax.device_put(params, model.definition.shardings(model.mesh))
    return Generator(model, params, kind("bpe"), **options), params


def log_probs_of(definition, params, text):
    """[T, V]: of what follows each token, by the whole forward pass."""
    tokens = jnp.asarray([text], jnp.int32)
    return np.array(jax.nn.log_softmax(jax.jit(definition.apply)(params, tokens, causal(tokens))[0]))


ROPE = {"model.rope_scaling.kind": "yarn", "model.rope_scaling.factor": 4.0, "model.rope_scaling.original_seq_len": 32}


@pytest.mark.parametrize(
    "mesh, changes, options",
    [
        ({}, {}, {}),
        ({}, {"model.attention": "plain", "model.tie_embeddings": True, **ROPE}, dict(chunk=32, batch_size=4)),
        (dict(tensor=2), {"model.num_kv_heads": 1, "model.qkv_bias": True}, dict(chunk=16)),
        (dict(tensor=4), {"model.window": 5}, dict(chunk=32)),
        (dict(fsdp=2, tensor=2), {"model.lora.rank": 3}, dict(chunk=32)),
        (dict(data=2, tensor=2, context=2), {"model.window": 20, "model.window_layers": "1"}, dict(chunk=32)),
        (dict(fsdp=2, context=4), {"model.attention": "splash"}, dict(chunk=64)),
    ],
    ids=str,
)
def test_greedy_tokens_and_log_probabilities_are_those_of_the_whole_forward_pass(monkeypatch, mesh, changes, options):
    monkeypatch.setattr(attention_splash, "INTERPRET", True)
    monkeypatch.setattr(attention_slots, "BLOCK", 24 if options else attention_slots.BLOCK)
    generating, params = generator(mesh, changes, **options)
    found = generating.generate(PROMPTS, max_new_tokens=9, log_probs=True)
    never = [kind("bpe").mask_id, kind("bpe").pad_id, *range(kind("bpe").num_tokens, V)]
    plain, params = define(replace(generating.model.definition.config, attention="plain")), jax.device_get(params)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        text = [*prompt, *completion.tokens]
        every = log_probs_of(plain, params, text + [0] * (-len(text) % 128))[len(prompt) - 1 : len(text) - 1]
        chosen = every[np.arange(len(completion.tokens)), completion.tokens]
        np.testing.assert_allclose(completion.log_probs, chosen, atol=2e-4, rtol=2e-4)
        every[:, never] = -np.inf
        assert (chosen >= every.max(axis=1) - 1e-4).all()
        assert len(completion.tokens) == 9 or completion.tokens[-1] == kind("bpe").eos_id


@pytest.mark.parametrize("mesh, changes", [({}, {}), (dict(data=2, context=2), {"model.window": 20})], ids=str)
def test_prompts_that_begin_alike_give_what_each_gives_alone(mesh, changes):
    generating, _ = generator(mesh, changes, chunk=16, batch_size=2)
    rng = np.random.default_rng(0)
    trunks = [rng.integers(4, 600, n).tolist() for n in (90, 85)]
    # What rows share with the first batch: 85 and more, 50, 3 (less than a chunk), and 20 of much shorter prompts.
    batches = [[[*trunk[:n], *rng.integers(4, 600, m).tolist()] for trunk in trunks]
               for n, m in ((85, 6), (50, 40), (3, 80), (20, 2))]  # fmt: skip
    shared = list(generating.generate_sharing(batches, max_new_tokens=9))
    for prompts, found in zip(batches, shared, strict=True):
        assert found == generating.generate(prompts, max_new_tokens=9)


# -------------------------------------------------------------------------------------------------------------- drawing


def test_what_is_drawn_after_a_prompt_depends_on_the_seed_and_its_number_and_not_on_its_neighbours():
    generating, _ = generator(batch_size=4)
    settings = dict(max_new_tokens=12, sampling=Sampling(1.0, top_k=20, top_p=0.9))
    several = [found.tokens for found in generating.generate(PROMPTS, seed=3, **settings)]
    assert [found.tokens for found in generating.generate(PROMPTS, seed=3, **settings)] == several
    others = [PROMPTS[0], [9] * 30, *PROMPTS[2:4]]
    fewer = [found.tokens for found in generating.generate(others, seed=3, **settings)]
    assert (fewer[0], *fewer[2:]) == (several[0], *several[2:4]) and fewer[1] != several[1]
    assert generating.generate(PROMPTS[:1], seed=4, **settings)[0].tokens != several[0]
    twice = generating.generate([PROMPTS[3]] * 2, seed=3, **settings)
    assert twice[0].tokens != twice[1].tokens


def test_mask_padding_and_rows_without_a_token_are_never_drawn():
    generating, _ = generator()
    found = generating.generate(PROMPTS, max_new_tokens=60, sampling=Sampling(100.0))  # Nearly uniform.
    drawn = {token for completion in found for token in completion.tokens}
    assert len(drawn) > 150 and max(drawn) < kind("bpe").num_tokens
    assert not drawn & {kind("bpe").mask_id, kind("bpe").pad_id}


# ------------------------------------------------------------------------------------------------------------- stopping


def test_stop_tokens_and_stop_strings_end_a_text():
    generating, _ = generator()
    whole = generating.generate(PROMPTS[2:4], max_new_tokens=40)
    assert not any(found.stopped for found in whole)
    stop = whole[0].tokens[7]
    first = whole[0].tokens.index(stop)
    stopped = generator(stops=[stop])[0].generate(PROMPTS[2:4], max_new_tokens=40)[0]
    assert stopped.tokens == whole[0].tokens[: first + 1] and stopped.stopped
    assert stopped.text == kind("bpe").decode(whole[0].tokens[:first], continues=True)
    text = whole[1].text
    cut = text[len(text) // 2 :][:3]
    found = generating.generate(PROMPTS[2:4], max_new_tokens=40, stop_strings=["never there", cut])[1]
    assert found.text == text[: text.index(cut)] and found.stopped and len(found.tokens) < 40


@pytest.mark.parametrize("stop_strings", [(), (" is",)])
def test_a_text_comes_in_pieces_that_are_the_whole_and_hold_no_half_character(stop_strings):
    generating, _ = generator()
    pieces = []
    [found] = generating.generate(PROMPTS[3:4], max_new_tokens=70, stop_strings=stop_strings, on_text=pieces.append)
    assert "".join(pieces) == found.text and len(pieces) > 2
    [at_once] = generating.generate(PROMPTS[3:4], max_new_tokens=70, stop_strings=stop_strings)
    assert at_once.text == found.text


def test_many_lengths_share_few_programs():
    generating, _ = generator(batch_size=1)
    for n in range(1, 66):
        generating.generate([[5] * n], max_new_tokens=2)
    assert generating._prefill._cache_size() == 4  # 16, 32, 64 and 128.
    assert generating._decode._cache_size() == 4


@given(st.integers(1, 200_000), st.integers(4, 9), st.integers(0, 3))
def test_a_bucket_has_room_and_little_padding_and_there_are_few(length, smallest, more):
    smallest, largest = 2**smallest, 2 ** (smallest + more)
    size = decoding.bucket(length, smallest, largest)
    assert size >= length and (size % largest == 0 if length > largest else size <= largest)
    assert size < max(2 * length, smallest + 1) if length <= largest else size <= max(1.25 * length, length + largest)
    assert decoding.bucket(size, smallest, largest) == size


def test_what_is_held_while_a_prompt_is_read_grows_with_its_length_and_not_with_its_square():
    definition = define(ModelConfig.of(tiny_config().model, "cpu"), is_stacked=False)

    def temporaries(T):
        rules = decoding.Rules(jnp.zeros((1, 2), jnp.uint32), jnp.zeros(64, bool), jnp.zeros(1, jnp.int32))
        program = jax.jit(
            decoding.prefill, static_argnames=("definition", "sampling", "num_new", "chunk")
        ).lower(
            definition.shapes(), jnp.zeros((1, T), jnp.int32), jnp.ones(1, jnp.int32), rules,
            definition=definition, sampling=Sampling(), num_new=64, chunk=1024,
        )  # fmt: skip
        return program.compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4_096), temporaries(16_384)
    per_token = 2 * 2 * 2 * 8 * 4  # Keys and values of 2 layers with 2 heads of 8 numbers, in float32.
    assert long - short < 2 * (16_384 - 4_096) * per_token


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "prompts, settings, error, said",
    [
        ([[5], []], {}, DataError, "prompt 1 is empty"),
        ([[5] * 150], dict(max_new_tokens=11), DataError, "150 tokens and max_new_tokens is 11, .* model's 160"),
        ([[V]], {}, DataError, "a token outside the model's vocabulary of 640"),
        ([[5]], dict(max_new_tokens=0), ConfigError, "max_new_tokens is 0"),
        ([[5]], dict(stop_strings=[""]), ConfigError, "a stop string is empty"),
    ],
)
def test_what_cannot_be_continued_is_said(prompts, settings, error, said):
    with pytest.raises(error, match=said):
        generator()[0].generate(prompts, **settings)


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "--prompt is not set"),
        (["--prompt=a", "--prompt=b"], "--prompt is given 2 times"),
        (["--prompt=a", "--seed=-1"], "--seed is -1"),
        (["--prompt=a", "--temperature=-1"], "temperature is -1"),
        (["--prompt=a", "--temperature=0", "--top_k=3"], "temperature is 0"),
        (["--prompt=a", "--top_p=0"], "top_p is 0"),
        (["--prompt=a"], "holds no config.json"),
    ],
)
def test_flags_that_cannot_be_are_said(tmp_path, flags, said):
    with pytest.raises(ConfigError, match=said):
        command(["generate", f"--workdir={tmp_path}", *flags])
