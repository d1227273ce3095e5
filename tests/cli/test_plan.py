"""`memtile plan`: what a budget is enough for, from a config alone."""

import inspect
import json
import shutil
from contextlib import contextmanager

import pytest

import memtile
from memtile.cli import main, models
from memtile.cli.finetune.command import run_finetune
from memtile.costmodel import Plan, RankPlan


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


def test_the_longest_sequences_are_planned(config, capsys):
    """`--longest` fills what the model reads at once where the budget is large enough."""
    code = main(["plan", str(config), "--budget", "400MiB", "--longest", "--batch", "2", "--json"])

    plan = Plan.from_json(capsys.readouterr().out)
    assert code == 0
    assert (plan.tokens, plan.batch) == (2 * 64 * (models_limit(config) // 64), 2)


def models_limit(folder):
    return json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def test_a_cluster_is_planned(config, capsys):
    """Bytes of a rank and of its link, seconds, and the smallest world are shown."""
    speeds = ["--link", "50GB/s", "--disk", "7GB/s", "--flops", "400TFLOP/s"]
    cluster = ["--world-size", "64", "--engine", "zero3", "--device-memory", "80GiB"]
    code = main(["plan", str(config), "--tokens", "32", *cluster, "--offload", "nvme", *speeds])

    printed = capsys.readouterr().out
    assert code == 0
    for word in ["64 ranks of ZeRO-3", "all-gather", "between ranks", "disk", "smallest world"]:
        assert word in printed


def test_json_is_a_plan_for_ranks(config, capsys):
    """`--json` prints what `RankPlan.from_json` reads, with the options that were given."""
    cluster = ["--world-size", "8", "--engine", "fsdp2", "--offload", "cpu", "--link", "50GB/s"]
    given = ["--tokens", "32", "--home", "disk:folder", "--json", *cluster]
    code = main(["plan", str(config), *given])

    plan = RankPlan.from_json(capsys.readouterr().out)
    assert code == 0
    assert (plan.world, plan.engine, plan.offload) == (8, "fsdp2", "cpu")
    assert (plan.home, plan.parks_activations) == ("disk:folder", False)
    assert (plan.speeds.link, plan.smallest_world) == (50e9, None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--budget", "much"], "not a size"),
        (["--budget", "0B"], "less than one byte"),
        # More than making the model takes: less is refused before anything is planned.
        (["--budget", "16MiB", "--tokens", "32"], "need at least"),
        (["--budget", "1GiB", "--tokens", "0"], "tokens"),
        (["--budget", "1GiB", "--optimizer", "Magic"], "no class of torch.optim"),
        (["--budget", "1GiB", "--optimizer", "Adafactor"], "Adafactor"),
        (["--budget", "1GiB", "--home", "cloud"], "no home"),
        (["--budget", "1GiB", "--mode", "fast"], "fast"),
        (
            ["--budget", "1GiB", "--rates", "/nowhere.json"],
            "--rates '/nowhere.json' cannot be read (No such file or directory): give a file",
        ),
        (["--budget", "1GiB", "--rates", "/"], "--rates '/' cannot be read (Is a directory): give"),
        (["--budget", "1GiB", "--rates", __file__], "(this is no MachineProfile as JSON ("),
        ([], "--budget"),
        (["--budget", "1GiB", "--longest", "--tokens", "64"], "leave out --tokens, or --longest"),
        (["--world-size", "2", "--engine", "fsdp2", "--longest"], "--longest plans one process"),
        (["--budget", "1GiB", "--link", "1GB/s"], "--link is of a cluster: give --world-size"),
        (["--engine", "fsdp2"], "--engine is of a cluster"),
        (["--world-size", "2"], "--world-size needs --engine"),
        (["--world-size", "2", "--engine", "fsdp2", "--budget", "1GiB"], "--device-memory"),
        (
            ["--world-size", "2", "--engine", "fsdp2", "--mode", "classic"],
            "--mode plans one process",
        ),
        (
            ["--world-size", "2", "--engine", "fsdp2", "--home", "checkpoint"],
            "--home 'checkpoint' is",
        ),
        (["--world-size", "0", "--engine", "fsdp2"], "world_size=0"),
        (["--world-size", "2", "--engine", "fsdp2", "--link", "quick"], "no speed"),
        (["--world-size", "2", "--engine", "fsdp2", "--link", "5GB"], "'5GB' is no speed: write"),
        (["--world-size", "2", "--engine", "fsdp2", "--flops", "5GiBs"], "no speed"),
        (["--world-size", "2", "--engine", "fsdp2", "--offload", "nvme"], "zero3"),
        (
            ["--world-size", "2", "--engine", "fsdp2", "--tokens", "9", "--device-memory", "9KiB"],
            "2 ranks need",
        ),
    ],
)
def test_a_mistake_is_one_sentence(config, capsys, options, sentence):
    """Each ends with exit code 2 and one line."""
    assert main(["plan", str(config), *options]) == 2

    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--budget", "1GiB"]])
def test_a_model_that_is_none_is_said_first(tmp_path, monkeypatch, capsys, options):
    """An empty argument is the working directory, which is named, with or without a limit."""
    monkeypatch.chdir(tmp_path)

    assert main(["plan", "", *options]) == 2
    assert "MODEL . holds no config.json: give a folder" in capsys.readouterr().err


def test_finetune_carries_out_the_plan_that_is_shown(
    tiny_model, tiny_text, tmp_path, monkeypatch, capsys
):
    """Both commands make the same plan, and print what else takes part of the budget."""
    plans, plan = [], memtile.plan

    def noted(*arguments, **options):
        plans.append(plan(*arguments, **options))
        return plans[-1]

    @contextmanager
    def left_of(budget, used, others):  # the allocator gives each command another remainder
        yield budget - (1 << 20)

    monkeypatch.setattr(memtile, "plan", noted)
    monkeypatch.setattr(models, "within", left_of)
    options = ["--budget", "400MiB", "--tokens", "32"]
    out = ["--out", str(tmp_path / "out"), "--steps", "1"]

    assert main(["plan", str(tiny_model), *options]) == 0
    assert main(["finetune", str(tiny_model), str(tiny_text), *options, *out]) == 0

    printed = capsys.readouterr().out
    assert plans[0].to_json() == plans[1].to_json()
    assert printed.count("took 1.00 MiB of 400 MiB; the plan is for the other 399 MiB") == 2
    assert inspect.signature(run_finetune).parameters["tokens"].default == models.TOKENS
