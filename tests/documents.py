"""Reads the commands in the documentation: those of Markdown pages and of docstrings, word by word."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
SHELL = ("bash", "sh")
KEYWORDS = ("do", "then", "else", "done", "fi", "export", "sudo")
SEPARATORS = re.compile(r"[;&|()]+")
ASSIGNMENT = re.compile(r"\w+=")
STARTS_A_COMMAND = re.compile(r"(\.venv/bin/)?(python|make|pip|uv|ray|srun|kubectl|docker|aws|gcloud) ")


@dataclass(frozen=True)
class Block:
    """A code block of a page, or a command in its text (then its language is "bash")."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every Markdown page of the project."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "infra").rglob("*.md")])


def code_blocks(path: Path) -> list[Block]:
    """The fenced and indented blocks of a Markdown page; the language of those without one is ""."""
    return [
        Block(str(path.relative_to(ROOT)), token.map[0] + 1, token.info.strip(), token.content)
        for token in MarkdownIt().parse(path.read_text())
        if token.type in ("fence", "code_block")
    ]


def commands_in_text(path: Path) -> list[Block]:
    """Code inside paragraphs and tables of a Markdown page that begins like a command and does not end with `--`."""
    return [
        Block(str(path.relative_to(ROOT)), token.map[0] + 1, "bash", part.content)
        for token in MarkdownIt().enable("table").parse(path.read_text())
        if token.type == "inline" and token.map
        for part in token.children
        if part.type == "code_inline" and STARTS_A_COMMAND.match(part.content) and not part.content.endswith(" --")
    ]


def commands_in_docstring(path: Path) -> list[Block]:
    """The indented lines of a module's docstring that begin like a command, without the remark behind three spaces."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    text = re.sub(r" *\\\n +", " ", text)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    found = [re.split(r" {3,}| {2,}(?=[^-\s])", line)[0] for line in lines if STARTS_A_COMMAND.match(line)]
    found = [re.sub(r"(\w)(\|\w+)+", r"\1", line) for line in found]  # the first of the values a|b|c
    return [Block(str(path.relative_to(ROOT)), 1, "bash", line) for line in found]


def script_lines(block: Block) -> list[str]:
    """The lines of a shell block, with continued lines joined and without empty ones and comments."""
    lines = [line.strip() for line in block.text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def simple_commands(script: str) -> Iterator[list[str]]:
    """The words of every command in a script: in pipes, loops, substitutions, and behind `ssh HOST` or `srun` too."""
    for line in script.replace("\\\n", " ").splitlines():
        for inner in re.findall(r'"\$\(([^"]*)\)"', line):
            yield from simple_commands(inner)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
        lexer.whitespace_split = True
        words: list[str] = []
        redirected = False
        for word in [*lexer, ";"]:
            if SEPARATORS.fullmatch(word):
                yield from _commands(words)
                words = []
            elif not redirected and not re.fullmatch(r"[<>&]+", word):
                words.append(word)
            redirected = bool(re.fullmatch(r"[<>&]*[<>][<>&]*", word))


def _commands(words: list[str]) -> Iterator[list[str]]:
    """The command of these words, and the commands that it starts."""
    while words and (words[0] in KEYWORDS or ASSIGNMENT.match(words[0])):
        words = words[1:]
    if not words or words[0] == "for":
        return
    yield words
    if words[0] == "ssh":
        yield from simple_commands(words[-1])
    for i in range(1, len(words)):
        if words[i].rpartition("/")[2] == "python":
            yield words[i:]
            return
