"""Chat templates by strangers: text, or one sentence; no way to files or into Python, and bounds on memory and time."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import in_little_memory, refused_in_a_sentence, settings
from meap_jax.errors import DataError, UserError
from meap_jax.fields import TEMPLATES
from meap_jax.tokenizers import chat

TALK = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

GROWING = {
    "a product": "{{ 'a' * 1000000000 }}",
    "a product of products": "{{ 'a' * 10000 * 10000 * 10000 }}",
    "a list": "{{ ([0] * 1000000000) | length }}",
    "a list of lists": "{% set l = [0] * 100000 %}{{ ([l] * 100000) | string | length }}",
    "a power": "{{ 9 ** 999999999 }}",
    "a power in steps": "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a shift": "{{ (2 ** 5000) * (2 ** 6000) }}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling a list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by a block": "{% set x = 'a' * 100000 %}{% for i in range(9) %}{% set y %}{{ x }}{{ x }}{% endset %}"
    "{% endfor %}{% set n = namespace(x=x) %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "many large texts": "{% set n = namespace(x=[]) %}{% for i in range(90000) %}"
    "{% set n.x = n.x + ['b' * 1000000] %}{% endfor %}",
    "many copies": "{% set s = 'b' * 1000000 %}{% set n = namespace(x=[]) %}{% for i in range(90000) %}"
    "{% set n.x = n.x + [s.upper()] %}{% endfor %}",
    "many slices": "{% set s = 'b' * 1000000 %}{% set n = namespace(x=[]) %}{% for i in range(90000) %}"
    "{% set n.x = n.x + [s[1:]] %}{% endfor %}",
    "a nested list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "a nested list as JSON": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x | tojson }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "the method center": "{{ 'a'.center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(width=1000000000) }}{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a format with a star": "{{ '%*d' % (1000000000, 1) }}",
    "a format with a precision": "{{ '%.1000000000f' % 1.5 }}",
    "a format with a precision that is given": "{{ '%5.*f' % (1000000000, 1.5) }}",
    "separators of JSON": "{{ ([1] * 1000) | tojson(separators=('a' * 1000000, ':')) }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "the method format": "{{ '{:1000000000}'.format(1) }}",
    "the method format with a width that is given": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "the method replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "join": "{{ range(99999) | join('b' * 100000) }}",
    "the method join": "{{ ('b' * 100000).join(['a'] * 100000) }}",
    "indent": "{{ ('\n' * 100000) | indent(1000000, True, True) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "words": "{{ lipsum(n=1000000) }}",
    "a large range": "{% for i in range(1000000000) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output in loops": "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaa{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop in itself": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 3_000 + "1" + ")" * 3_000 + " }}",
    "deep loops": "{% for i in [1] %}" * 300 + "{% endfor %}" * 300,
    "a long number": "{{ " + "9" * 5_000 + " }}",
}  # fmt: skip

ESCAPES = [
    "{% include '/etc/passwd' %}", "{% import '/etc/passwd' as x %}", "{% extends '/etc/passwd' %}",
    "{% from 'os' import system %}", "{{ ''.__class__.__mro__ }}", "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ cycler.__init__.__globals__.os }}", "{{ self.__init__.__globals__ }}", "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}", "{{ 'a'.format.__self__.__class__ }}", "{{ ''|attr('__class__') }}",
    "{{ messages.append(1) }}", "{{ messages.clear() }}", "{{ messages[0].update({'content': 'x'}) }}",
    "{{ dict.fromkeys.__func__ }}", "{{ (x for x in [1]).gi_frame }}", "{{ open('/etc/passwd') }}",
    "{{ [].__reduce__() }}", "{{ config.items() }}", "{% debug %}", "{% set messages.x = 1 %}{{ messages.x.y }}",
    "{{ messages|map(attribute='__class__')|list|first|attr('mro') }}",
]  # fmt: skip

RENDER = """
import json, time
from meap_jax.errors import UserError
from meap_jax.tokenizers import chat
talk = [{"role": "user", "content": "a question"}]
chat.render("{{ messages[0].content | tojson }}", talk, {})
allowed()
for name, template in json.loads(sys.stdin.read() if len(sys.argv) < 2 else open(sys.argv[1]).read()).items():
    began = time.process_time()
    try:
        size = len(chat.render(template, talk, {}))
        assert size < 20_000_000 and name == "deep loops", name + " passed"
    except UserError as error:
        assert "\\n" not in str(error) and len(str(error)) < 1_000, name
    assert time.process_time() - began < 20, name
report()
"""


def test_no_template_takes_more_than_its_share_of_memory_and_time(tmp_path):
    (tmp_path / "templates.json").write_text(json.dumps(GROWING))
    in_little_memory(RENDER, tmp_path / "templates.json", megabytes=600)


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_reaches_files_or_python(template):
    talk = json.loads(json.dumps(TALK))
    try:
        text = chat.render(template, talk, NAMES)
    except DataError as error:
        assert "\n" not in str(error) and "root:" not in str(error)
    else:
        assert not text.strip("[]") or text == "TALK", text  # What is undefined is nothing.
    assert talk == TALK


NO_JINJA = [
    "{% for %}", "{{ 1 |", "{% for i in [1] %}" * 30, "\0{{", "{{ x | unheard_of }}", "{{ " + "-" * 9_000,
    "{{ " + "9" * 9_000 + " }}",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_JINJA, ids=range(len(NO_JINJA)))
def test_a_file_that_is_no_template_is_refused_in_a_sentence(text, tmp_path):
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(UserError, match="t.jinja") as error:
        chat.template_source(str(tmp_path / "t.jinja"), "")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1_000


PIECES = (
    "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] | upper }}",
    "{% if x %}", "{% else %}", "{% endif %}", "{{ bos_token ~ 1 ~ [] }}", "{% set ns = namespace(a=1) %}",
    "{% set ns.a = ns.a * 3 %}", "{{ ns.a }}", "{% macro f(x) %}", "{% endmacro %}", "{{ f(1) }}", "{{ loop.index0 }}",
    "{{ loop.last }}", "{{- 1 -}}", "{% break %}", "{% continue %}", "{{ messages | tojson(indent=2) }}",
    "{{ raise_exception('no\\nmore') }}", "{{ strftime_now('%d %b %Y') }}", "{% generation %}", "{% endgeneration %}",
    "{{ messages[1:][0]['content'][:2] }}", "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "text {",
)  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "system")), "content": st.text(max_size=20)}
)


@settings
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12).map("".join), st.lists(MESSAGE, max_size=3))
def test_any_template_gives_text_or_one_sentence(template, messages):
    with refused_in_a_sentence():
        assert isinstance(chat.render(template, messages, NAMES), str)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "tokenizer"])
def test_long_conversations_stay_within_the_bounds(name):
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " * 500} for i in range(600)]
    text = chat.render(chat.template_source(name, ""), talk, NAMES)
    assert all(f"{i} {i} " in text for i in range(600))


FAIR = {
    "{{ messages[0].content | indent }}": "a question",
    "{{ 'Cutting knowledge: December 2023. Today: %s' % bos_token }}": "Cutting knowledge: December 2023. Today: <s>",
    "{{ 'December 2023: {}'.format(bos_token) }}": "December 2023: <s>",
    "{{ '**%s** %5.2f %%' % (bos_token, 1.5) }}": "**<s>**  1.50 %",
    "{{ {'b': 'ü', 'a': 1} | tojson(True, separators=(',', ':'), sort_keys=True) }}": '{"a":1,"b":"\\u00fc"}',
}


@pytest.mark.parametrize("template", FAIR)
def test_what_templates_of_models_do_is_left_alone(template):
    assert chat.render(template, TALK, NAMES) == FAIR[template]
