"""`memtile finetune` with chats, validation, clipping and schedules: as plain torch does it."""

import json
import math
import os
import signal

import pytest
import torch
import transformers
from processes import Command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memtile.cli import main
from memtile.cli.finetune.backend import schedule_of
from memtile.cli.finetune.data_files import find_data
from memtile.cli.finetune.sequences import read_sequences
from memtile.cli.finetune.settings import TrainingSettings
from memtile.costmodel import format_byte_size

STEPS, TOKENS, LR = 6, 16, 1e-2
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + ' ' }}"
    "{% endgeneration %}{% else %}{{ message.content + ' ' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def chat_model(tiny_model, tmp_path_factory):
    """Gives the tiny model with a chat template, and with dropout, which draws random numbers."""
    folder = tmp_path_factory.mktemp("chat-model")
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Gives 20 conversations of different lengths, one of them too long."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"word{n} word{n + 1}"},
                {"role": "assistant", "content": " ".join(["word5"] * (n % 5 + 1))},
                {"role": "user", "content": "word3"},
                {"role": "assistant", "content": f"word{2 * n}" + " word7" * (n == 19) * 20},
            ]
        }
        for n in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(model, data, out, *more):
    options = ["--steps", STEPS, "--tokens", TOKENS, "--lr", LR, "--budget", "400MiB"]
    options += ["--cache", out.parent / "cache"]
    return [str(word) for word in ["finetune", model, data, "--out", out, *options, *more]]


def log(out):
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        (each["step"], each["loss"], each["lr"], each.get("validation_loss")) for each in entries
    ]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def weights(folder):
    return load_file(folder / "model.safetensors")


def reference(model, data, tmp_path, clip=None, schedule="cosine", warmup=0):
    """Weights and losses of the same steps of plain transformers, without dropout."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    found = find_data([data], "DATA")
    sequences = read_sequences(
        found,
        AutoTokenizer.from_pretrained(model),
        TOKENS,
        0,
        packs=found.is_text,
        cache=tmp_path / "cache",
        key="reference",
    )
    optimizer = torch.optim.AdamW(dense.parameters(), lr=LR, fused=True)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = transformers.get_scheduler(name, optimizer, warmup, STEPS)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = dense(**sequences.inputs(step)).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(dense.parameters(), clip)
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    return dense.state_dict(), losses


def close(found, expected):
    return all((found[k] - expected[k]).norm() <= 1e-5 * expected[k].norm() for k in found)


def test_chats_are_trained_as_plain_transformers_does(tiny_model, chat_model, chats, tmp_path):
    """Padding, mask and labels give the dense model's losses and weights; what was cut is said."""
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():  # without dropout
        (model / path.name).write_bytes(path.read_bytes())
    (model / "chat_template.jinja").write_text(TEMPLATE)

    assert main(arguments(model, chats, tmp_path / "out")) == 0

    expected, losses = reference(model, chats, tmp_path)
    assert close(weights(tmp_path / "out"), expected)
    assert [entry[1] for entry in log(tmp_path / "out")] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("clip", "schedule", "warmup"), [(0.5, "linear", 2), (None, "constant", 3), (1e3, "cosine", 1)]
)
def test_clipping_and_schedules_are_torchs(tiny_model, tiny_text, tmp_path, clip, schedule, warmup):
    """Gradients are scaled as `clip_grad_norm_` does, learning rates are the Trainer's."""
    more = ["--schedule", schedule, "--warmup", warmup, *(["--clip", clip] if clip else [])]

    assert main(arguments(tiny_model, tiny_text, tmp_path / "out", *more)) == 0

    expected, losses = reference(tiny_model, tiny_text, tmp_path, clip, schedule, warmup)
    assert close(weights(tmp_path / "out"), expected)
    assert [entry[1] for entry in log(tmp_path / "out")] == pytest.approx(losses, rel=1e-5)


def test_what_clipping_costs_is_said(tiny_model, tiny_text, tmp_path, capsys):
    """Gradients of all weights are kept: their bytes are printed, with the optimizer's mode."""
    assert main(arguments(tiny_model, tiny_text, tmp_path / "out", "--clip", 1)) == 0

    said = capsys.readouterr().out
    nbytes = sum(tensor.nbytes for tensor in weights(tiny_model).values())
    assert "AdamW classic" in said
    assert (
        f"--clip keeps the gradients of all weights until the step, {nbytes / 1024:.1f} KiB" in said
    )


def test_validation_changes_nothing_of_the_run(tiny_model, tiny_text, tmp_path):
    """Losses and weights are those without it, bit for bit, with dropout; its loss is a mean."""
    plain, checked = tmp_path / "plain", tmp_path / "checked"
    held_out = tmp_path / "held out.txt"
    held_out.write_text(" ".join(f"word{n % 13}" for n in range(50)))
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))

    assert main(arguments(model, tiny_text, plain)) == 0
    more = ["--validation", held_out, "--eval-steps", 4]
    assert main(arguments(model, tiny_text, checked, *more)) == 0

    assert same(weights(plain), weights(checked))
    assert [e[:3] for e in log(plain)] == [e[:3] for e in log(checked)]
    seen = {step: loss for step, _, _, loss in log(checked) if loss is not None}
    assert list(seen) == [4, STEPS]
    trained = AutoModelForCausalLM.from_pretrained(checked)
    ids = AutoTokenizer.from_pretrained(checked)(
        held_out.read_text(), return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        losses = [trained(input_ids=i, labels=i).loss for i in ids[:, :48].split(TOKENS, 1)]
    assert seen[STEPS] == pytest.approx(sum(losses).item() / 3, rel=1e-5)


def test_validation_of_chats_weighs_each_token(chat_model, chats, tmp_path):
    """The mean is over the tokens that count, not over conversations of different lengths."""
    out = tmp_path / "out"
    assert main(arguments(chat_model, chats, out, "--validation", chats)) == 0

    trained = AutoModelForCausalLM.from_pretrained(out)
    sequences = read_sequences(
        find_data([chats], "DATA"),
        AutoTokenizer.from_pretrained(out),
        TOKENS,
        None,
        packs=False,
        cache=tmp_path / "cache",
        key="again",
    )
    total = count = 0
    for number in range(len(sequences)):
        inputs = sequences.inputs(number)
        tokens = int((inputs["labels"][:, 1:] >= 0).sum())
        with torch.no_grad():
            total += tokens * trained(**inputs).loss.item()
        count += tokens
    assert log(out)[-1][3] == pytest.approx(total / count, rel=1e-5)


def test_a_killed_run_of_chats_goes_on_bit_for_bit(chat_model, chats, tmp_path):
    """With dropout, clipping, warm-up and validation: losses of all kinds and weights are equal."""
    more = ["--clip", 0.7, "--warmup", 3, "--schedule", "linear", "--seed", 5, "--save-every", 2]
    more += ["--validation", chats, "--eval-steps", 3]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(chat_model, chats, whole, *more)) == 0
    run = Command(arguments(chat_model, chats, out, *more))
    for line in run.output:
        if line.startswith("step 3 "):
            os.kill(run.process.pid, signal.SIGKILL)
            break
    run.wait()

    assert main([*arguments(chat_model, chats, out, *more), "--resume"]) == 0
    assert log(out) == log(whole)
    assert same(weights(out), weights(whole))


def test_a_run_goes_on_with_its_own_options_only(chat_model, chats, tmp_path, capsys):
    """Another option, template or validation is refused by name."""
    out, more = tmp_path / "out", ["--clip", 0.7, "--validation", chats]
    assert main(arguments(chat_model, chats, out, *more)) == 0

    for changed, sentence in (
        (["--clip", 0.5, "--validation", chats], "--clip 0.7, and this is 0.5"),
        ([*more, "--warmup", 2], "--warmup 0, and this is 2"),
        (["--clip", 0.7], "--validation"),
        ([*more, "--schedule", "linear"], "--schedule cosine, and this is linear"),
    ):
        assert main([*arguments(chat_model, chats, out, *changed), "--resume"]) == 2
        assert sentence in capsys.readouterr().err
    template = chat_model / "chat_template.jinja"
    template.write_text(TEMPLATE.replace("' '", "'  '"))
    try:
        assert main([*arguments(chat_model, chats, out, *more), "--resume"]) == 2
    finally:
        template.write_text(TEMPLATE)
    assert "not those that the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--clip", 0], "--clip 0.0 is no norm"),
        (["--clip", "nan"], "--clip nan is no norm"),
        (["--warmup", -1], "--warmup -1"),
        (["--warmup", STEPS], "leaves none of --steps 6"),
        (["--schedule", "square"], "'square' is not one of"),
        (["--eval-steps", 3], "--eval-steps has no data"),
        (["--eval-steps", 0], "--eval-steps 0"),
        (["--validation", "nowhere"], "--validation nowhere cannot be read (No such file"),
        (["--validation", "chats"], "--validation has messages, and DATA text"),
    ],
)
def test_wrong_options_are_one_sentence(
    tiny_model, tiny_text, chats, tmp_path, capsys, options, sentence
):
    """Nothing is begun."""
    options = [chats if option == "chats" else option for option in options]

    assert main(arguments(tiny_model, tiny_text, tmp_path / "out", *options)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_schedule_of_earlier_runs_stays(tmp_path):
    """A cosine without warm-up is the scheduler that saved runs have the state of."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    settings = TrainingSettings("model", (), steps=8, tokens=4, lr=1.0, seed=0)

    scheduler = schedule_of(optimizer, settings)

    assert isinstance(scheduler, torch.optim.lr_scheduler.CosineAnnealingLR)
    rates = []
    for _ in range(8):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)])


def saved_tensors(out):
    """The bytes of a run's last checkpoint and of its model."""
    (step,) = (out / "training").iterdir()
    (weights,) = (
        path for path in step.glob("*.safetensors") if path.stem in ("model", "trainable")
    )
    files = (weights, step / "optimizer.safetensors", *out.glob("*.safetensors"))
    *checkpoint, model = (sum(t.nbytes for t in load_file(file).values()) for file in files)
    return sum(checkpoint), model


@pytest.mark.parametrize("more", [[], ["--lora", 3], ["--save-every", 2]])
def test_a_disk_without_room_is_refused_before_training(
    tiny_model, tiny_text, tmp_path, capsys, monkeypatch, more
):
    """Checkpoints, two while one replaces the other, and the model must fit beside the home."""
    assert main(arguments(tiny_model, tiny_text, tmp_path / "out", *more)) == 0
    checkpoint, model = saved_tensors(tmp_path / "out")
    needed = checkpoint + (checkpoint if "--save-every" in more else model)
    words = arguments(tiny_model, tiny_text, tmp_path / "new" / "out", *more)
    monkeypatch.setattr("memtile.cli.finetune.backend.free_bytes", lambda folder: needed - 1)
    monkeypatch.setattr("memtile.cli.finetune.run.train", lambda *_: pytest.fail("it trained"))

    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"checkpoints and model take {format_byte_size(needed)}, and" in said
    assert "make room, or give another folder" in said
    assert not (tmp_path / "new").exists()

    monkeypatch.undo()
    monkeypatch.setattr("memtile.cli.finetune.backend.free_bytes", lambda folder: needed)
    assert main(words) == 0
