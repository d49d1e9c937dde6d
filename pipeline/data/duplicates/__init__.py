"""Duplicates: exact and near, inside a corpus and against evaluation sets.

The ViT paper (section 4.1) removes images of its downstream test sets from the pre-training data, following BiT (appendix C).

    hashes        64 bits of an image's pixels and 128 bits of its look, for the whole image and for crops of it
    evaluation    the hashes of evaluation sets, to look images up in while they are prepared
    candidates    inside a corpus: rows that agree in part of their hashes are brought together and compared
    report        duplicates.parquet and the contact sheet

No step compares all pairs of images. docs/decontamination.md has what is found, what is missed and what it costs.
"""
