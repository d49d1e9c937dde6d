"""TFRecord framing, CRC-32C and the tf.train.Example wire format."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sources.tfrecord import POLYNOMIAL, crc32c, encode_example, parse_example, read_records, write_record
from pipeline.errors import UserError


def bitwise_crc32c(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (POLYNOMIAL if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_crc_known_values():
    """The check value of the CRC catalogue, and RFC 3720's vectors B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 511, 512, 3 * 256, 1000])
def test_crc_against_the_definition(length):
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == bitwise_crc32c(data)


def records(*payloads: bytes) -> bytes:
    file = io.BytesIO()
    for payload in payloads:
        write_record(file, payload)
    return file.getvalue()


def test_records_round_trip():
    payloads = [b"", b"a", b"x" * 1000]
    assert list(read_records(io.BytesIO(records(*payloads)), "f")) == payloads


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "cut short"),
        (lambda b: b[:7], "cut short"),
        (lambda b: b[:20] + b"!" + b[21:], "wrong checksum of the data"),
        (lambda b: b"\x09" + b[1:], "wrong checksum of the length"),
    ],
)
def test_damage_is_named(damage, message):
    with pytest.raises(UserError, match=f"train.tfrecord: record 0.*{message}"):
        list(read_records(io.BytesIO(damage(records(b"some picture bytes"))), "train.tfrecord"))


@given(
    integers=st.lists(st.integers(-(2**63), 2**63 - 1)),
    floats=st.lists(st.floats(width=32, allow_nan=False)),
    texts=st.lists(st.binary()),
)
def test_example_round_trip(integers, floats, texts):
    example = parse_example(encode_example({"i": integers, "f": floats, "t": texts}))
    assert list(example["i"]) == integers
    assert list(example["f"]) == floats
    assert list(example["t"]) == texts


def test_unpacked_numbers():
    """Writers may leave repeated numbers unpacked: Feature{int64_list{value: 1, value: -1}} with one tag per value."""
    minus_one = b"\xff" * 9 + b"\x01"
    int64_list = b"\x08\x01" + b"\x08" + minus_one
    feature = b"\x1a" + bytes([len(int64_list)]) + int64_list
    entry = b"\x0a\x01k\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    assert parse_example(b"\x0a" + bytes([len(features)]) + features)["k"].tolist() == [1, -1]


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_parse_or_are_refused(data):
    try:
        parse_example(data)
    except UserError as error:
        assert "not a tf.train.Example" in str(error)  # noqa: PT017
