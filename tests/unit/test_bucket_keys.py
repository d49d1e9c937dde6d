"""Keys of buckets that no folder has: empty names between slashes."""

import boto3
import pytest

from pipeline import workqueue
from pipeline.data import open_dataset
from pipeline.data.prepare import PrepareConfig, prepare
from tests.images import jpeg


def put(s3, contents):
    """Objects of a bucket, {key: content}; None stands for an image."""
    client = boto3.client("s3")
    for number, (key, data) in enumerate(contents.items()):
        client.put_object(Bucket=s3.removeprefix("s3://"), Key=key, Body=jpeg(number) if data is None else data)


def prepared(source, output, **options):
    """{key: class} of a dataset made from the source."""
    with workqueue.without_ray():
        split = next(iter(prepare(PrepareConfig(source=(source,), output=str(output), **options))))
    dataset = open_dataset(output / split)
    return {row["key"]: dataset.classes[row["label"]] for row in dataset.read(range(len(dataset)))}


def test_empty_folder_names_are_no_folders(s3, tmp_path):
    images = ("ant//a.jpg", "ant/a.jpg", "/bee/b.jpg", "/bee//c.jpg")
    ignored = ("/.git/x.jpg", "bee//@eaDir/y.jpg", "bee/.hidden//z.jpg")
    put(s3, {f"photos/{name}": None for name in (*images, *ignored)})
    assert prepared(f"{s3}/photos", tmp_path) == {name: name.strip("/")[:3] for name in images}


@pytest.mark.parametrize("place", ["labels.csv", "/labels.csv", "meta//train.csv"])
def test_tables_under_such_keys_are_read(s3, tmp_path, place):
    put(s3, {f"photos/{name}": None for name in ("images//0001.jpg", "images/0002.jpg", "/images/0003.jpg")})
    put(s3, {f"photos/{place}": b"id,label\n1,a\n2,b\n3,a\n"})
    found = prepared(f"{s3}/photos", tmp_path, max_reject_fraction=0.5)
    expected = {"images//0001.jpg": "a", "images/0002.jpg": "b", "/images/0003.jpg": "a"}
    assert found == expected


def test_splits_and_archives_under_such_keys(s3, tmp_path):
    paths = ("train//cat/0.jpg", "train/dog//1.jpg", "/test/cat/2.jpg", "/test//dog/3.jpg")
    put(s3, {f"photos/{path}": None for path in paths})
    assert prepared(f"{s3}/photos", tmp_path, splits=("from-source",)) == {
        path: path.split("/")[-2] or path.split("/")[-3] for path in paths if "test" in path
    }
