"""`memtile finetune`: trains, stops, goes on bit for bit, and names mistakes in one sentence."""

import json
import math
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from processes import Command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memtile.cli import main
from memtile.cli.finetune.run import Run
from memtile.cli.finetune.settings import digests
from memtile.convert import Resumed

STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Gives a text of 400 words, few of them different, which is soon learnt."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    order = torch.randint(7, (400,), generator=torch.Generator().manual_seed(3))
    file.write_text("\n".join(f"word{number}" for number in order.tolist()))
    return file


def arguments(model, text, out, *more):
    options = ["--budget", "400MiB", "--steps", STEPS, "--tokens", 16, "--lr", 1e-2]
    options += ["--cache", out.parent / "cache"]
    return [str(word) for word in ["finetune", model, text, "--out", out, *options, *more]]


@pytest.fixture(scope="module")
def finished(tiny_model, text, tmp_path_factory):
    """Gives the folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(arguments(tiny_model, text, out)) == 0
    return out


def test_a_run_saved_before_it_counted_sequences_goes_on(monkeypatch, tmp_path):
    """In one process a step is a sequence; its place in an epoch was saved in their stead."""
    monkeypatch.setattr("memtile.cli.finetune.run.has_training", lambda folder: True)
    saved = Resumed(9, {"epoch": 1, "sequence": 2}, None, tmp_path)
    run = Run(None, SimpleNamespace(resume=lambda folder: saved), None, None)

    run.resume(tmp_path)

    assert (run.done, run.seen) == (9, 9)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_folder_is_a_plain_checkpoint(finished, tiny_model):
    """Plain transformers loads model and tokenizer, nothing missing, and the weights have moved."""
    model, report = AutoModelForCausalLM.from_pretrained(finished, output_loading_info=True)

    assert not any(report.values())
    assert AutoTokenizer.from_pretrained(finished)("word3").input_ids
    assert not same(weights(finished), weights(tiny_model))
    assert model.config.model_type == "llama"


def test_what_training_does_not_change_is_copied(finished, tiny_model):
    """Configs, tokenizer and licence of the folder are the model's own, byte for byte."""
    carried = [path for path in tiny_model.iterdir() if path.suffix != ".safetensors"]

    assert {"config.json", "generation_config.json", "tokenizer_config.json", "LICENSE"} <= {
        path.name for path in carried
    }
    for path in carried:
        assert (finished / path.name).read_bytes() == path.read_bytes(), path.name


def test_each_step_is_logged_and_drawn(finished):
    """The log has one JSON object a step, the losses fall, and the picture is a PNG."""
    entries = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]

    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert all(entry["peak_bytes"] > 0 and entry["tokens_per_second"] > 0 for entry in entries)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(finished, tiny_model, text, tmp_path, number):
    """Ctrl-C and SIGTERM save and say how to go on; `kill -9` leaves the last checkpoint."""
    out = tmp_path / "run"
    words = arguments(tiny_model, text, out, "--save-every", 2)
    run = Command(words)
    for line in run.output:
        if line.startswith("step 3 "):
            os.kill(run.process.pid, number)
            break
    said = run.wait()
    assert run.process.exitcode == {15: 143, 2: 130}.get(number, -number)
    assert number == signal.SIGKILL or "--resume" in said

    assert main([*words, "--resume"]) == 0
    assert same(weights(out), weights(finished))
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_a_folder_with_a_run_is_not_written_over(finished, tiny_model, text, tmp_path, capsys):
    """A second run into it is refused, other settings are refused by name; so is a file."""
    file = tmp_path / "file"
    file.write_text("")

    assert main(arguments(tiny_model, text, finished)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(arguments(tiny_model, text, finished, "--resume", "--seed", 5)) == 2
    assert "--seed 0, and this is 5" in capsys.readouterr().err
    assert main(arguments(tiny_model, text, tmp_path, "--resume")) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(arguments(tiny_model, text, tmp_path)) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(arguments(tiny_model, text, file)) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_text_and_model_only(tiny_model, text, tmp_path, capsys):
    """A text that was edited since, under the same name, is refused; nothing is trained."""
    mine, out = tmp_path / "mine.txt", tmp_path / "run"
    mine.write_text(text.read_text())
    assert main(arguments(tiny_model, mine, out)) == 0
    mine.write_text(text.read_text().replace("word1", "word2"))
    before = weights(out)

    assert main(arguments(tiny_model, mine, out, "--resume")) == 2
    assert "not those that the run" in capsys.readouterr().err
    assert same(weights(out), before)


def test_adapters_go_on_over_their_own_base_only(tiny_model, text, tmp_path, capsys):
    """Other weights of the same config and size are refused, and taken where they are the same."""
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model, folder)
    given = arguments(folder, text, out, "--lora", "2")
    assert main(given) == 0
    file = folder / "model.safetensors"
    first = file.read_bytes()
    file.write_bytes(first[:-1] + bytes([first[-1] ^ 1]))

    assert main([*given, "--resume"]) == 2
    assert "the data or the model are not those that the run" in capsys.readouterr().err
    file.write_bytes(first)
    assert main([*given, "--resume"]) == 0


@pytest.mark.parametrize(
    ("name", "with_weights", "is_seen"),
    [
        ("config.json", False, True),
        ("tokenizer.json", False, True),
        ("model.safetensors", True, True),
        ("model.safetensors", False, False),  # a run has its weights from its own checkpoint
        ("README.md", True, False),
    ],
)
def test_what_decides_a_run_is_told_from_others(tiny_model, tmp_path, name, with_weights, is_seen):
    """A changed byte changes the digest only where the file decides the run's numbers."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_text("good")
    before = digests(folder, [], with_weights)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)

    assert (digests(folder, [], with_weights) != before) == is_seen


def test_ids_beyond_the_model_are_refused(tiny_model, tmp_path, capsys):
    """A tokenizer of another model is named before training, not by an index error in it."""
    folder, file = tmp_path / "model", tmp_path / "text.txt"
    config = json.loads((tiny_model / "config.json").read_text())
    torch.manual_seed(0)
    small = AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{**config, "vocab_size": 50})
    )
    small.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    file.write_text("word90 " * 40)

    assert main(arguments(folder, file, tmp_path / "out")) == 2
    assert "the id 92, and the model has 50 rows" in capsys.readouterr().err


def test_two_runs_into_one_folder(tiny_model, text, tmp_path, capsys):
    """The second is refused while the first one runs, and the first ends well."""
    out = tmp_path / "run"
    words = arguments(tiny_model, text, out)
    first = Command(words)
    while not (out / "finetune.json").exists() and first.process.is_alive():
        time.sleep(0.01)
    os.kill(first.process.pid, signal.SIGSTOP)
    second = main([*words, "--resume"])
    os.kill(first.process.pid, signal.SIGCONT)
    first.wait()

    assert second == 2
    assert "another run is writing" in capsys.readouterr().err
    assert first.process.exitcode == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--tokens", "1"], "--tokens 1"),
        (["--tokens", "5000"], "more than the model reads at once, 64"),
        (["--lr", "nan"], "no learning rate"),
        (["--lr", "0"], "no learning rate"),
        (["--lora", "0"], "--lora 0"),
        (["--seed", "99999999999999999999"], "is too large"),
        (["--save-every", "0"], "--save-every 0"),
        (["--budget", "plenty"], "not a size"),
        (["--budget", "0B"], "less than one byte"),
        (["--budget", "-1GiB"], "not a size"),
        (["--budget", "1MiB"], "need at least"),
        (["--home", "cloud"], "no home"),
        (["--home", "disk:/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_wrong_numbers_are_one_sentence(tiny_model, text, tmp_path, capsys, options, sentence):
    """Each mistake ends with exit code 2 and one line; no run is begun."""
    out = tmp_path / "out"

    assert main(arguments(tiny_model, text, out, *options)) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (out / "finetune.json").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe\x00binary", "not UTF-8"),
        (b"word1\0word2", "zero bytes"),
        (b"word1 word2", "more than all of DATA has, 2"),
        (None, "No such file"),
    ],
)
def test_wrong_texts_are_one_sentence(tiny_model, tmp_path, capsys, content, sentence):
    """Empty, binary, missing and too short texts are refused with the reason."""
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)

    assert main(arguments(tiny_model, file, tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_run_that_overflows_keeps_its_last_good_state(tiny_model, text, tmp_path, capsys):
    """The message names the last checkpoint, whose numbers are finite."""
    out = tmp_path / "out"

    code = main(arguments(tiny_model, text, out, "--lr", "1e30", "--save-every", "1"))

    assert code == 2
    assert re.search("after 1 of 6 steps; the last good state is in", capsys.readouterr().err)
    (saved,) = (out / "training").glob("step-*")
    for file in ("model", "optimizer"):
        assert all(t.isfinite().all() for t in load_file(saved / f"{file}.safetensors").values())
    assert not (out / "model.safetensors").exists()


def test_a_loss_that_is_no_number_stops_the_run(tiny_model, text, tmp_path, capsys):
    """A loss that is not finite ends the run before backward."""
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)

    assert main(arguments(folder, text, tmp_path / "out")) == 2
    assert "the loss is nan after 0 of 6 steps; nothing was saved" in capsys.readouterr().err


def test_a_gradient_that_is_no_number_stops_the_run(
    tiny_model, text, tmp_path, capsys, monkeypatch
):
    """The loss is finite, and the last checkpoint stays the one of finite numbers."""
    out, step = tmp_path / "out", Run.step

    def overflowing(run):
        if run.done == 2:
            next(iter(run.backend.model.parameters())).register_hook(
                lambda gradient: gradient * math.inf
            )
        return step(run)

    monkeypatch.setattr(Run, "step", overflowing)

    assert main(arguments(tiny_model, text, out, "--save-every", "1")) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"the gradient of .* is not finite after 2 of 6 steps; the last good state", said
    )
    (saved,) = (out / "training").glob("step-*")
    assert saved.name == "step-00000002"
    for file in ("model", "optimizer"):
        assert all(t.isfinite().all() for t in load_file(saved / f"{file}.safetensors").values())
    assert not (out / "model.safetensors").exists()


def test_weights_that_are_no_numbers_are_not_saved(tiny_model, text, tmp_path, capsys, monkeypatch):
    """The checkpoint before stays, and is named."""
    out, save = tmp_path / "out", Run.save

    def overflown(run, folder):
        if run.done == 2:
            weight = next(p for p in run.backend.model.parameters() if p.dim() == 2)
            with torch.no_grad():
                weight[0, 0] = math.inf
        save(run, folder)

    monkeypatch.setattr(Run, "save", overflown)

    assert main(arguments(tiny_model, text, out, "--save-every", "1")) == 2
    assert "is not finite after 2 of 6 steps; the last good state is in" in capsys.readouterr().err
    assert [path.name for path in (out / "training").iterdir()] == ["step-00000001"]


def test_float16_is_refused_with_a_way_out_that_works(tiny_model, text, tmp_path, capsys):
    """The dtype that the message names makes the run one in bfloat16."""
    folder, out = tmp_path / "model", tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)

    assert main(arguments(folder, text, out)) == 2
    assert '"dtype": "bfloat16"' in capsys.readouterr().err
    assert not (out / "finetune.json").exists()
    config = folder / "config.json"
    config.write_text(config.read_text().replace("float16", "bfloat16"))
    assert main(arguments(folder, text, tmp_path / "other")) == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "other").values()} == {torch.bfloat16}


def test_adapters_are_trained_beside_frozen_weights(tiny_model, text, tmp_path):
    """`--lora` writes adapters that plain peft loads, and goes on after a stop bit for bit."""
    from peft import PeftModel

    out, again = tmp_path / "lora", tmp_path / "again"

    assert main(arguments(tiny_model, text, out, "--lora", "3")) == 0
    assert main(arguments(tiny_model, text, again, "--lora", "3")) == 0
    found = load_file(out / "adapter_model.safetensors")
    assert same(found, load_file(again / "adapter_model.safetensors"))
    assert any(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(base, out).merge_and_unload()
    assert loaded(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
