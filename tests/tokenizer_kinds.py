"""Small real tokenizers of every kind, trained on the spot."""

import io
import json
from functools import cache

import sentencepiece

from meap_jax import tokenizers
from meap_jax.corpus.retrieval import RetrievalSpec, generate
from meap_jax.tokenizers.hugging_face import HuggingFaceTokenizer
from meap_jax.tokenizers.sentence_piece import SentencePieceTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [document.text for document in generate(RetrievalSpec(16, 16, 4, 1, 3), 0, 300)]
# Names of specials, so often that a trainer would learn them unless it is kept from it.
SPECIALS = ("<pad>", "<bos>", "<eos>", "[MASK]", "<s>", "</s>", "<unk>", "<|endoftext|>", "<mask>")
CORPUS = [*TEXTS, *(name for special in SPECIALS for name in [special] * 50)]


NORMALIZING = dict(
    model_type="unigram", byte_fallback=False, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True,
    vocab_size=300,
)  # fmt: skip


@cache
def sentencepiece_model(**options) -> bytes:
    """A model of 600 pieces, of Llama's kind unless the options say otherwise."""
    llama = dict(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        vocab_size=600, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **(llama | options))
    return model.getvalue()


@cache
def byte_level() -> str:
    """GPT-2's kind: one special token, truncation and padding asked for, a special id at the end by the template."""
    tokenizer = Tokenizer.from_str(kind("bpe").files()["tokenizer.json"].decode())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20, pad_token="<|endoftext|>")
    return tokenizer.to_str()


@cache
def llama(metaspace: bool) -> str:
    """Llama 2's kind: bytes for unknown characters, spaces as U+2581, one put in front of a text.

    Args:
      metaspace: how newer files put it there, by a pre-tokenizer; older ones do it by a normalizer.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return json.dumps(content)


@cache
def unigram() -> str:
    """T5's kind: special tokens are in the model's vocabulary, and characters that it doesn't know become <unk>."""
    special = ["<pad>", "</s>", "<unk>", "<s>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def hugging_face(serialized: str, config: dict | None = None):
    return HuggingFaceTokenizer(serialized, config or {})


@cache
def kind(name: str):
    """The tokenizer of a name in `KINDS`."""
    made = {
        "bpe": lambda: tokenizers.train_bpe(CORPUS, 600),
        "mistral": lambda: tokenizers.make("mistral"),
        "tekken": lambda: tokenizers.make("tekken"),
        "sentencepiece": lambda: SentencePieceTokenizer(sentencepiece_model(control_symbols="[MASK]")),
        "sentencepiece_normalizing": lambda: SentencePieceTokenizer(
            sentencepiece_model(**NORMALIZING, user_defined_symbols="<mask>")
        ),
        "byte_level": lambda: hugging_face(byte_level()),
        "llama": lambda: hugging_face(llama(False)),
        "llama_metaspace": lambda: hugging_face(llama(True)),
        "unigram": lambda: hugging_face(unigram()),
    }
    return made[name]()


EXACT = ("bpe", "mistral", "tekken", "sentencepiece", "byte_level", "llama", "llama_metaspace")
KINDS = (*EXACT, "sentencepiece_normalizing", "unigram")
