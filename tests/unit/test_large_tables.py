"""Label tables that stay in their files: the cases of small tables once more, and a comparison of both ways."""

import contextlib
import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import workqueue
from pipeline.data import sources
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.sources import large_tables, table_chunks
from pipeline.data.sources.columns import Columns
from pipeline.data.sources.rows import read_rows
from pipeline.errors import UserError
from tests.unit.test_hostile_inputs import secret, test_a_label_table_cannot_name_files_outside_the_source  # noqa: F401
from tests.unit.test_source_kinds import labels as kinds_labels
from tests.unit.test_source_kinds import (  # noqa: F401
    tar,
    test_a_row_that_fits_two_files_is_an_error,
    test_a_table_of_another_encoding,
    test_a_table_of_splits_leaves_the_labels_to_the_folders,
    test_forms_of_tables,
    test_minus_one_among_indices_means_no_label,
    test_rows_without_a_file_are_counted_in_split_folders,
    test_several_labels_in_a_cell,
    test_split_columns_under_other_names,
    write,
)
from tests.unit.test_source_layouts import (  # noqa: F401
    test_a_table_in_every_split_folder,
    test_captions_are_not_labels,
    test_columns_are_named_by_flags_and_guessed_in_errors,
    test_labels_in_tables,
    test_names_in_decomposed_letters_are_matched,
    test_paths_of_other_systems_are_matched,
    test_splits_of_files_and_columns,
)
from tests.unit.test_sources import (  # noqa: F401
    test_a_file_on_several_lines_has_all_their_labels,
    test_label_tables,
    test_label_tables_in_unusual_forms,
)


def large(monkeypatch):
    """Every table is large, and a chunk is a row group or a line."""
    for name in ("LARGE_ROWS", "LARGE_BYTES", "CHUNK_ROWS", "CHUNK_BYTES"):
        monkeypatch.setattr(table_chunks, name, 1)


@pytest.fixture(autouse=True)
def all_tables_are_large(monkeypatch, request):
    large(monkeypatch)
    with contextlib.nullcontext() if "ray_local" in request.fixturenames else workqueue.without_ray():
        yield


def test_every_table_of_these_tests_is_large(tmp_path):
    (tmp_path / "t.csv").write_text("file,label\n0.jpg,a\n1.jpg,b\n")
    table = large_tables.open_label_table(str(tmp_path / "t.csv"))
    assert isinstance(table, large_tables.LargeTable)
    assert (table.rows, len(table.chunks)) == (2, 27)


def spellings(rng, path, number):
    """A spelling of a path in a table."""
    changes = [
        str,
        str.upper,
        lambda text: text.replace("/", "\\"),
        lambda text: f"/data/{text}",
        lambda text: text.rsplit(".", 1)[0],
        lambda text: text.rsplit(".", 1)[0] + ".png",
        lambda text: text.rpartition("/")[2],
        lambda text: f" ./{text} ",
        lambda text: text.replace("e", "%65"),
        lambda text: re.sub(r"(^|/)0+(\d)", r"\1\2", text),  # as CSV readers do
    ]
    return changes[int(rng.integers(len(changes)))](path)


NAMES = [
    *("a.jpg", "b.c.jpg", "scan.0001", "scan.0002.jpg", "Bee.JPG", "e", "x.tar.jpeg", "\u00e9.jpg", "e\u0301e.jpg"),
    *("8.jpg", "007.jpeg", "two words.png"),
]


@pytest.mark.parametrize("seed", range(6))
def test_both_ways_find_the_same_rows(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    paths = [f"{('', 'one/', 'two/deep/')[i % 3]}{name}" for i, name in enumerate(rng.permutation(NAMES))]
    write(tmp_path / "photos", *paths)
    listed = [paths[i] for i in rng.permutation(len(paths))[:-2]] + ["gone/other.jpg", "one/none.gif"]
    keys = [spellings(rng, path, i) for i, path in enumerate(listed)]
    labels = [str(rng.integers(5)) for _ in keys]
    splits = [["train", "val", None][int(rng.integers(3))] for _ in keys]
    pq.write_table(pa.table({"path": keys, "label": labels, "split": splits}), tmp_path / "t.parquet", row_group_size=3)
    fragments, names, _, _ = both_ways(tmp_path / "photos", tmp_path / "t.parquet", monkeypatch)
    assert names
    assert 0 in fragments["row"]


def test_both_ways_refuse_a_row_of_two_files(tmp_path, monkeypatch):
    write(tmp_path / "photos", "one/a.jpg", "two/a.jpg", "two/b.jpg")
    (tmp_path / "t.csv").write_text("file,label\na.jpg,x\nb.jpg,y\n")
    assert "the row a.jpg matches several files" in both_ways(tmp_path / "photos", tmp_path / "t.csv", monkeypatch)
    write(tmp_path / "numbers", "one/7.jpg", "two/007.jpg")
    (tmp_path / "t.csv").write_text("id,label\n7,x\n8,y\n")
    assert "the row 7 matches several files" in both_ways(tmp_path / "numbers", tmp_path / "t.csv", monkeypatch)


def numbered(line, count=20):
    """Rows of many images. line: how the row of an image is written, by its number."""
    return "".join(line(i) + "\n" for i in range(count))


FORMS = {
    "quote in a name.csv": 'file,label\n1" x.jpg,cat\n' + numbered(lambda i: f'{i}.jpg,"a\nb"'),
    "quote after a blank.csv": "file,label\n" + numbered(lambda i: f'{i}.jpg, "a {i % 2}\n""b"" c"'),
    "quotes.csv": "file,label\n" + numbered(lambda i: f'{i}.jpg,5" nail{i % 2}' if i % 3 else f'"{i}.jpg","a,\n\nb"'),
    "no header.csv": numbered(lambda i: f'{i}.jpg,"a\nb {i % 2}"'),
    "blank lines.csv": "\n" * 200 + "file,label\n" + numbered(lambda i: f"{i}.jpg,c{i % 3}"),
    "carriage returns.csv": ("file,label\n" + numbered(lambda i: f"{i}.jpg,c{i % 3}")).replace("\n", "\r"),
    "one split.csv": "file_name,split\n" + numbered(lambda i: f"{i}.jpg,train"),
    "late columns.jsonl": numbered(
        lambda i: json.dumps({"file": f"{i}.jpg"} | ({"label": f"c{i % 3}"} if i > 9 else {}))
    ),
    "numbers and flags.jsonl": numbered(
        lambda i: json.dumps({"file": f"{i}.jpg", "label": (1, True, 2.0, 0, False)[i % 5]})
    ),
    "flags and pairs.jsonl": numbered(lambda i: json.dumps({"file": f"{i}.jpg", "label": ("1 2", True, "3")[i % 3]})),
    "nested lists.jsonl": numbered(lambda i: json.dumps({"file": f"{i}.jpg", "label": [["a"], ["b", i % 2]][: i % 3]})),
    "empty lists.jsonl": numbered(lambda i: json.dumps({"file": f"{i}.jpg", "label": []})),
    "one-hot.csv": "file,width,ant,bee,cat\n"
    + numbered(lambda i: f"{i}.jpg,{i},{i % 3 // 2},{i % 3 % 2},{int(i % 3 == 0)}"),
    "not one-hot.csv": "file,width,ant,bee,cat\n" + numbered(lambda i: f"{i}.jpg,{i},{i % 2},{i % 3 % 2},1"),
    "lists of splits.csv": "file,label,split\n" + numbered(lambda i: f"{i}.jpg,a,{('train', '[1]')[i % 2]}"),
    "no labels.csv": "file,label,kind\n" + numbered(lambda i: f"{i}.jpg,,{('a', '[1]')[i % 2]}"),
    "comments.csv": "# made by me\n#2020\nfile,label\n" + numbered(lambda i: f"{i}.jpg,c{i % 3}"),
    "a stated separator.csv": "sep=|\nfile|label\n" + numbered(lambda i: f"{i}.jpg|a, {i % 3}"),
    "blanks.txt": "file    label\n" + numbered(lambda i: f"{i}.jpg   c{i % 3}"),
    "blanks in paths.txt": "file label\n" + numbered(lambda i: f"{'my photos/' * (i % 2)}{i}.jpg c{i % 3}"),
    "celeba.txt": "20\nyoung  male\n" + numbered(lambda i: f"{i}.jpg {(-1, 1)[i % 2]:2d} {(1, -1)[i % 3 // 2]:2d}"),
    "labels of words.txt": numbered(lambda i: f"{i}.jpg {('great white', 'eel')[i % 2]}"),
    "splits without header.csv": numbered(
        lambda i: f"{('TRAIN', 'TEST')[i % 2]},gs://b/{('ant', 'bee')[i % 2]}/{i}.jpg,c{i % 3}"
    ),
    "yes and no.csv": "file,ant,bee\n" + numbered(lambda i: f"{i}.jpg,{('yes', 'no')[i % 2]},{('no', 'yes')[i % 2]}"),
    "decimal commas.csv": "file;label\n" + numbered(lambda i: f"{i}.jpg;{i % 3},0"),
    "thousands.csv": "file;label\n" + numbered(lambda i: f"{i}.jpg;{1 + i % 3},000"),
    "objects.jsonl": numbered(lambda i: json.dumps({"file": f"{i}.jpg", "label": {"id": i % 3, "name": f"c{i % 3}"}})),
    "lists of objects.jsonl": numbered(lambda i: json.dumps({"file": f"{i}.jpg", "labels": [{"name": "a"}] * (i % 3)})),
    "objects without names.jsonl": numbered(lambda i: json.dumps({"file": f"{i}.jpg", "label": {"id": i % 3}})),
    "arrays of texts.csv": "file,labels\n" + numbered(lambda i: f"{i}.jpg,{chr(34)}['a' 'c{i % 3}']{chr(34)}"),
    "padded numbers.csv": "id,label\n" + numbered(lambda i: f"{i:06d},c{i % 3}"),
    "float numbers.csv": "id,label\n" + numbered(lambda i: f"{i}.0,c{i % 3}"),
    "signed addresses.csv": "file,label\n"
    + numbered(lambda i: f"https://x.org/{('ant', 'bee')[i % 2]}/{i}.jpg?size=1&key=%2Fa,c{i % 3}"),
    "missing values.csv": "file,label\n"
    + numbered(lambda i: f"{i}.jpg,{('Nan', 'null', 'NULL', '(null)', 'c')[i % 5]}"),
    "flags alone.csv": "file,ant,bee\n" + numbered(lambda i: f"{i}.jpg,{i % 2},{i % 3 % 2}"),
}


@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize("chunk", [1, 64])
@pytest.mark.parametrize("form", FORMS)
def test_both_ways_read_the_same_forms(tmp_path, monkeypatch, form, chunk, unlabelled):
    write(tmp_path / "photos", '1" x.jpg', *(f"{('ant', 'bee')[i % 2]}/{i}.jpg" for i in range(20)))
    (tmp_path / form).write_bytes(FORMS[form].encode())
    monkeypatch.setattr(table_chunks, "CHUNK_BYTES", chunk)
    if form.endswith(".jsonl"):
        monkeypatch.setattr(table_chunks, "HEAD_BYTES", 100)
    found = both_ways(tmp_path / "photos", tmp_path / form, monkeypatch, unlabelled=unlabelled)
    refused = form in ("not one-hot.csv", "no labels.csv") and not unlabelled
    assert isinstance(found, str) == (refused or form in ("thousands.csv", "objects without names.jsonl")), found


@pytest.mark.parametrize("values", [[[1.0, 2.0], [float("nan")]], [[1.0, float("nan")], None, [2.0]], [[b"a"], []]])
def test_both_ways_read_the_same_lists_of_parquet(tmp_path, monkeypatch, values):
    write(tmp_path / "photos", *(f"{i}.jpg" for i in range(6)))
    lists = [values[i % len(values)] for i in range(6)]
    pq.write_table(pa.table({"file": [f"{i}.jpg" for i in range(6)], "label": lists}), tmp_path / "t.parquet", 2)
    assert not isinstance(both_ways(tmp_path / "photos", tmp_path / "t.parquet", monkeypatch), str)


def test_a_table_that_says_nothing_is_ignored_both_ways(tmp_path, monkeypatch):
    write(tmp_path, *(f"{name}/{i}.jpg" for name in ("ant", "bee") for i in range(3)))
    (tmp_path / "metadata.csv").write_text("file_name,split\nant/0.jpg,train\nant/gone.jpg,train\n")
    fragments, names, _, _ = both_ways(tmp_path, None, monkeypatch)
    assert (len(fragments["path"]), names) == (6, {"ant", "bee"})


@pytest.mark.parametrize("header", ["file,label,x\n", ""])
@pytest.mark.parametrize("seed", range(40))
def test_chunks_have_the_rows_that_csv_reads(tmp_path, monkeypatch, seed, header):
    """Of tables with cells of several lines; one in four has a lone quotation mark, and may be refused both ways."""
    rng = np.random.default_rng(seed)
    tokens = [
        ',"a\n,""b",',
        ',"\r\n\n"\n',
        '\n"x ""y"" z"\r\n',
        ",",
        ",",
        " ",
        "\n",
        "\n",
        "a",
        "b",
        "\r\n",
        "\u2028",
        ',"",',
    ]
    parts = [tokens[i] for i in rng.integers(len(tokens), size=200)]
    parts[100] = '"' if seed % 4 == 0 else parts[100]
    text = header + "0.jpg,c,0\n" + "".join(parts)
    (tmp_path / "t.csv").write_bytes(text.encode())
    monkeypatch.setattr(table_chunks, "CHUNK_BYTES", int(rng.integers(1, 60)))
    reader, chunks = table_chunks.open_chunks(str(tmp_path / "t.csv"), Columns())
    file, *others = reader.names
    monkeypatch.setattr(large_tables, "key_of", str)  # rows without a file name count as well
    try:
        expected = read_rows(str(tmp_path / "t.csv"))
    except UserError:
        assert seed % 4 == 0
        with pytest.raises(UserError, match="has an opening quotation mark"):
            large_tables.profile_table(reader, chunks, file, others, [])
        return
    profile, chunks = large_tables.profile_table(reader, chunks, file, others, [])
    rows = [row for chunk in chunks for batch in reader.batches(chunk, reader.names) for row in rows_of_batch(batch)]
    assert rows == expected
    assert profile.rows == len(rows)


def rows_of_batch(batch):
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def both_ways(folder, table, monkeypatch, **options):
    """The result of a scan, which does not depend on the size at which a table counts as large."""
    found = outcome(folder, table, **options)
    for name in ("LARGE_ROWS", "LARGE_BYTES"):
        monkeypatch.setattr(table_chunks, name, 1 << 40)
    assert outcome(folder, table, **options) == found
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,label\n0.jpg," + "a" * 140_000, "field larger than"),
        ("file,label\n0.jpg," + "a" * (9 << 20), "a line of more"),
    ],
)
def test_huge_cells_are_refused(tmp_path, content, message, monkeypatch):
    write(tmp_path / "photos", "0.jpg")
    (tmp_path / "t.csv").write_text(content)
    monkeypatch.setattr(table_chunks, "CHUNK_BYTES", 1 << 18)
    with pytest.raises(UserError, match=message):
        sources.discover([str(tmp_path / "photos")], labels=str(tmp_path / "t.csv"))


def test_the_line_before_a_chunk_has_a_limit(tmp_path):
    (tmp_path / "t.csv").write_text("a" * (20 << 20))
    reader = table_chunks.ChunkReader(uri=str(tmp_path / "t.csv"), names=())
    with pytest.raises(UserError, match="a line of more than 8,388,608 bytes at byte 99"):
        next(reader.lines(table_chunks.Chunk(100, 1 << 30)))


def test_too_many_columns_of_json_lines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(table_chunks, "MAX_COLUMNS", 5)
    (tmp_path / "t.jsonl").write_text(numbered(lambda i: json.dumps({f"{i}.jpg": "a"})))
    with pytest.raises(UserError, match="more than 5 names of columns"):
        large_tables.open_label_table(str(tmp_path / "t.jsonl"))


def outcome(folder, table, **options):
    """The result of a scan: every fragment, in order of paths, or the error."""
    try:
        [source] = sources.discover([str(folder)], labels=table and str(table), **options)
    except UserError as error:
        return str(error)
    fragments = source.fragments.sort_by("path").select(["path", "labels", "split", "row"]).to_pydict()
    return fragments, source.names, source.splits, source.multilabel


def test_a_bad_row_far_into_the_table_is_named(tmp_path):
    write(tmp_path / "photos", "0.jpg")
    lines = [json.dumps({"file": f"{i}.jpg", "label": "a"}) for i in range(60)]
    for bad, message in (
        ('{"label": "a"}', "row 61 of the label table has no file"),
        ("[]", "must be an object"),
        ("{", "cannot read the label table"),
    ):
        (tmp_path / "t.jsonl").write_text("\n".join([*lines, bad]))
        with pytest.raises(UserError, match=message):
            sources.discover([str(tmp_path / "photos")], labels=str(tmp_path / "t.jsonl"))


def test_large_tables_of_splits_in_one_folder_are_refused(tmp_path):
    write(tmp_path, "train/0.jpg", "test/0.jpg")
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("file,label\n0.jpg,a\n1.jpg,b\n")
    with pytest.raises(UserError, match="write one table with the columns file_name, label and split"):
        sources.discover([str(tmp_path)])


def test_an_archive_with_a_large_table_is_read_with_a_warning(tmp_path, caplog):
    tar(tmp_path / "a.tar", "0.jpg", "1.jpg")
    (tmp_path / "t.csv").write_text("file,label\n0.jpg,a\n1.jpg,b\n")
    assert kinds_labels(tmp_path / "a.tar", labels=str(tmp_path / "t.csv")) == {"0.jpg": ["a"], "1.jpg": ["b"]}
    assert "2 rows are read into the memory of every process" in caplog.text


def test_a_column_of_too_many_labels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(large_tables, "MAX_VALUES", 50)
    write(tmp_path / "photos", "0.jpg")
    (tmp_path / "t.csv").write_text("file,label\n" + "".join(f"{i}.jpg,c{i}\n" for i in range(60)))
    with pytest.raises(UserError, match="column label has more than 50 different values"):
        sources.discover([str(tmp_path / "photos")], labels=str(tmp_path / "t.csv"))


def test_too_many_rows_without_a_file_are_an_error_before_any_work(tmp_path):
    write(tmp_path / "photos", "0.jpg", "1.jpg")
    (tmp_path / "t.csv").write_text("file,label\n" + "".join(f"{i}.jpg,a\n" for i in range(10)))
    config = PrepareConfig(
        source=(str(tmp_path / "photos"),), output=str(tmp_path / "out"), labels=str(tmp_path / "t.csv")
    )
    with pytest.raises(UserError, match=r"8 rows of the label table have no file, of 10 inputs, .* \(such as 2.jpg\)"):
        prepare(config)
    assert not (tmp_path / "out").exists()
    prepared = prepare(dataclasses.replace(config, max_reject_fraction=0.8))[""]
    assert prepared.rejects == {"missing file": 8}


def test_a_join_on_ray(tmp_path, ray_local, caplog):
    write(tmp_path / "photos", *(f"{i % 3}/{i}.jpg" for i in range(30)))
    table = pa.table({"path": [f"X/{i % 3}/{i}" for i in range(2, 32)], "label": [f"c{i % 4}" for i in range(2, 32)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    fragments, names, _, multilabel = outcome(tmp_path / "photos", tmp_path / "t.parquet")
    found = dict(zip(fragments["path"], fragments["labels"], strict=True))
    assert found == {f"{i % 3}/{i}.jpg": [f"c{i % 4}"] if i > 1 else None for i in range(30)} | {
        f"X/{i % 3}/{i}": [f"c{i % 4}"] for i in (30, 31)
    }
    assert [fragments["path"][i] for i, row in enumerate(fragments["row"]) if row] == ["0/0.jpg", "1/1.jpg"]
    assert (names, multilabel) == ({"c0", "c1", "c2", "c3"}, False)
    assert "2 of 30 rows of" in caplog.text
    write(tmp_path / "photos", "again/5.jpg")
    (tmp_path / "t.csv").write_text("file,label\n5.jpg,a\n6.jpg,b\n")
    with pytest.raises(UserError, match=r"the row 5.jpg matches several files, 2/5.jpg and again/5.jpg"):
        sources.discover([str(tmp_path / "photos")], labels=str(tmp_path / "t.csv"))
