"""The files of infra/ray-up/ with one of their options, which are comments in them."""

import re


def with_option(text: str, title: str) -> str:
    """The text with the lines of "Option TITLE" active, as a user makes them: without "#- ". title: "" for none."""
    if not title:
        return text
    before, found, after = text.partition(f"# Option {title}:")
    assert found, title
    block = re.match(r".*\n(?:\s*# .*\n)*(?:\s*#- .*\n)+", after)
    assert block, title
    return before + found + block[0].replace("#- ", "") + after[block.end() :]
