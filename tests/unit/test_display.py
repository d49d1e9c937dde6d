"""A run on a terminal and in a file."""

import io

from rich.console import Console

from pipeline.training.display import Display

LINES = [
    "resumed from runs/a on 2 workers",
    "step 1/9  epoch 0.10  loss 2.3026  grad 1.000  lr 1.00e-03  60 img/s",
    "warning: step 2: gradient not finite, step skipped (1 so far)",
    "step 3/9  epoch 0.30  loss 2.0000  grad 1.000  lr 1.00e-03  60 img/s",
    "step 3/9  validation  top-1 50.00%  loss 1.9000",
]


def shown(terminal: bool) -> str:
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=terminal, width=80, highlight=False)) as display:
        for line in LINES:
            display.show(line)
    return file.getvalue()


def test_a_file_gets_plain_lines():
    assert shown(terminal=False) == "\n".join(LINES) + "\n"


def test_a_terminal_keeps_the_newest_step_in_one_place():
    text = shown(terminal=True)
    erase = "\x1b[2K"
    assert erase in text[text.index("step 1/9") : text.index("step 3/9  epoch")]  # the first step gave way
    assert text.rstrip().count("\n") < text.count("step 3/9  epoch") + len(LINES)
    assert "\x1b[33mwarning: step 2" in text
    after = text[text.index("step 3/9  validation") :]
    assert "step 3/9  epoch" in after  # what scrolls by is above the line of progress
