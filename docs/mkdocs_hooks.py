"""MkDocs hooks: pages from outside docs/, lists of flags from the --help of the jobs, and links to source files."""

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ELSEWHERE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "infra/README.md": "infra.md"}
LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files, config):
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    listed = set(re.findall(r"[\w-]+\.md", str(config["nav"])))
    config["nav"] += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in listed]
    return files


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
    page = ELSEWHERE.get(place, place.removeprefix("docs/"))
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
