"""Reads a corpus as one process would."""

from meap_jax.readers import Skips


def read(corpus, skips=None):
    """The texts of all parts, in order; by default no record may be skipped."""
    return [text for part in corpus.parts() for text in corpus.read(part, skips or Skips(0))]
