"""How a run looks while it goes on: on a terminal the newest step stays at the bottom, anywhere else one plain line each."""

import re

from rich.console import Console
from rich.live import Live
from rich.text import Text

STEP = re.compile(r"step \d+/\d+  epoch ")


class Display:
    """Prints lines. On a terminal a line of progress takes the place of the one before, and all else scrolls above it."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def show(self, line: str) -> None:
        if self.live is None:
            print(line, file=self.console.file, flush=True)
        elif STEP.match(line):
            self.live.update(Text(line, style="bold"), refresh=True)
        else:
            self.console.print(Text(line, style="yellow" if line.startswith("warning") else ""))

    def __enter__(self) -> "Display":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()  # the last step stays where it is
