"""The words of the code, its messages and its pages are those a PyTorch engineer knows."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    *sorted((ROOT / "src").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]

# word that is gone -> what it is called now
GONE = {
    r"berths?|\w*Berth\w*": "allocation",
    r"ferry|ferries\w*|\w*_ferry|Ferry\w*": "slab ring",
    r"loans?|Loan|borrow\w*": "lease, acquire",
    r"cargo\w*": "group",
    r"itinerar\w+": "prefetch order",
    r"current_pass|layer_pass": "iteration",
    r"walks?_(?!tb)\w+|\w+_walk|WalkedLinear|(?:fused|composed) walks?": "path",
    r"plain form": "traceable",
    r"own_point|ByPoints": "override hook",
    r"doors?": "checks",
    r"\w*[tT]wins?": "meta copy",
    r"is_turned|turned: bool": "transposed",
    r"settle\w*": "flush, allocate_copy",
    r"forget": "evict",
    r"Wanted|Resting|wanted_by": "ModelTensor, FileBacked",
    r"memtile\.planning": "memtile.costmodel",
    r"(?<!\")(?:Rates|Speeds|Choice|Recut|Loaded)": "MachineProfile, ClusterSpec and so on",
    r"Averaging": "GradientAverager",
    r"SealError|SealedFile|reopen\w*": "save_checkpoint, load_checkpoint",
}
OLD = re.compile("|".join(rf"(?<![\w-])(?:{pattern})(?![\w-])" for pattern in GONE))


@pytest.mark.parametrize("folder", ["src", "tests", "docs", "."])
def test_the_old_words_are_gone(folder):
    """No file uses a word for which the vocabulary has another."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in FILES
        if path != Path(__file__) and path.relative_to(ROOT).parts[0] == folder
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := OLD.search(line))
    ]

    assert found == []


def test_no_class_name_stands_for_two_things():
    """Public or private, a class's name is found once in the package."""
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for match in re.finditer(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            places.setdefault(match[1], []).append(str(path.relative_to(ROOT)))

    assert {name: where for name, where in places.items() if len(where) > 1} == {}
