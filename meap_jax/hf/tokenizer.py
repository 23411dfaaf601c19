"""A tokenizer as the files that transformers reads: a tokenizer.json with [MASK], and a tokenizer_config.json.

SentencePiece models and Tekken files are turned into the form of the package `tokenizers`. What comes out is compared
with the original on texts of many scripts before anything is written.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from meap_jax.errors import ConfigError
from meap_jax.tokenizers import Tokenizer, load
from meap_jax.tokenizers.bpe import BPETokenizer
from meap_jax.tokenizers.hugging_face import HuggingFaceTokenizer
from meap_jax.tokenizers.sentence_piece import SentencePieceTokenizer
from meap_jax.tokenizers.tekken_json import TekkenTokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

_MASK_NAMES = ("[MASK]", "<|mask|>", "<|mask_token|>")  # The first that no other token has.
# Written for this check: words, numbers, code, spaces, and scripts of one to four bytes a character.
_SAMPLES = (
    "Hello, world! It's 3.14159 o'clock -- isn't it?", "  two  spaces\tand a tab\n\n\nnew lines \n", "a", "",
    "def f(x):\n    return {'k': [x**2 for _ in range(10)]}  # code", "HTTP/1.1 404 e-mail@example.org 1234567890",
    "Ünïcödé, naïve café, Straße, İstanbul", "Ελληνικά και кириллица", "مرحبا بالعالم שלום",
    "こんにちは世界。漢字かな交じり文", "안녕하세요 세계", "नमस्ते दुनिया", "🙂🚀 👩‍👩‍👧‍👦 ∑∫√ ≠ ⅓",
    "ﬁne ﬂow … “quotes” — dash", "x" * 40, "The quick brown fox " * 5,
)  # fmt: skip


def hub_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, bytes]:
    """The files of a tokenizer for transformers.

    Args:
      tokenizer: of any kind.
      seq_len: the longest text of its model.

    Raises:
      ConfigError: it can't be expressed there.
    """
    names: dict[str, str] = {}
    extra: dict[str, Any] = {"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        files = tokenizer.files()
        content = json.loads(files["tokenizer.json"])
        names = json.loads(files["tokenizer_config.json"])
    elif isinstance(tokenizer, BPETokenizer):
        content = _trained_here(tokenizer)
        names |= dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", mask_token="[MASK]")
    elif isinstance(tokenizer, SentencePieceTokenizer):
        content, names = _of_sentence_piece(tokenizer), names | _names(tokenizer)
    elif isinstance(tokenizer, TekkenTokenizer):
        content, names = _of_tekken(tokenizer), names | _names(tokenizer)
    else:
        raise ConfigError(f"a tokenizer of the kind {tokenizer.name} can't be written for transformers.")
    built, names["mask_token"] = _with_mask(content, names.get("mask_token"), tokenizer.mask_id)
    _compare(built, tokenizer)
    config = (
        extra
        | names
        | dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False, model_max_length=seq_len)
    )
    return {
        "tokenizer.json": built.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True).encode(),
    }


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    """The names of begin, end and padding."""
    specials = tokenizer._specials
    roles = dict(bos_token=tokenizer.bos_id, eos_token=tokenizer.eos_id, pad_token=tokenizer.pad_id)
    if tokenizer.mask_id < tokenizer.num_own_ids:
        roles["mask_token"] = tokenizer.mask_id
    return {role: specials[index] for role, index in roles.items() if index in specials}


def _with_mask(content: Mapping[str, Any], name: str | None, mask_id: int) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer of a tokenizer.json with [MASK] among its added tokens, and its name there.

    Args:
      content: of the tokenizer.json.
      name: of the token that it has already; None if [MASK] is to be added.
      mask_id: of [MASK].
    """
    built = tokenizers.Tokenizer.from_str(json.dumps({**content, "truncation": None, "padding": None}))
    if name is None:
        name = next(free for free in _MASK_NAMES if built.token_to_id(free) is None)
        built.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        built = tokenizers.Tokenizer.from_str(built.to_str())  # Ids that leave places out change on the way.
    if built.token_to_id(name) != mask_id:
        raise ConfigError(f"the tokenizer can't be written for transformers: {name} would not be id {mask_id} there.")
    return built, name


def _compare(built: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Makes sure that texts have the same ids."""
    for text, ids in zip(_SAMPLES, tokenizer.encode_batch(_SAMPLES), strict=True):
        found = built.encode(text, add_special_tokens=False).ids
        if found != ids:
            raise ConfigError(
                f"the tokenizer ({tokenizer.name}) can't be written for transformers: {text[:30]!r} would be "
                f"{found[:8]} there and is {ids[:8]}."
            )


def _begins_with(name: str, index: int) -> processors.TemplateProcessing:
    """Puts the begin of a document in front of every text."""
    return processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, index)]
    )


def _trained_here(tokenizer: BPETokenizer) -> dict[str, Any]:
    """Its own tokenizer.json, with special tokens that text can name, as transformers' users expect."""
    built = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    built.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in tokenizer._specials.values()]
    )
    built.post_processor = _begins_with("<bos>", tokenizer.bos_id)
    return json.loads(built.to_str())


def merges(priority: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE that is given by its tokens and the order in which they are preferred, the lowest first."""
    found: list[tuple[str, str]] = []
    for token in sorted(priority, key=priority.__getitem__):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [pair for pair in splits if pair[0] in priority and pair[1] in priority]
        found += sorted(pairs, key=lambda pair: (priority[pair[0]], priority[pair[1]]))
    return found


def _of_sentence_piece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """A model of pieces that are merged, with bytes for unknown characters: Llama's kind and Mistral's."""
    processor = tokenizer._processor
    ids = range(processor.vocab_size())
    pieces = [processor.id_to_piece(i) for i in ids]
    is_text = [not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i)) for i in ids]
    ranked = sorted((i for i in ids if is_text[i]), key=lambda i: (-processor.get_score(i), i))
    unknown = processor.id_to_piece(processor.unk_id())
    bpe = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges({pieces[i]: rank for rank, i in enumerate(ranked)}),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    built = tokenizers.Tokenizer(bpe)
    begins_with_space = processor.encode("a", out_type=str)[:1] != ["a"]
    spaces = [normalizers.Replace(" ", "▁")]
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if begins_with_space else spaces)
    strip = [decoders.Strip(" ", 1, 0)] if begins_with_space else []
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [piece for i, piece in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)]
    built.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    built.post_processor = _begins_with(pieces[tokenizer.bos_id], tokenizer.bos_id)
    return json.loads(built.to_str())


def _of_tekken(tokenizer: TekkenTokenizer) -> dict[str, Any]:
    """Bytes as the characters that GPT-2 gives them; the regular expression as a pre-tokenizer."""
    encoding = tokenizer._encoding
    letters = _letters_of_bytes()
    ranks = {"".join(letters[byte] for byte in token): rank for token, rank in encoding._mergeable_ranks.items()}
    names = {name: index for index, name in tokenizer._specials.items() if index != tokenizer.mask_id}
    built = tokenizers.Tokenizer(models.BPE(vocab=names | ranks, merges=merges(ranks)))
    split = pre_tokenizers.Split(Regex(encoding._pat_str), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    built.decoder = decoders.ByteLevel()
    special = sorted(names, key=names.__getitem__)
    built.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    built.post_processor = _begins_with(tokenizer._specials[tokenizer.bos_id], tokenizer.bos_id)
    return json.loads(built.to_str())


def _letters_of_bytes() -> list[str]:
    """The character of each byte: itself where it prints, else the next one from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


# ------------------------------------------------------------------------------------------------------------- opening

_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>|\[control_\d+\]")  # Llama 3's, Mistral's.


def open_hub_tokenizer(folder: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer in a folder of the hub, and whether it begins a text with its begin of a document by itself.

    [MASK] is the tokenizer's own mask token, else a token that it reserves for such uses, else the next free id.

    Raises:
      ConfigError: the folder holds none, or one that can't be read.
    """
    try:
        tokenizer = load(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no tokenizer: {error}") from error
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer, True  # As transformers' LlamaTokenizer and Mistral's own code do.
    files = tokenizer.files()
    config = json.loads(files["tokenizer_config.json"])
    serialized = files["tokenizer.json"].decode()
    if "mask_token" not in config:
        added = [token["content"] for token in json.loads(serialized)["added_tokens"]]
        reserved = next(filter(_RESERVED.fullmatch, added), None)
        if reserved is not None:
            config |= {"mask_token": reserved, "chat_template": tokenizer.chat_template}
            tokenizer = HuggingFaceTokenizer(serialized, config, str(folder))
    beside = folder / "tokenizer_config.json"
    said = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    adds_bos = tokenizers.Tokenizer.from_str(serialized).encode("a").ids[:1] == [tokenizer.bos_id]
    # Llama's class goes by the config; others by the tokenizer.json.
    if "Llama" in str(said.get("tokenizer_class")) and said.get("add_bos_token") is not None:
        adds_bos = bool(said["add_bos_token"])
    return tokenizer, adds_bos and tokenizer.bos_id != tokenizer.eos_id
