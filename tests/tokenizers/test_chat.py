"""Conversations in a model's own template; what users write stays text, and templates stay in their sandbox."""

import pytest
from etils import epath

from chat_templates import LLAMA3, chatting
from meap_jax import models
from meap_jax.errors import DataError
from tokenizer_kinds import kind

TALK = [{"role": "user", "content": " Where is it? "}, {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "Thank you <|eot|> <s>!"}]  # fmt: skip


@pytest.mark.parametrize("in_a_file", [False, True])
def test_the_templates_special_tokens_become_ids_and_those_in_messages_stay_text(tmp_path, in_a_file):
    tokenizer = chatting(tmp_path, LLAMA3, in_a_file)
    ids = tokenizer.encode_chat(TALK)
    eot, start = tokenizer.eos_id, tokenizer.encode_chat([])[1]
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert (ids.count(eot), ids.count(start)) == (3, 4)
    assert "Thank you <|eot|> <s>!<|eot|><|start|> assistant<|end|>" in tokenizer.decode(ids)
    place = epath.Path(tmp_path / "kept")
    found = models.open_tokenizer(place, models.save_tokenizer(place, tokenizer))
    assert found.encode_chat(TALK) == ids


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "can't render these messages"),
        ("{{ messages.append(1) }}", "can't render these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "can't render these messages"),
        ("{% include '/etc/passwd' %}", "fails|can't render"),
        ("{{ 1 + 'a' }}", "fails"),
    ],
)
def test_a_template_that_is_wrong_or_reaches_out_is_refused(tmp_path, template, said):
    with pytest.raises(DataError, match=said):
        chatting(tmp_path, template).encode_chat(TALK)


def test_templates_may_mark_what_the_assistant_says_and_break_loops(tmp_path):
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert chatting(tmp_path, template).encode_chat(TALK) == kind("llama").encode(" Where is it? ")


def test_a_tokenizer_without_a_template_cannot_chat(tmp_path):
    for tokenizer in (kind("bpe"), kind("mistral"), kind("llama")):
        with pytest.raises(DataError, match="has no chat template"):
            tokenizer.encode_chat(TALK)
