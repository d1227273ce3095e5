"""`memtile finetune --engine`: the same training over ranks.

They are forked with what torchrun would give them; tests of the examples start it.
"""

import json
import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from processes import launched
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memtile.cli import main
from memtile.cli.finetune.data_files import find_data
from memtile.cli.finetune.sequences import read_sequences
from memtile.cli.finetune.sharded import check_shards
from memtile.errors import NotFiniteError

STEPS, TOKENS, LR = 5, 16, 1e-2


NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed here"
)
ENGINES = ["fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)]


def words(model, text, out, *more, engine="fsdp2"):
    options = ["--engine", engine, "--tile", "2KiB", "--steps", STEPS, "--tokens", TOKENS]
    options += ["--cache", Path(out).parent / "cache"]
    return [str(w) for w in ["finetune", model, text, "--out", out, "--lr", LR, *options, *more]]


def after_three_steps(ranks, number, of):
    """Sends a signal to some ranks once the first has said that three steps are done."""
    for line in ranks[0].output:
        if line.startswith("step 3 "):
            break
    for rank in of:
        os.kill(rank.process.pid, number)


def said_by(ranks):
    """What is left of what all of them print, up to their ends."""
    return "".join([rank.wait() for rank in ranks])


def sequences_of(file, folder, seed):
    """What a process of its own would train on."""
    data, tokenizer = find_data([file], "DATA"), AutoTokenizer.from_pretrained(folder)
    cache = file.parent / "alone"
    return read_sequences(data, tokenizer, TOKENS, seed, packs=data.is_text, cache=cache, key="key")


def trained_alone(folder, text):
    """The weights after the same steps of plain transformers, two sequences in each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    sequences = sequences_of(text, folder, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = torch.cat([sequences.at(2 * step), sequences.at(2 * step + 1)])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_as_one_process_does(tiny_model, tiny_text, tmp_path, engine):
    """Stopped by SIGTERM after some steps, resumed, and loaded by plain transformers at the end."""
    arguments = words(tiny_model, tiny_text, tmp_path / "out", "--save-every", 2, engine=engine)
    ranks = launched(arguments, 2)
    after_three_steps(ranks, signal.SIGTERM, of=ranks)
    assert "--resume" in said_by(ranks)
    ranks = launched([*arguments, "--resume"], 2)
    said = said_by(ranks)

    assert [rank.process.exitcode for rank in ranks] == [0, 0], said
    assert "going on after step" in said
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = trained_alone(tiny_model, tiny_text)
    for name, value in found.items():
        assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_whose_rank_was_killed_goes_on_with_fewer_ranks(
    tiny_model, tiny_text, tmp_path, engine
):
    """The others end with a sentence, the last checkpoint is whole, one rank of FSDP2 goes on."""
    arguments = words(tiny_model, tiny_text, tmp_path / "out", "--save-every", 1)
    before = words(tiny_model, tiny_text, tmp_path / "out", "--save-every", 1, engine=engine)
    ranks = launched(before, 2)
    after_three_steps(ranks, signal.SIGKILL, of=ranks[1:])
    said = said_by(ranks)
    assert ranks[0].process.exitcode not in (0, None), said
    assert "waits for another one that was killed" in said

    ranks = launched([*arguments, "--resume"], 1)
    said = said_by(ranks)
    assert ranks[0].process.exitcode == 0, said
    assert "going on after step" in said


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_chats_are_trained_over_ranks_as_in_one_process(tiny_model, tmp_path, engine):
    """Padded sequences, clipping, a schedule and validation, whose loss is that of all ranks."""
    folder, file = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    turns = [
        [("user", f"word{n}"), ("assistant", "word7 " * (n % 4) + f"word{n}")] for n in range(7)
    ]
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in turns]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--clip", 0.5, "--warmup", 2, "--schedule", "linear", "--validation", file]

    ranks = launched(words(folder, file, tmp_path / "out", *more, engine=engine), 2)
    said = said_by(ranks)
    assert [rank.process.exitcode for rank in ranks] == [0, 0], said

    model, sequences = AutoModelForCausalLM.from_pretrained(folder), sequences_of(file, folder, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    scheduler = transformers.get_scheduler("linear", optimizer, 2, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in (2 * step, 2 * step + 1):  # each weighs the same, whatever counts in it
            (model(**sequences.inputs(number)).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    expected, found = model.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    for name, value in found.items():
        assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    total = count = 0
    for number in range(len(sequences)):
        inputs = sequences.inputs(number)
        tokens = int((inputs["labels"][:, 1:] >= 0).sum())
        total, count = total + tokens * model(**inputs).loss.item(), count + tokens
    assert last["validation_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "start it with torchrun"),
        (["--budget", "1GiB"], "--budget plans one process"),
        (["--home", "host"], "--home plans one process"),
        (["--lora", "4"], "--lora is not there over ranks"),
        (["--engine", "ddp"], "'ddp' is not one of 'fsdp2', 'zero3'"),
        (["--tile", "much"], "--tile"),
    ],
)
def test_what_cannot_be_is_said_before_anything_begins(
    tiny_model, tiny_text, tmp_path, capsys, more, sentence
):
    """The message is one sentence, and no folder is made."""
    assert main(words(tiny_model, tiny_text, tmp_path / "out", *more)) == 2

    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_layers_below_the_tile_is_told_so(tiny_model, tiny_text, tmp_path):
    """The message names the option to change."""
    arguments = words(tiny_model, tiny_text, tmp_path / "out")
    arguments[arguments.index("2KiB")] = "1GiB"

    said = said_by(launched(arguments, 1))

    assert "memtile: --tile 1.00 GiB: no layer of the model is larger" in said


def test_options_of_engines_need_one(tiny_model, tiny_text, tmp_path, capsys):
    """Options that would be ignored are refused."""
    command = ["finetune", str(tiny_model), str(tiny_text), "--out", str(tmp_path / "out")]

    assert main([*command, "--tile", "1MiB"]) == 2
    assert "go with --engine" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_ends_every_rank():
    """Each rank checks its own shards, all ranks raise, and none steps."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(3, 5)
        model(torch.ones(2, 3)).sum().backward()
        check_shards(model)
        model.weight.grad[1, 2] = float("inf")

        with pytest.raises(NotFiniteError, match="the gradient of weight is not finite; nothing"):
            check_shards(model)
    finally:
        dist.destroy_process_group()
