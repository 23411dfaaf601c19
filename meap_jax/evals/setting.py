"""What evaluators are made from: a model on a mesh, its tokenizer, and data that is opened only if one needs it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections

from meap_jax.data.prepared import AnyBlocks, Prepared
from meap_jax.errors import ConfigError
from meap_jax.generator import Generator
from meap_jax.model.decoder import Params
from meap_jax.models import Model, OpenModel, origin_of
from meap_jax.run import Run
from meap_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model without its parameters, and the data to evaluate it on."""

    model: Model
    split: str  # Of the data: validation or test.
    open_data: Callable[[], Prepared]
    open_tokenizer: Callable[[], Tokenizer]
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)  # What is known of prompts, see `origin_of`.
    folder: Path | None = None  # Where predictions are written; None: nowhere.
    fingerprint: str = ""  # Of the model's weights; no file of predictions holds those of another.

    @classmethod
    def of(cls, run: Run, split: str, origin: dict[str, Any] | None = None) -> "Setting":
        """The setting of a run, whose data is open; `origin` is that of its `Start`."""
        return cls(run.model, split, lambda: run.prepared, lambda: run.prepared.tokenizer, origin or {})

    @classmethod
    def of_model(
        cls, opened: OpenModel, split: str, open_data: Callable[[], Prepared], folder: Path | None, fingerprint: str
    ) -> "Setting":
        """The setting of a model that was opened apart from its data."""

        def tokenizer() -> Tokenizer:
            if opened.tokenizer is None:
                raise ConfigError("the model has no tokenizer yet: train it first, which trains the tokenizer too.")
            return opened.tokenizer

        return cls(opened.model, split, open_data, tokenizer, origin_of(opened.meta), folder, fingerprint)

    @property
    def config(self) -> ml_collections.ConfigDict:
        """Of the model; `eval.*` are the options of tasks."""
        return self.model.config

    @property
    def seq_len(self) -> int:
        """Tokens of a prompt and its answer at most."""
        return self.config.eval.seq_len or self.config.seq_len

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The prepared data of the config."""
        return self.open_data()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        return self.open_tokenizer()

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt begins with the tokenizer's begin of a document."""
        return self.origin.get("adds_bos", True)

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt; with `eval.chat` it is a user's message in the model's chat template."""
        if self.config.eval.chat:
            return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        return [self.tokenizer.bos_id] * self.adds_bos + self.tokenizer.encode(prompt)

    @contextlib.contextmanager
    def generator(self, params: Params) -> Iterator[Generator]:
        """A generator of the model with these parameters, which it gives back at the end."""
        generator = self._generator
        generator.load(params)
        try:
            yield generator
        finally:
            generator.load(None)

    @functools.cached_property
    def _generator(self) -> Generator:
        options = dict(stops=self.origin.get("stop_ids", ()), adds_bos=self.adds_bos, seq_len=self.seq_len)
        return Generator(self.model, None, self.tokenizer, batch_size=self.config.eval.batch_size, **options)

    def held_out(self) -> dict[str, AnyBlocks]:
        """The blocks of the split, by split and source: {"validation_text": ...}."""
        return {f"{self.split}_{name}": self.prepared.blocks(name, self.split) for name in self.prepared.sources}
