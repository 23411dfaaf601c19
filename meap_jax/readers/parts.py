"""What all readers share: parts of a corpus, and the count of records that were left out."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from meap_jax.errors import DataError

# A part is about this long where the format can be entered in the middle: seconds of work, so that workers end
# together, and few enough files behind it. What can't, as C4's .json.gz, is a part a file: 1,024 of 300 MB.
PART_BYTES = 64 * 2**20


class Part(NamedTuple):
    """What one worker reads of a corpus from its beginning to its end.

    `start` and `stop` count bytes (.jsonl, .json), row groups (.parquet) or records (TFDS). Without a `stop` the part
    goes to the end of its file, which is then `start + num_bytes` bytes long; otherwise `num_bytes` is about what
    there is to read. `is_held_out` is for `meap_jax.corpus.sources`: the part is of a corpus that is held out.
    """

    path: str
    start: int = 0
    stop: int | None = None
    num_bytes: int = 0
    is_held_out: bool = False


class Skips:
    """Bad records are counted by reason, and are an error once there are too many.

    Attributes:
      limit: so many may be skipped.
      counts: how many records each reason cost. A reason goes on after a place: "is not JSON".
      first: where the first of each reason was.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.counts = Counter[str]()
        self.first: dict[str, str] = {}

    def add(self, reason: str, place: str, count: int = 1) -> None:
        """Counts `count` records at a place (a file, and the line, byte or row in it).

        Raises:
          DataError: more than `limit` have now been skipped.
        """
        self.counts[reason] += count
        self.first.setdefault(reason, place)
        if (total := self.counts.total()) > self.limit:
            raise DataError(f"{place} {reason} (bad records: {total:,}, allowed: {self.limit:,}).")


class Corpus(Protocol):
    """Texts that can be read in parts, each on its own and by any process: a corpus can be pickled."""

    def parts(self) -> list[Part]:
        """All parts, in an order that doesn't depend on the machine.

        Raises:
          ConfigError: the path can't be a corpus.
          DataError: there is nothing in it that can be read.
        """
        ...

    def read(self, part: Part, skips: Skips) -> Iterator[str]:
        """The texts of a part, in order; never half a surrogate pair in them, never blank space alone.

        Raises:
          DataError: `skips` has reached its limit, or the part has vanished or changed.
        """
        ...
