"""`memtile plan`: what a budget is enough for, from a config alone."""

import shutil

import pytest

from memtile.cli import main
from memtile.planning import Plan


@pytest.fixture
def config(tiny_model, tmp_path):
    """Gives a folder that holds a config.json and nothing else."""
    shutil.copy(tiny_model / "config.json", tmp_path)
    return tmp_path


def test_a_config_alone_is_planned(config, capsys):
    """Layers, terms of the peak, traffic and seconds are shown."""
    code = main(["plan", str(config), "--budget", "400MiB", "--tokens", "32"])

    printed = capsys.readouterr().out
    assert code == 0
    for word in ["embed_tokens", "resident", "predicted peak", "budget", "400 MiB"]:
        assert word in printed


def test_json_is_a_plan(config, capsys):
    """`--json` prints what `Plan.from_json` reads, with the options that were given."""
    options = ["--tokens", "32", "--optimizer", "none", "--home", "host"]
    code = main(["plan", str(config), "--budget", "400MiB", "--json", *options])

    plan = Plan.from_json(capsys.readouterr().out)
    assert code == 0
    assert (plan.tokens, plan.optimizer, plan.home) == (32, None, "host")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--budget", "much"], "not a size"),
        (["--budget", "0B"], "less than one byte"),
        (["--budget", "20KiB", "--tokens", "32"], "need at least"),
        (["--budget", "1GiB", "--tokens", "0"], "tokens"),
        (["--budget", "1GiB", "--optimizer", "Magic"], "no class of torch.optim"),
        (["--budget", "1GiB", "--optimizer", "Adafactor"], "Adafactor"),
        (["--budget", "1GiB", "--home", "cloud"], "no home"),
        (["--budget", "1GiB", "--mode", "fast"], "fast"),
        (["--budget", "1GiB", "--rates", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_a_mistake_is_one_sentence(config, capsys, options, sentence):
    """Each ends with exit code 2 and one line."""
    assert main(["plan", str(config), *options]) == 2

    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.splitlines()) == 1
