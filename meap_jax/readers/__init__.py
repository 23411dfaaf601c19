"""Readers of text in files, in buckets and in TensorFlow Datasets: parts that workers read, and texts in order."""

from meap_jax.readers.conversations import Conversation, ConversationCorpus, open_conversations
from meap_jax.readers.files import FileCorpus
from meap_jax.readers.parts import Corpus, Part, Skips
from meap_jax.readers.records import Selection
from meap_jax.readers.tfds import TfdsCorpus

__all__ = ["Conversation", "ConversationCorpus", "Corpus", "Part", "Skips", "open_conversations", "open_corpus"]


def open_corpus(path: str, *, field: str = "text", where: str = "") -> Corpus:
    """The corpus at a path. Nothing is read yet: `parts` is what looks at the disk.

    Args:
      path: one of
        - a .txt file (one document), a .jsonl or .json file (an object a line), either of those two as .gz or .zst, or
          a .parquet file (a record a row);
        - a folder, which is searched for all of them at every depth; names that begin with a dot are skipped;
        - a pattern for files and folders, such as /data/c4/en/c4-train.*.json.gz;
        - any of these on gs://, s3:// or what else fsspec knows;
        - tfds:NAME, tfds:NAME/CONFIG:VERSION or tfds:/folder/of/that/version, each with ?split=SPLIT behind it for
          another split than train: data that TensorFlow Datasets prepared as ArrayRecord.
      field: the field of a record that is the text, with a dot before each name within another: `meta.text`.
      where: only records in which a field has this value are taken: `meta.redpajama_set_name=RedPajamaGithub`.

    Raises:
      ConfigError: `field` or `where` names no field.
    """
    selection = Selection.parse(field, where)
    return TfdsCorpus(path, selection) if path.startswith("tfds:") else FileCorpus(path, selection)
