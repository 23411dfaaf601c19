"""Lines of files that are cut into ranges, compressed, cut off and damaged."""

import gzip
import io
import random

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meap_jax.readers import lines
from meap_jax.readers.records import BadRecord

text = st.text(st.sampled_from("a\né😀\r "), max_size=40).map(str.encode)


@settings(max_examples=300, deadline=None)
@given(text, st.lists(st.integers(0, 100), max_size=6), st.integers(1, 9))
@example("é\n\n😀".encode(), [1, 2, 3, 4, 5, 6, 7], 1)  # in a character, before, at and behind newlines
@example(b"\n\n", [0, 1, 2], 1)
@example(b"a\nb", [2, 2], 4)
def test_every_line_is_read_once_wherever_the_ranges_are_cut(data, cuts, chunk):
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), None]
    expected = [line.removesuffix(b"\n") for line in io.BytesIO(data)]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK", chunk)
        for start, stop in zip(bounds, bounds[1:], strict=False):
            found += lines.line_range(io.BytesIO(data), start, stop)
    assert [line for _, line in found] == expected
    assert all(data[position:].startswith(line) for position, line in found)
    assert all(position == 0 or data[position - 1 : position] == b"\n" for position, _ in found)


def test_a_range_reads_no_further_than_its_last_line():
    file = io.BytesIO(b"x" * 99 + b"\n" + b"y" * 10 * lines._CHUNK)
    assert [line for _, line in lines.line_range(file, 0, 50)] == [b"x" * 99]
    assert file.tell() <= lines._CHUNK


ZSTD = zstandard.ZstdCompressor(write_checksum=True)
kinds = pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", ZSTD.compress)])


def contents(size):
    """Bytes that compress to about a half, the same in each run."""
    rng = random.Random(0)
    return bytes(rng.choice(b"0123456789abcdef") for _ in range(size))


@kinds
def test_compressed_files_are_read_to_their_end_one_stream_after_the_other(suffix, compress):
    data = contents(100_000)
    for streams in ([data], [b""], [], [b"a", b"", b"b"]):
        assert b"".join(lines.decompressed(io.BytesIO(b"".join(map(compress, streams))), suffix)) == b"".join(streams)


def test_padding_and_frames_to_be_skipped_hold_nothing():
    assert b"".join(lines.decompressed(io.BytesIO(gzip.compress(b"a") + bytes(50_000)), ".gz")) == b"a"
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    assert b"".join(lines.decompressed(io.BytesIO(skippable + ZSTD.compress(b"a") + skippable), ".zst")) == b"a"


def test_a_window_of_2_gib_is_read():
    # Declared by zstd --long=31 alone: the frame's header names the window, whatever the content.
    wide = zstandard.ZstdCompressionParameters(window_log=31)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()  # of unknown length
    frame = stream.compress(b"a") + stream.flush()
    assert zstandard.get_frame_parameters(frame).window_size == 2**31
    assert b"".join(lines.decompressed(io.BytesIO(frame), ".zst")) == b"a"


def unpacked_until_bad(suffix, file):
    """What came before the damage, and its error."""
    found = []
    with pytest.raises(BadRecord) as bad:
        for chunk in lines.decompressed(io.BytesIO(file), suffix):
            found.append(chunk)
    return b"".join(found), bad.value


@kinds
@pytest.mark.parametrize("kept", [5, 1_000, 100_000, -1])
def test_a_file_that_is_cut_off_gives_what_is_left_of_it(suffix, compress, kept):
    data = contents(400_000)
    cut = compress(data)[:kept]
    found, bad = unpacked_until_bad(suffix, cut)
    assert (bad.reason, bad.within) == ("ends too early", f"byte {len(cut)}")
    assert data.startswith(found)
    assert len(found) >= {100_000: 1, -1: 200_000}.get(kept, 0)


@kinds
def test_damage_is_found_near_where_it_is(suffix, compress):
    data = contents(400_000)
    damaged = bytearray(compress(data))
    middle = len(damaged) // 2
    damaged[middle : middle + 2_000] = bytes(2_000)
    found, bad = unpacked_until_bad(suffix, damaged)
    assert bad.reason == "is corrupt" and abs(int(bad.within.removeprefix("byte ")) - middle) < 2**18
    assert found[:50_000] == data[:50_000]


@kinds
def test_a_wrong_checksum_and_what_is_no_such_file_at_all_are_corrupt(suffix, compress):
    data = bytearray(compress(b"abc" * 100))
    data[-5 if suffix == ".gz" else -1] ^= 1
    for bad in (bytes(data), b"plain text", compress(b"a") + b"plain text"):
        with pytest.raises(BadRecord, match="is corrupt"):
            list(lines.decompressed(io.BytesIO(bad), suffix))
