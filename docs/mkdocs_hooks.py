"""MkDocs hooks: pages from outside docs/, the notebook as a page, lists of flags from the --help of the jobs, and links to
source files."""

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ELSEWHERE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "infra/README.md": "infra.md"}
NOTEBOOK = {"docs/notebook.ipynb": "notebook.md"}
LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files, config):
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for source, page in NOTEBOOK.items():
        files.append(File.generated(config, page, content=notebook_page(ROOT / source)))
    listed = set(re.findall(r"[\w-]+\.md", str(config["nav"])))
    config["nav"] += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in listed]
    return files


def notebook_page(path):
    """The cells of a notebook as Markdown, with their text and pictures where it has outputs."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if png := output.get("data", {}).get("image/png"):
                parts.append(f'<img alt="figure" src="data:image/png;base64,{"".join(png).strip()}">')
            elif text := "".join(output.get("text", ())):
                parts.append(f"```text\n{text}\n```")
    parts[1:1] = [f"This page is the notebook `{path.relative_to(ROOT)}` of the project."]
    return "\n\n".join(parts)


def on_page_markdown(markdown, page, config, files):
    markdown = re.sub(r"^<!-- flags: (\w+) -->$", lambda match: flags(match[1]), markdown, flags=re.MULTILINE)
    generated = {page: source for source, page in ELSEWHERE.items()}
    folder = (ROOT / generated.get(page.file.src_path, f"docs/{page.file.src_path}")).parent
    return LINK.sub(lambda match: relinked(match, folder, files), markdown)


def relinked(match, folder, files):
    """A link to the page of a file, or plain text if the file exists but has no page on the site."""
    text, target, anchor = match[1], match[2], match[3] or ""
    path = (folder / target).resolve()
    if not path.is_relative_to(ROOT):
        return match[0]
    place = path.relative_to(ROOT).as_posix()
    page = (ELSEWHERE | NOTEBOOK).get(place, place.removeprefix("docs/"))
    if files.get_file_from_path(page) is not None:
        return f"[{text}]({page}{anchor})"
    return text if path.exists() else match[0]


def flags(job):
    """The output of `jobs/JOB.py --help-all` as a code block."""
    spec = importlib.util.spec_from_file_location(f"docs_{job}", ROOT / "jobs" / f"{job}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        module.main(["--help-all"])
    return f"```text\n{text.getvalue()}```"
