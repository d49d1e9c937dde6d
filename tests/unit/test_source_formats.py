"""A new input format is one module and one entry in a list."""

import types

import pyarrow as pa

from pipeline.data import sources
from pipeline.data.sources import discovery
from pipeline.data.sources.items import FRAGMENTS, Item, Source, fragments_of_files


def hex_lines() -> types.ModuleType:
    """A format: text files of lines "label hexadecimal bytes"."""
    module = types.ModuleType("hex_lines")

    def matches(path: str) -> bool:
        return path.endswith(".hex")

    def lines(uri: str, path: str):
        with open(f"{uri}/{path}") as file:
            return [line.split() for line in file]

    def scan(uri, files, options):
        labels = pa.nulls(files.num_rows, FRAGMENTS.field("labels").type)
        names = {label for path in files["path"].to_pylist() for label, _ in lines(uri, path)}
        return Source(uri=uri, kind="hex", fragments=fragments_of_files(files, labels), names=frozenset(names))

    def read(source, fragments):
        for path in fragments["path"].to_pylist():
            for number, (label, data) in enumerate(lines(source.uri, path)):
                yield Item(f"{path}#{number}", path, bytes.fromhex(data), [label])

    module.NAME, module.matches, module.scan, module.read = "hex", matches, scan, read
    return module


def test_a_new_format_is_one_module_and_one_entry_of_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "FORMATS", [*discovery.FORMATS, hex_lines()])
    (tmp_path / "a.hex").write_text("cat 00ff\ndog 01\n")
    for format in ("auto", "hex"):
        [source] = sources.discover([str(tmp_path)], format=format)
        items = list(sources.read(source, source.fragments))
        assert [(item.key, item.image, item.labels) for item in items] == [
            ("a.hex#0", b"\x00\xff", ["cat"]),
            ("a.hex#1", b"\x01", ["dog"]),
        ]
        assert sources.make_labels([source]).classes == ("cat", "dog")


def test_every_format_has_the_three_functions():
    for module in sources.FORMATS:
        assert module.__name__.rpartition(".")[2] == module.NAME
        assert all(callable(getattr(module, name)) for name in ("matches", "scan", "read"))
