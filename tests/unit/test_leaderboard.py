"""The leaderboard says in which data its rows differ."""

import dataclasses

from pipeline.operations import comparison
from pipeline.tracking.leaderboard import (
    DECONTAMINATION,
    EVALUATION,
    TRAINING,
    by_evaluation_data,
    data_note,
    differing,
)
from pipeline.tracking.pages import leaderboard_page
from tests.leaderboard import row


def test_a_suite_with_scores_on_other_data_is_divided():
    rows = [row("a", 60.0), row("b", 50.0, **{EVALUATION: "vtab 5555"}), row("c", 40.0, suite="frozen")]
    unknown = dataclasses.replace(row("d", 30.0), datasets={})
    divided = [row.suite for row in by_evaluation_data([*rows, unknown])]
    assert divided == ["vtab1k on vtab 3333", "vtab1k on vtab 5555", "frozen", "vtab1k"]
    assert [row.suite for row in by_evaluation_data([rows[0], unknown])] == ["vtab1k", "vtab1k"]


def test_rows_of_the_same_data_have_no_note():
    rows = [row("a", 60.0), row("b", 50.0)]
    assert (differing(rows), data_note(rows)) == ([], "")
    assert "| # | pre-training | model | images seen |" in comparison.to_markdown(rows)
    unknown = dataclasses.replace(rows[0], datasets={})  # weights of another library
    assert data_note([*rows, unknown]) == ""


def test_rows_of_other_data_have_a_column_for_what_differs():
    rows = [row("a", 60.0), row("b", 50.0, **{TRAINING: "birds 4444", DECONTAMINATION: "sets/pets"})]
    text = comparison.to_markdown(rows)
    assert "| # | pre-training | model | training data | decontamination | images seen |" in text
    assert "| 2 | b | – | birds 4444 | sets/pets | – |" in text
    assert "These models differ in training data and decontamination.\n" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert data_note(rows) in leaderboard_page(rows)


def test_other_evaluation_data_is_a_warning():
    rows = [row("a", 60.0), row("b", 50.0, **{EVALUATION: "vtab 5555"})]
    assert data_note(rows).endswith(
        "differ in evaluation data. Scores on different evaluation data are not comparable."
    )


def test_scores_of_the_page_are_rounded_once():
    assert '"mean":64.035088' in leaderboard_page([row("a", 100 * (2 * 23 + 4 * 25) / 38 / 6)])
