"""What the project's documents say to type."""

import re
from pathlib import Path


def code_blocks(path: Path) -> list[str]:
    """What stands between ``` in a Markdown file, continued lines joined."""
    text = path.read_text().replace("\\\n", " ")
    return re.findall(r"^ *```[a-z]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
