"""What ``mkdocs.yml`` makes the site of beside this folder: the README, files that pages link to, and the report.

A hook of mkdocs: https://www.mkdocs.org/user-guide/configuration/#hooks
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, the files outside of docs/ that a page links to, and what reports/ holds."""
    outside: set[str] = set()
    for source, target in PAGES.items():
        outside |= _outside(source, "")
        files.append(File.generated(config, target, content=_moved((ROOT / source).read_text(), "")))
    for page in files.documentation_pages():
        if page.src_uri not in PAGES.values():
            outside |= _outside(f"docs/{page.src_uri}", "docs")
    for path in sorted(outside):
        files.append(File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path)))
    for path in sorted((ROOT / "reports").glob("*.html")):
        files.append(File.generated(config, f"report/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead the links of a page to where its targets are on the site."""
    made = markdown if page.file.src_uri in PAGES.values() else _moved(markdown, "docs")
    if page.file.src_uri == "index.md" and "report/index.html" in files.src_uris:
        made += "\n## The report\n\n[Every notebook, as it ran last](report/index.html)\n"
    return made


def _target(link: str, folder: str) -> str:
    """A link's target from the project's root."""
    return (ROOT / folder / link).resolve().relative_to(ROOT.resolve()).as_posix()


def _outside(path: str, folder: str) -> set[str]:
    """The files outside of docs/ that a page links to, pages of the site left out."""
    targets = {_target(link, folder) for link in _LINK.findall((ROOT / path).read_text())}
    return {t for t in targets if not t.startswith("docs/") and t not in PAGES and (ROOT / t).is_file()}


def _moved(markdown: str, folder: str) -> str:
    def on_site(match: re.Match[str]) -> str:
        target = _target(match[1], folder)
        if target in PAGES:
            return f"]({PAGES[target]}"
        return f"]({target.removeprefix('docs/')}" if target.startswith("docs/") else f"](source/{target}"

    return _LINK.sub(on_site, markdown)
