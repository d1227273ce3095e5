"""The documentation's own code and commands, run as they stand."""

import doctest
import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import memtile
from memtile.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<kind>python|console)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ ", re.MULTILINE)
ANYTHING = "…"  # in what a command prints: numbers of this machine
NOT_RUN = re.compile(r"# not run:[ \t]*(?P<reason>.*)")


@dataclass(frozen=True)
class Block:
    """A block of a page, with the line that its first line of code stands on."""

    kind: str
    code: str
    line: int


def blocks_of(text: str) -> list[Block]:
    return [
        Block(found["kind"], found["code"], text.count("\n", 0, found.start("code")) + 1)
        for found in BLOCK.finditer(text)
    ]


def run_commands(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs each `$ memtile …` and compares what it prints with what stands below it."""
    starts = [found.start() for found in COMMAND.finditer(code)]
    for start, stop in pairwise([*starts, len(code)]):
        command, _, expected = code[start + 2 : stop].replace("\\\n", " ").partition("\n")
        program, *words = shlex.split(command)
        capsys.readouterr()
        assert program == "memtile"
        main(words)
        printed = capsys.readouterr()
        said = " ".join((printed.out + printed.err).split())
        pattern = ".*".join(re.escape(" ".join(p.split())) for p in expected.split(ANYTHING))
        assert re.search(pattern.replace(r"\ ", r"\s*"), said, re.DOTALL), (command, said)


def run_blocks(text: str, name: str, capsys: pytest.CaptureFixture[str] | None = None) -> int:
    """Runs the blocks in order in one namespace and gives how many were run."""
    names: dict[str, object] = {"__name__": "docs"}
    run = 0
    for block in blocks_of(text):
        skipped = NOT_RUN.match(block.code)
        if skipped:
            assert skipped["reason"], f"{name}:{block.line}: a block that is not run says why"
            continue
        if block.kind == "console":
            assert capsys is not None
            run_commands(block.code, capsys)
            run += 1
            continue
        code = "\n" * (block.line - 1) + block.code  # so that a traceback shows the page's line
        exec(compile(code, name, "exec"), names)
        run += 1
    return run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch, capsys):
    """Each block runs as printed, after those above it; commands print what stands below them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("memtile.cli.finetune.command.cache_folder", lambda: tmp_path / "cache")
    text = page.read_text(encoding="utf-8")
    to_run = [block for block in blocks_of(text) if not NOT_RUN.match(block.code)]

    assert run_blocks(text, str(page), capsys) == len(to_run)


def test_the_readme_shows_code_that_runs():
    """The README has blocks, so the test above has something to run."""
    assert len(blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))) >= 2


def test_no_snippet_saves_into_the_folder_of_a_run():
    """Whoever follows all pages in one folder keeps what `memtile finetune --out` made there."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    runs = set(re.findall(r"--out[ =]([\w-]+)", text))
    saved = set(re.findall(r"save_\w+\((?:\w+, )?\"([\w-]+)\"", text))

    assert {"tuned", "trained"} <= runs | saved
    assert runs & saved == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_lead_somewhere(page):
    """Every relative link of a page names a file that is there."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))

    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_the_files_named_on_how_it_works_are_there():
    """The page that follows a tile names files of the package, and of the tests: each exists."""
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", page))

    assert len(named) >= 10
    places = (ROOT / "src/memtile", ROOT)
    assert [n for n in sorted(named) if not any((each / n).is_file() for each in places)] == []


def test_every_page_is_reached_from_the_navigation():
    """mkdocs.yml lists each page of docs/."""
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]

    assert [page for page in pages if f": {page}\n" not in listed] == []


def test_the_readme_is_short():
    """It has at most 180 lines; everything else is in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


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


def test_a_command_that_prints_something_else_is_reported(capsys):
    """The text below a command must be in what it prints, where … stands for anything."""
    right = "```console\n$ memtile --version\nmemtile …\n```\n"

    assert run_blocks(right, "page.md", capsys) == 1
    with pytest.raises(AssertionError, match="another"):
        run_blocks(right.replace("memtile …", "another …"), "page.md", capsys)


class SkipBiasLinear(nn.Linear):
    """As Megatron's linears with `skip_bias_add`."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return nn.functional.linear(x, self.weight), self.bias


@pytest.mark.parametrize("name", [name for name in memtile.__all__ if name != "__version__"])
def test_every_name_at_the_top_has_an_example_that_runs(name: str, tmp_path, monkeypatch):
    """Its docstring shows a call, and what the call gives."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    names = {
        **{"memtile": memtile, "torch": torch, "nn": nn, "SkipBiasLinear": SkipBiasLinear},
        **{"model": model, "optimizer": torch.optim.AdamW(model.parameters())},
    }
    examples = doctest.DocTestParser().get_doctest(
        getattr(memtile, name).__doc__, names, name, None, None
    )

    assert examples.examples
    assert doctest.DocTestRunner(verbose=False).run(examples).failed == 0
