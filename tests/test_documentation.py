"""What the manual points to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_files_that_the_map_names_are_there():
    names = set(re.findall(r"`([\w/]+\.(?:py|md|toml))`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(names) > 20
    folders = (".", "wmss_trl", "wmss_trl/losses", "tests/pairwise")
    assert [name for name in names if not any((ROOT / folder / name).exists() for folder in folders)] == []


def test_the_map_shows_every_room():
    rooms = {path.parent.name for path in ROOT.glob("wmss_trl/*/__init__.py")}
    picture = re.search(r"```mermaid\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    assert rooms <= set(re.findall(r"\w+", picture))
