"""The documentation names files, functions and pages that exist, and leads from page to page."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.docs import pages

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ARCHITECTURE = DOCS / "architecture.md"
PACKAGES = ("prep", "train", "infer", "shared")
PAGES = [str(page.relative_to(ROOT)) for page in pages()]


def defined(path: Path) -> set[str]:
    """Functions and classes of a module, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def hops() -> list[tuple[str, str]]:
    rows = re.findall(r"^\|[^|]+\| `([^`|]+)` \| `([^`|]+)` \|$", ARCHITECTURE.read_text(), re.M)
    assert len(rows) > 40
    return rows


@pytest.mark.parametrize(("file", "function"), hops())
def test_every_hop_is_in_the_code(file, function):
    assert function in defined(ROOT / file)


@pytest.mark.parametrize("page", [*PAGES, "docs/walks.svg"])
def test_every_file_of_the_code_that_is_named_exists(page):
    text = (ROOT / page).read_text()
    named = set(
        re.findall(r"\b((?:prep|train|infer|shared|tests|benchmarks|data)/[\w./-]*[\w/])", text)
    )
    code = {name for name in named if name.endswith((".py", "/")) and "*" not in name}
    assert {name for name in code if not (ROOT / name).exists()} == set()


def test_every_wing_is_listed():
    wings = re.findall(r"^\| `([\w/]+)/` \|", ARCHITECTURE.read_text(), re.M)
    there = [path.parent for stage in PACKAGES for path in (ROOT / stage).glob("*/__init__.py")]
    assert sorted(wings) == sorted(str(path.relative_to(ROOT)) for path in there)


def test_the_glossary_stays_short():
    words = ARCHITECTURE.read_text().partition("## Words")[2].partition("\n## ")[0]
    assert len([line for line in words.splitlines() if line.startswith("| ")]) - 1 <= 40


def spoken() -> list[str]:
    """Every piece of text in the product's code, as the Makefile and Python say it."""
    found = [(ROOT / "Makefile").read_text()]
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_of_the_troubleshooting_page_is_said():
    """`...` stands for names and numbers; the words around them are those of the code."""
    page = (DOCS / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| ([^|]+) \|", page, re.M)
    messages = [words for cell in cells for words in re.findall(r"`([^`]*[a-z] [^`]*)`", cell)]
    assert len(messages) > 40
    said = spoken()
    parts = {part.strip() for words in messages for part in words.split("...")} - {""}
    assert {part for part in parts if not any(part in text for text in said)} == set()


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_every_link_leads_somewhere(page):
    folder = (ROOT / page).parent
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue  # another site
        name, _, anchor = link.partition("#")
        there = (folder / name).resolve() if name else ROOT / page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            lost.append(link)
    assert lost == []


def test_the_index_lists_every_page_and_each_leads_to_the_next():
    index = (DOCS / "README.md").read_text()
    order = re.findall(r"^- \[[^\]]+\]\(([\w-]+\.md)\)", index, re.M)
    assert sorted(order) == sorted(p.name for p in DOCS.glob("*.md") if p.name != "README.md")
    for page, following in zip(order, [*order[1:], "README.md"], strict=True):
        last = (DOCS / page).read_text().rstrip().splitlines()[-1]
        assert re.fullmatch(rf"\[[^\]]+\]\({re.escape(following)}\)", last), (page, following)
