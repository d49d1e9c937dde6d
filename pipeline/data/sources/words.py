"""Common names of columns, splits, and hidden and system files in data sets."""

import re

# In order of preference; case is ignored.
FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "path",
    "image_path",
    "img_path",
    "image_file",
    "image_name",
    "img_name",
    "filepath",
    "file_path",
    "image",
    "img",
    "key",
    "image_filename",
    "image_file_name",
    "imagename",
    "imgname",
    "img_file",
    "fname",
    "filenames",
    "filepaths",
    "relative_path",
    "image_index",
    "image_id",
    "imageid",
    "img_id",
    "id",
    "id_code",
    "uuid",
    "name",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "classes",
    "class_name",
    "classname",
    "label_name",
    "labelname",
    "class_label",
    "class_id",
    "classid",
    "label_id",
    "category",
    "category_name",
    "category_id",
    "target",
    "cls",
    "fine_label",
    "wnid",
    "synset",
    "finding_labels",
    "predictionstring",
)
SPLIT_COLUMNS = ("split", "subset", "partition", "data_split", "dataset_split", "split_name")
# Split columns if their values are splits ...
LIKELY_SPLIT_COLUMNS = ("usage", "set", "data_set", "dataset", "phase", "mode", "fold", "type", "group")
# ... also under longer names with one of these words.
SPLIT_WORDS = frozenset({"split", "splits", "subset", "partition", "usage", "set", "phase", "fold", "tvt"})
CAPTION_COLUMNS = frozenset({"text", "caption", "captions", "title", "prompt", "description", "alt", "alt_text"})
# Texts that mean a missing label, as pandas, SQL and spreadsheets spell them; "Null" and "nat" are names.
MISSING_VALUES = frozenset(
    [
        "",
        "nan",
        "NaN",
        "NAN",
        "-nan",
        "-NaN",
        "NaT",
        "<NA>",
        "<na>",
        "null",
        "NULL",
        "(null)",
        "\\N",
        "n/a",
        "N/A",
        "#N/A",
    ]
)

# Names of classes that may stand for a missing label, in lower case: a warning lists them.
LIKELY_MISSING = frozenset(
    {"?", "??", "???", "-", "--", "---", "–", "—", ".", "none", "nil", "null", "na", "n.a.", "nan", "nat", "missing"}
)

TRAIN = frozenset({"train", "training", "trn", "trainval"})
HELD_OUT = frozenset(
    {"val", "valid", "validation", "test", "testing", "tst", "dev", "eval", "evaluation", "holdout", "heldout"}
)
SPLITS = TRAIN | HELD_OUT
WORDS = re.compile(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]*|[^A-Za-z]+")  # of PublicTest, train_images2017


def split_of_name(name: str) -> tuple[str, str] | None:
    """(split, rest of the name) of a name that contains one split word, such as
    train_images or PublicTest; otherwise None."""
    words = WORDS.findall(name)
    places = [i for i, word in enumerate(words) if word.lower() in SPLITS]
    if len(places) != 1:
        return None
    rest = "".join(words[: places[0]] + words[places[0] + 1 :])
    return words[places[0]], "".join(filter(str.isalnum, rest)).lower()


# Hidden and system files: hidden files and folders (version control, notebooks, trash), system files of Windows and
# macOS, thumbnails, snapshots and recycle bins of network storage, caches, unfinished downloads, and backup copies of
# editors. Folders that may be classes, such as recycled and CVS, count only for the files that Windows and CVS put there.
JUNK = (
    r"(?i)(?:^|/)(?:\.[^/.][^/]*|\.\.[^/]+|_{1,2}macosx|\$recycle\.bin|system volume information|(?-i:RECYCLER)|recycle[rd]/(?:s-1-[\d-]+|info2?|d[a-z]\d+\.[^/.]+)|found\.\d{3}|"
    r"#recycle|recycle[ ._-]bin|@eadir|@syno[^/]*|@recycle|@recently-snapshot|@__thumb|@tmp|#snapshot|~snapshot|_vti_cnf|_gsdata_|"
    r"network trash folder|_thumbs?|_thumbnails?|"
    r"temporary items|lost\+found|__pycache__|node_modules|(?-i:CVS)/(?:entries[^/]*|root|repository|tag|template|baserev)|thumbs\.db|ehthumbs\.db|desktop\.ini|picasa\.ini|icon\r|"
    r"zbthumbnail\.info|~\$[^/]*)(?:/|$)|(?:~|@syno(?:eastream|resource)|\.part|\.partial|\.filepart|\.opdownload|\.crdownload|\.download|\.aria2|\.![uq][tb]|\.bc!|"
    r"\.tmp|\.swp|\.bak)$"
)
