"""Bad records are counted, up to a limit."""

import pickle

import pytest

from meap_jax.errors import DataError
from meap_jax.readers import Part, Skips


def test_skips_count_by_reason_and_remember_the_first_place():
    skips = Skips(5)
    skips.add("is blank", "a, line 1")
    skips.add("is not JSON", "a, line 2")
    skips.add("is blank", "b, line 9", 3)
    assert skips.counts == {"is blank": 4, "is not JSON": 1} and skips.total == 5
    assert skips.first == {"is blank": "a, line 1", "is not JSON": "a, line 2"}


def test_the_record_beyond_the_limit_is_an_error_with_its_place():
    skips = Skips(1)
    skips.add("is blank", "a, line 1")
    with pytest.raises(DataError, match=r"^b, line 7 is not JSON \(bad records: 2, allowed: 1\)\.$"):
        skips.add("is not JSON", "b, line 7")
    with pytest.raises(DataError, match="1,000"):
        Skips(999).add("is corrupt", "c.parquet, row group 3, row 0", 1_000)


def test_parts_and_skips_cross_processes():
    skips = Skips(3)
    skips.add("is blank", "a")
    again = pickle.loads(pickle.dumps(skips))
    assert (again.limit, again.counts, again.first) == (3, {"is blank": 1}, {"is blank": "a"})
    assert pickle.loads(pickle.dumps(Part("a", 1, 2, 1))) == Part("a", 1, 2, 1)
