"""Tables of lists of URLs: a span is read on its own, whatever the format."""

import csv
import gzip
import io
import json
import tracemalloc

import pytest

from pipeline.data.sources.urltables import open_table

ROWS = [{"url": f"https://example.org/{i}.jpg", "caption": f'number "{i}",\nin two lines é'} for i in range(1000)]


def delimited(delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["url", "caption"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


TABLES = {
    "list.csv": "\ufeff" + delimited(","),
    "list.tsv": delimited("\t"),
    "list.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", TABLES)
def test_each_span_is_read_on_its_own(tmp_path, name, suffix):
    data = TABLES[name].encode()
    path = tmp_path / (name + suffix)
    path.write_bytes(gzip.compress(data) if suffix else data)
    with open_table(str(path)) as table:
        assert table.first_rows() == ROWS[:100]
        spans = list(table.spans())
        assert [row for span in spans for row in span.values] == ROWS
    assert len(spans) > 5
    for span in reversed(spans):
        with open_table(str(path)) as table:
            found = list(table.rows(span.start, span.stop, span.first, None))
        assert found == list(enumerate(ROWS))[span.first : span.first + span.rows]


def test_long_lines_that_compress_well_take_little_memory(tmp_path):
    path = tmp_path / "list.csv.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(b"url,caption\n")
        for _ in range(60):
            file.write(b"http://h/x.jpg," + b"x" * (4 << 20) + b"\n")
    tracemalloc.start()
    try:
        with open_table(str(path)) as table:
            assert len(table.first_rows()) < 6
            assert sum(span.rows for span in table.spans()) == 60
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_span_of_gzipped_text_is_found_without_parsing_what_precedes_it(tmp_path):
    """Lines before the span may even be damaged."""
    start = [b"url,caption\n", *(b"http://h/%d.jpg,a\n" % i for i in range(200))]
    data = b"".join([*start, b"\xff" * 100, b"\n", b"http://h/last.jpg,b\n"])
    path = tmp_path / "list.csv.gz"
    path.write_bytes(gzip.compress(data))
    with open_table(str(path)) as table:
        place = data.index(b"http://h/last")
        found = list(table.rows(place, len(data), 201, None))
    assert found == [(201, {"url": "http://h/last.jpg", "caption": "b"})]
