"""TFRecord framing and the tf.train.Example wire format."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sources.tfrecord import encode_example, parse_example, read_records, write_record
from pipeline.errors import UserError


def definition_of_crc32c(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)  # Castagnoli's polynomial, bits reversed
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = definition_of_crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@pytest.mark.parametrize("size", [0, 1, 255, 1000])
def test_a_record_is_framed_as_tensorflow_defines_it(size):
    data = np.random.default_rng(size).bytes(size)
    length = struct.pack("<Q", size)
    assert records(data) == length + masked(length) + data + masked(data)


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
