"""A chat template as Llama 3's, and a small tokenizer that brings one."""

import json

from meap_jax import tokenizers
from tokenizer_kinds import llama
from tokenizers import Tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' + "
    "message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


def chatting(folder, template, in_a_file=False, specials=("<|start|>", "<|end|>", "<|eot|>")):
    """The tokenizer of a folder whose tokenizer_config.json, or a file beside it, holds a chat template.

    Its last special token ends texts.
    """
    made = Tokenizer.from_str(llama(False))
    made.add_special_tokens(list(specials))
    made.save(str(folder / "tokenizer.json"))
    config = dict(bos_token="<s>", eos_token=specials[-1])
    if in_a_file:
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizers.load(folder)
