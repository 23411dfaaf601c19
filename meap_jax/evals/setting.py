"""What evaluators are made from: a model on a mesh, and data that is opened only if one of them needs it."""

import dataclasses
import functools
from collections.abc import Callable

from meap_jax.data.prepared import Blocks, Prepared
from meap_jax.models import Model
from meap_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model without its parameters, and the data to evaluate it on."""

    model: Model
    split: str  # Of the data: validation or test.
    open_data: Callable[[], Prepared]

    @classmethod
    def of(cls, run: Run, split: str) -> "Setting":
        """The setting of a run, whose data is open."""
        return cls(run.model, split, lambda: run.prepared)

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The prepared data of the config."""
        return self.open_data()

    def held_out(self) -> dict[str, Blocks]:
        """The blocks of the split, by split and source: {"validation_text": ...}."""
        return {f"{self.split}_{name}": self.prepared.blocks(name, self.split) for name in self.prepared.sources}
