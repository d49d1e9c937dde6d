"""Duplicates: exact and near, inside a corpus and against evaluation sets.

The ViT paper (section 4.1) removes images of its downstream test sets from the pre-training data, following BiT
(appendix C).

    hashes        64-bit pixel hash and 128-bit perceptual hash of an image and its crops
    evaluation    index of the hashes of evaluation sets, for lookups during preparation
    candidates    within a corpus: groups rows that agree in part of their hashes, and compares them
    verification  aligns candidate pairs and compares their pixels
    report        duplicates.parquet and the contact sheet

No step compares all pairs of images. docs/decontamination.md describes recall, limitations and cost.
"""
