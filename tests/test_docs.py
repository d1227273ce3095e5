"""The documentation's own code, run as it stands."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"# not run:[ \t]*(?P<reason>.*)")


@dataclass(frozen=True)
class Block:
    """A python block of a page, with the line that its first line of code stands on."""

    code: str
    line: int


def blocks_of(text: str) -> list[Block]:
    return [
        Block(found["code"], text.count("\n", 0, found.start("code")) + 1)
        for found in BLOCK.finditer(text)
    ]


def run_blocks(text: str, name: str) -> int:
    """Runs the blocks in order in one namespace and gives how many were run."""
    names: dict[str, object] = {"__name__": "docs"}
    run = 0
    for block in blocks_of(text):
        skipped = NOT_RUN.match(block.code)
        if skipped:
            assert skipped["reason"], f"{name}:{block.line}: a block that is not run says why"
            continue
        code = "\n" * (block.line - 1) + block.code  # so that a traceback shows the page's line
        exec(compile(code, name, "exec"), names)
        run += 1
    return run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch):
    """Each python block runs as printed, after those above it on the page."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    to_run = [block for block in blocks_of(text) if not NOT_RUN.match(block.code)]

    assert run_blocks(text, str(page)) == len(to_run)


def test_the_readme_shows_code_that_runs():
    """The README has blocks, so the test above has something to run."""
    assert len(blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    """Every relative link of a page names a file that is there."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))

    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_a_failing_block_is_reported_at_its_line():
    """The line number of an error is the page's own."""
    page = "# Title\n\n```python\na = 1\n```\n\ntext\n\n```python\nb = a\n1 / 0\n```\n"

    with pytest.raises(ZeroDivisionError) as raised:
        run_blocks(page, "page.md")
    last = raised.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("page.md", 11)


def test_a_block_may_say_why_it_is_not_run():
    """`# not run: reason` skips a block, and without a reason it is refused."""
    assert run_blocks("```python\n# not run: needs two GPUs\n1 / 0\n```\n", "page.md") == 0

    with pytest.raises(AssertionError, match=r"page\.md:2: a block that is not run says why"):
        run_blocks("```python\n# not run:\n1 / 0\n```\n", "page.md")
