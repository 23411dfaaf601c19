"""Conversations in a model's own template; what users write stays text, and templates stay in their sandbox."""

import pytest
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chat_templates import LLAMA3, chatting
from meap_jax import models, tokenizers
from meap_jax.errors import ConfigError, DataError
from meap_jax.tokenizers import chat
from meap_jax.tokenizers.chat import plain_markers, template_source
from meap_jax.tokenizers.interface import MAX_CHUNK
from tokenizer_kinds import EXACT, KINDS, kind

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


# -------------------------------------------------------------------------------------------------------- for training

# Messages with what looks like special tokens of every kind, and answers with blanks at their ends.
LESSON = [
    {"role": "user", "content": "Sort <s>these</s> <|eot_id|>\nb, a", "instruction": "Sort", "input": "b, a"},
    {"role": "assistant", "content": "a, b </s><eos><|endoftext|><|im_end|>"},
    {"role": "user", "content": " And 日本? "},
    {"role": "assistant", "content": "\n\nASSISTANT: 🙂 </s>\n"},
]
NAMED = ("llama3", "vicuna", "alpaca")  # They end answers with every tokenizer's own end.


def said(message, template):
    """The text that a template has a model write for a message."""
    return " " + message["content"] if template == "vicuna" else message["content"]


def decoded(tokenizer, ids, answers):
    return [tokenizer.decode(ids[start : start + length], continues=True) for start, length in answers]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("template", NAMED)
def test_answers_of_every_kind_and_template_are_where_they_are_said_to_be(name, template, monkeypatch):
    tokenizer, source = kind(name), template_source(template, "")
    ids, answers = tokenizer.encode_conversation(LESSON, source)
    end = tokenizer.decode([tokenizer.eos_id])
    assert decoded(tokenizer, ids, answers) == [said(message, template) + end for message in LESSON[1::2]]
    # What looks like a special token in a message is text: one bos, and an end for each answer.
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id and (i or name != "byte_level")]
    assert ends == [start + length - 1 for start, length in answers] and ends[-1] == len(ids) - 1
    assert ids[0] == tokenizer.bos_id and tokenizer.bos_id not in ids[1 : ends[0]]
    assert tokenizer.end_of_answer(source) == tokenizer.eos_id
    # A model that is asked reads what it was trained on.
    monkeypatch.setattr(tokenizer, "chat_template", source)
    assert tokenizer.encode_chat(LESSON[:1]) == ids[: answers[0][0]]


@pytest.mark.parametrize("name", EXACT)
def test_what_follows_an_answer_goes_on_behind_its_end(name):
    tokenizer, source = kind(name), template_source("vicuna", "")
    ids, answers = tokenizer.encode_conversation(LESSON, source)
    between = tokenizer.decode(ids[sum(answers[0]) : answers[1][0]], continues=True)
    # Older files of Llama's kind put a space behind a special token, by transformers too.
    assert between == " " * (name == "llama") + "USER:  And 日本?  ASSISTANT:"


@pytest.mark.parametrize("name", KINDS)
def test_the_official_llama3_format_piece_by_piece(name):
    tokenizer = kind(name)
    ids, ((start, length),) = tokenizer.encode_conversation(LESSON[:2], template_source("llama3", ""))
    prompt = (
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful, excellent and smart assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSort <s>these</s> <|eot_id|>\nb, a<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    if name != "llama_metaspace":  # Which, by transformers too, puts no space in front of a text behind <s>.
        assert ids[1:start] == tokenizer.encode(prompt)  # No marker of it is a special token of these.
    assert plain_markers(template_source("llama3", ""), tokenizer.special_names) == [
        "<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "template, expected",
    [
        ("vicuna", "Be brief. USER: Sort\nb, a ASSISTANT: a, b$USER: Why? ASSISTANT: So.$"),
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nSort\n\n### Input:\nb, a\n\n### Response:\na, b$"
            "### Instruction:\nWhy?\n\n### Response:\nSo.$",
        ),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
            "\n\nSort\nb, a<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na, b$<|start_header_id|>user"
            "<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nSo.$",
        ),
    ],
)
def test_what_the_named_templates_write(template, expected):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sort\nb, a", "instruction": "Sort", "input": "b, a"},
        {"role": "assistant", "content": "a, b"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    tokenizer = kind("bpe")
    ids, _ = tokenizer.encode_conversation(talk, template_source(template, ""))
    assert tokenizer.decode(ids) == "<bos>" + expected.replace("$", "<eos>")
    # An empty system prompt is none: not even the template's own.
    ids, _ = tokenizer.encode_conversation(
        [{"role": "system", "content": ""}, *talk[1:]], template_source(template, "")
    )
    without = expected.replace("$", "<eos>")[expected.index("Be brief.") :].removeprefix("Be brief.").lstrip()
    assert tokenizer.decode(ids) == "<bos>" + without.removeprefix("<|eot_id|>")


def test_chatml_needs_its_end_as_a_special_token(tmp_path):
    source = template_source("chatml", "")
    tokenizer = chatting(tmp_path, source, specials=("<|im_start|>", "<|im_end|>", "</s>"))
    ids, answers = tokenizer.encode_conversation(LESSON, source)
    assert decoded(tokenizer, ids, answers) == [m["content"] + "<|im_end|>" for m in LESSON[1::2]]
    assert ids[-1] == tokenizer.end_of_answer(source) != tokenizer.eos_id  # The newline behind it is left out.
    assert tokenizer.decode(ids[:4]).startswith("<s><|im_start|>")
    for name in KINDS:
        with pytest.raises(DataError, match=r"ends an answer with '<\|im_end\|>\\n', in which this tokenizer has no"):
            kind(name).end_of_answer(source)


def test_a_tokenizers_own_template_trims_marks_and_goes_on(tmp_path):
    marked = LLAMA3.replace(" + message['content'] | trim +", " }}{% generation %}{{ message['content'] | trim")
    marked = marked.replace("'<|eot|>' }}", " + '<|eot|>' }}{% endgeneration %}{{ '\n' }}")
    for template in (LLAMA3, marked):
        tokenizer = chatting(tmp_path, template)
        ids, answers = tokenizer.encode_conversation(LESSON, template_source("tokenizer", tokenizer.chat_template))
        assert decoded(tokenizer, ids, answers) == [m["content"].strip() + "<|eot|>" for m in LESSON[1::2]]
        assert ids[: answers[0][0]] == tokenizer.encode_chat(LESSON[:1])
        # What is between two answers has the ids that it has in the whole.
        start, stop = sum(answers[0]), answers[1][0]
        assert tokenizer.encode_chat(LESSON[:3])[start - stop :] == ids[start:stop]


def test_special_tokens_in_front_of_an_answers_words_are_the_models_to_write(tmp_path):
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{{ '<|end|>final' if m.role == 'assistant' }}<|end|>"
        "{{ m.content }}<|eot|>{% endfor %}{{ '<|start|>assistant' if add_generation_prompt }}"
    )
    tokenizer = chatting(tmp_path, "")
    ids, answers = tokenizer.encode_conversation(LESSON, template)
    # Older files of Llama's kind put a space behind a special token, by transformers too.
    expected = [f"<|end|> final<|end|> {message['content']}<|eot|>" for message in LESSON[1::2]]
    assert decoded(tokenizer, ids, answers) == expected


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}", "{{ bos_token ~ bos_token }}"])
@pytest.mark.parametrize("name", ["mistral", "llama", "byte_level", "tekken"])
def test_there_is_one_bos_whatever_the_template_writes(name, begin):
    tokenizer = kind(name)
    template = begin + "{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}"
    ids, answers = tokenizer.encode_conversation(LESSON[:2], template)
    assert ids[0] == tokenizer.bos_id != ids[1]
    assert decoded(tokenizer, ids, answers)[0].startswith("a, b </s>")


@pytest.mark.parametrize("name", ["mistral", "tekken", "llama"])
def test_a_mask_that_a_tokenizer_was_given_is_no_special_token_of_templates(name):
    tokenizer = kind(name)
    template = "[MASK]{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}"
    ids, _ = tokenizer.encode_conversation(LESSON[:2], template)
    assert tokenizer.mask_id not in ids and tokenizer.decode(ids).startswith("<s>[MASK]Sort")


# U+2581 is a space to some, and two characters that are none of Unicode are lost: as in all texts.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\ufffe\uffff"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.sampled_from(NAMED))
@example([("", "\0"), ("<eos", ">"), ("<", "s></s>")], "llama3")
@example([("a", "aa"), (" ", "  "), ("\n", "\n\n\u0301")], "vicuna")
def test_answers_decode_to_what_was_said(turns, template):
    talk = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    for tokenizer in map(kind, ("bpe", "mistral", "tekken", "sentencepiece", "llama", "llama_metaspace")):
        ids, answers = tokenizer.encode_conversation(talk, template_source(template, ""))
        end = tokenizer.decode([tokenizer.eos_id])
        assert decoded(tokenizer, ids, answers) == [said(m, template) + end for m in talk[1::2]]
        assert ids.count(tokenizer.eos_id) == len(turns) and ids.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("name", ["mistral", "llama", "tekken"])
def test_long_answers_come_back(name):
    talk = [LESSON[0], {"role": "assistant", "content": "sea and salt " * (MAX_CHUNK // 8)}]
    ids, answers = kind(name).encode_conversation(talk, template_source("llama3", ""))
    assert decoded(kind(name), ids, answers) == [talk[1]["content"] + "</s>"]


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages | length }}{{ eos_token }}", "writes no answer behind the prompt for it"),
        (
            "{% for m in messages %}{{ loop.last }}{{ m.content ~ eos_token }}{% endfor %}",
            "writes no answer behind the prompt for it",
        ),
        (
            "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' }}{{ eos_token }}{% endfor %}",
            "writes earlier turns anew when others follow: set sft.turns to each",
        ),
        ("{% for m in messages %}{{ m.content }}.{% endfor %}", "ends an answer with '.', in which this tokenizer"),
        ("{% for m in messages %}{{ eos_token ~ m.content }}{% endfor %}", "ends an answer with '', in which"),
        (
            "{% for i in range(99999) %}{{ '%999d' % i }}{% endfor %}",
            "writes more than 10,",
        ),
        ("{{ raise_exception('no') }}", "can't render these messages: no"),
    ],
)
def test_templates_that_answers_cannot_be_told_from(template, message):
    with pytest.raises(DataError, match=message):
        kind("bpe").encode_conversation(LESSON, template)


def test_a_conversation_without_an_answer_has_nothing_to_train_on():
    with pytest.raises(DataError, match="the conversation has no answer of an assistant"):
        kind("bpe").encode_conversation(LESSON[:1], template_source("llama3", ""))


def test_the_day_of_preparing_is_in_no_training_data():
    template = "{% for m in messages %}{{ strftime_now('%d %b %Y') }}{{ m.content ~ eos_token }}{% endfor %}"
    ids, _ = kind("bpe").encode_conversation(LESSON[:2], template)
    assert "26 Jul 2024" in kind("bpe").decode(ids)


@pytest.mark.parametrize(
    "template, content, message",
    [
        ("llama4", None, "sft.template is 'llama4', but must be one of llama3, vicuna, alpaca, chatml, tokenizer, or"),
        (
            "tokenizer",
            None,
            "sft.template is 'tokenizer', but the tokenizer brings no template of its own: name llama3,",
        ),
        ("mine.jinja", None, "mine.jinja', but that file can't be read: No such file or directory"),
        ("mine.jinja", b"one\n{% for %}", "mine.jinja', but line 2 of it is no Jinja: "),
        ("mine.jinja", b"\xff", r"mine.jinja', but that file is not UTF-8 \(byte 0\)"),
    ],
)
def test_templates_that_are_not_there(tmp_path, monkeypatch, template, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / template).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        template_source(template, "")


def test_a_template_in_a_file_beside_any_kind_of_tokenizer_is_its_own(tmp_path):
    (tmp_path / "mine.jinja").write_text(LLAMA3.replace("<|eot|>", "</s>"))
    for name in ("sentencepiece", "bpe"):
        place = tmp_path / name
        place.mkdir()
        (place / "chat_template.jinja").write_text(template_source(str(tmp_path / "mine.jinja"), ""))
        for file, content in kind(name).files().items():
            (place / file).write_bytes(content)
        found = tokenizers.make(str(place)).encode_chat(LESSON[2:3])
        assert kind(name).decode(found).endswith("<|start|>user<|end|>\n\nAnd 日本?</s><|start|>assistant<|end|>\n\n")


def test_a_template_that_trains_the_announcement_of_an_answer_is_refused():
    """It ignores add_generation_prompt: `assistant: ` would be the model's to write."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(DataError, match="writes 'assistant:' in front of an answer, but nothing for add_generation_p"):
        kind("bpe").end_of_answer(template)
    silent = "{% for m in messages %}{{ ' ' if m.role == 'assistant' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert kind("bpe").end_of_answer(silent) == kind("bpe").eos_id, "a blank in front is no announcement, as Mistral's"


@pytest.mark.parametrize("computes", ["1 // 0", "'{} {}'.format('a')", "'{a}'.format(b=1)", "'a' * 10**14"])
def test_what_a_template_computes_may_fail_in_any_way(computes):
    with pytest.raises(DataError, match="the chat template (fails|can't render)"):
        chat.render(f"{{{{ {computes} }}}}", [], {})
