"""MEAP and NTP: pre-training, evaluation and analysis in JAX."""

__version__ = "0.1.0"
