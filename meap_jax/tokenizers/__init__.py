"""Tokenizers of every kind behind one interface; `data.tokenizer` of the config names one.

- `bpe`: a byte-level BPE trained on the corpus (`train_bpe`), of the size of `model.vocab_size`
- `mistral`: the 32,000 pieces of Llama-family decoders; `tekken`: Mistral's 131,072 ids. The package mistral-common
  carries both, so neither needs a download
- a path: a `tokenizer.model` (SentencePiece), `tokenizer.json` (Hugging Face) or `tekken.json`, or a folder of one
"""

import importlib.util
from pathlib import Path

from meap_jax.errors import ConfigError, UserError
from meap_jax.fields import TOKENIZERS, is_path
from meap_jax.files import parse_json
from meap_jax.tokenizers.bpe import BPETokenizer, train_bpe, trained_here
from meap_jax.tokenizers.hugging_face import HuggingFaceTokenizer
from meap_jax.tokenizers.interface import Tokenizer, refusal

__all__ = ["CHAT_TEMPLATE", "BPETokenizer", "Tokenizer", "load", "make", "train_bpe"]

CHAT_TEMPLATE = "chat_template.jinja"  # The file in which transformers writes it since 4.50.

# Where a folder holds several, the first: what others read in a folder of the Hugging Face hub, so that ids are those
# of the weights beside it.
_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")
# Files of the package mistral-common (Apache-2.0): a model of 32,000 pieces, and the Tekken of 131,072 ids.
_CARRIED = {"mistral": "tokenizer.model.v1", "tekken": "tekken_*.json"}


def make(name_or_path: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, unless that is bpe, which is trained (`train_bpe`).

    Args:
      name_or_path: mistral, tekken, or the path of a local file or folder. A file's kind is recognized by its content.

    Raises:
      ConfigError: an unknown word, a package that isn't installed, a path where nothing is, or a file that is no
        tokenizer or lacks bos or eos.
    """
    if name_or_path in _CARRIED:
        return _read(_carried(name_or_path, _CARRIED[name_or_path]))
    if not is_path(name_or_path):
        choices = ", ".join(word for word in TOKENIZERS if word != "bpe")
        raise refusal(name_or_path, f"must be one of {choices}, or a path, such as ./{name_or_path}")
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        try:
            return load(path)
        except FileNotFoundError:
            raise refusal(name_or_path, f"that folder holds none of {', '.join(_FILES)}") from None
    if not path.is_file():
        raise refusal(name_or_path, "no such file or folder is on this machine")
    return _read(path)


def load(folder: str | Path) -> Tokenizer:
    """Rebuilds the tokenizer whose `files()` were written into a folder.

    Raises:
      FileNotFoundError: the folder holds none.
      ConfigError: its file is damaged.
    """
    for name in _FILES:
        if Path(folder, name).is_file():
            return _read(Path(folder, name))
    raise FileNotFoundError(f"{folder} holds none of {', '.join(_FILES)}.")


def _read(path: Path) -> Tokenizer:
    """The tokenizer of a file, with the chat template that lies beside it."""
    try:
        tokenizer = _read_file(path)
    except (OSError, UserError):
        raise
    except BaseException as error:  # The packages that read them are made for files that are right, and panic too.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise refusal(str(path), f"is no tokenizer that can be used ({reason})") from error
    if (template := path.with_name(CHAT_TEMPLATE)).is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _read_file(path: Path) -> Tokenizer:
    """The tokenizer of a file, of the kind that its content shows."""
    # Each kind's library is imported where it is used: a worker starts faster without the others.
    try:
        serialized = path.read_bytes()
    except OSError as error:
        raise refusal(str(path), f"can't be read: {error.strerror}") from error
    if not serialized.lstrip().startswith(b"{"):
        from meap_jax.tokenizers.sentence_piece import SentencePieceTokenizer

        return SentencePieceTokenizer(serialized, str(path))
    content = _parse(path, serialized)
    if isinstance(content.get("model"), dict):
        if trained_here(content):
            return BPETokenizer(serialized.decode("utf-8"))
        beside = path.with_name("tokenizer_config.json")
        config = _parse(beside, beside.read_bytes()) if beside.is_file() else {}
        return HuggingFaceTokenizer(serialized.decode("utf-8"), config, str(path))
    if "vocab" in content and "config" in content:
        from meap_jax.tokenizers.tekken_json import TekkenTokenizer

        return TekkenTokenizer(serialized, content, str(path))
    raise refusal(str(path), "is neither a tokenizer.json nor a tekken.json")


def _parse(path: Path, serialized: bytes) -> dict:
    try:
        content = parse_json(serialized)
    except ValueError as error:
        raise refusal(str(path), f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise refusal(str(path), "is not a JSON object")
    return content


def _carried(word: str, pattern: str) -> Path:
    """The path of a file that the package mistral-common carries."""
    # find_spec doesn't run the package, whose import takes seconds.
    spec = importlib.util.find_spec("mistral_common")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder, "data").glob(pattern)):
            return path
    lack = f"carries no {pattern} in this version" if spec else "which carries its file, is not installed"
    raise ConfigError(
        f"data.tokenizer is {word!r}, but the package mistral-common{'' if spec else ','} {lack}: "
        "pip install mistral-common."
    )
