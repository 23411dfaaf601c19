"""What evaluators are made for: a model on a mesh, and data that is opened only if one of them asks for it."""

import dataclasses
import functools
from collections.abc import Callable

from meap_jax.data.prepared import Prepared
from meap_jax.models import Model
from meap_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model apart from its parameters, and what it is evaluated on."""

    model: Model
    split: str  # Of the data: validation or test.
    open_data: Callable[[], Prepared]

    @classmethod
    def of(cls, run: Run, split: str) -> "Setting":
        """That of a run, whose data is open."""
        return cls(run.model, split, lambda: run.prepared)

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The prepared data of the config."""
        return self.open_data()
