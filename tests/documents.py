"""Reads the commands in the documentation."""

import re
from pathlib import Path


def code_blocks(path: Path) -> list[str]:
    """The code blocks of a Markdown file, with continued lines joined."""
    text = path.read_text().replace("\\\n", " ")
    return re.findall(r"^ *```[a-z]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
