"""The documentation site: every page is on it, every link leads somewhere, and it asks no other server for anything."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parent.parent


class Links(HTMLParser):
    """What a page loads, and what it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.ids.add(held.get("id") or "")
        if tag == "a":
            self.linked.append(held.get("href") or "")
        elif tag != "link" or held.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded += [value for name in ("src", "href") if (value := held.get(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.run_event("startup", command="build", dirty=False)
    build(config)
    return folder


def links_of(page: Path) -> Links:
    found = Links()
    found.feed(page.read_text())
    return found


def test_every_page_is_on_the_site_and_every_link_leads_somewhere(site: Path) -> None:
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert {"trace-format", "api"} <= pages and pages <= {page.stem for page in site.glob("*.html")}
    start = links_of(site / "index.html")
    assert {f"{page}.html" for page in pages} <= set(start.linked), "the navigation names every page"
    checked = 0
    for page in site.rglob("*.html"):
        if "report" in page.parts or page.name == "404.html":
            continue
        for link in links_of(page).linked:
            target, _, anchor = unquote(link).partition("#")
            if not link or re.match(r"https?:", target):
                continue
            file = (page.parent / target) if target else page
            assert file.is_file(), f"{page.name}: {link}"
            if anchor and file.suffix == ".html":
                assert anchor in links_of(file).ids | {"__codelineno"} or anchor.startswith("__"), (
                    f"{page.name}: {link}"
                )
            checked += 1
    assert checked > 300


def test_the_site_asks_no_other_server(site: Path) -> None:
    for page in site.glob("*.html"):
        found = links_of(page)
        assert found.loaded and not [url for url in found.loaded if re.match(r"(?:https?:)?//", url)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", style.read_text()), style.name


def test_the_names_of_the_package_are_documented(site: Path) -> None:
    ids = links_of(site / "api.html").ids
    for name in (
        "svd.pipeline.SVDPipeline.from_pretrained",
        "svd.settings.GenerationSettings",
        "parity.diagnose.diagnose",
    ):
        assert f"svdlab.{name}" in ids, name
