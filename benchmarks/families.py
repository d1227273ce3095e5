"""The table of model families in the docs, from a run of their tests.

    python benchmarks/families.py

runs `tests/integrations/test_families.py` (a minute or two) and writes the table into
`docs/families.md`, between its two marks; `--check` only says whether the page has it.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "families.md"
TESTS = "tests/integrations/test_families.py"
STEPS = ("tiled", "trained", "filled", "planned", "saved")
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
Results = dict[str, dict[str, bool]]  # by family and step: whether all of its tests pass


def results_of(report: Path) -> Results:
    """What pytest's report in the form of JUnit says of each family and step."""
    found: Results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameters = case.get("name", "").removesuffix("]").partition("[")
        step = test.removeprefix("test_is_")
        family = parameters.removesuffix("-training").removesuffix("-inference")
        passed = not any(child.tag in ("failure", "error", "skipped") for child in case)
        steps = found.setdefault(family, {})
        steps[step] = steps.get(step, True) and passed
    return found


def table_of(results: Results, classes: Mapping[str, str]) -> Iterable[str]:
    """Lines of Markdown, in the order of the tests."""
    yield "| family | class | " + " | ".join(STEPS) + " |"
    yield "|---|---|" + "---|" * len(STEPS)
    for family, steps in results.items():
        cells = ["yes" if steps[step] else "no" for step in STEPS]
        yield f"| {family} | `{classes[family]}` | " + " | ".join(cells) + " |"


def page_with(table: Iterable[str]) -> str:
    """The page with this table."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return "\n".join([before + BEGIN, "", *table, "", END]) + rest.partition(END)[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--report", type=Path, help="pytest's report, where the tests have run")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from families import SOURCES

    with tempfile.TemporaryDirectory() as folder:
        report = given.report or Path(folder) / "report.xml"
        if given.report is None:
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                TESTS,
                "-m",
                "",
                f"--junitxml={report}",
            ]
            subprocess.run(command, cwd=ROOT, check=False)
        results = results_of(report)
    page = page_with(table_of(results, {family: name for family, (name, _) in SOURCES.items()}))
    if given.check:
        return int(page != PAGE.read_text())
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
