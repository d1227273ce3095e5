"""Dense safetensors into shards and out of them."""

from importlib.util import find_spec

import peft
import pytest
import torch
import transformers
from dense_files_worker import PIECE, TILE, Net, filled, spawn
from safetensors.torch import load_file
from small_models import build
from stored_models import dense_values, write

import memtile
from memtile.engines.dense_files import found_for
from memtile.errors import CheckpointError, CheckpointWarning


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request):
    """What the ranks found, and the files that were written."""
    files = {}

    def read(folder):
        for name in (path.name for path in folder.iterdir() if path.is_dir()):
            files[name] = load_file(folder / name / "model.safetensors")
        net = Net()
        memtile.load_checkpoint(net, folder / "out")
        files["net"] = net.state_dict()
        files["left"] = sorted(path.name for path in (folder / "out").iterdir())

    return spawn(request.param, read), files


def test_what_is_written_is_what_was_read(found):
    """Loaded into shards of another grid and saved: equal bits and names, tied tensors once."""
    _, files = found

    assert files["out"].keys() == files["in"].keys()
    assert all(torch.equal(files["out"][name], value) for name, value in files["in"].items())


def test_the_file_is_one_that_the_dense_model_loads(found):
    """Loaded by the function for one process."""
    _, files = found

    assert all(torch.equal(files["net"][n], value) for n, value in filled().state_dict().items())


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed here")
def test_partitions_of_zero3_are_read_and_written_too(found):
    """ZeRO-3's stretches of flattened tiles too, of a convolution and a buffer."""
    _, files = found

    assert files["zero3"].keys() == files["in"].keys()
    assert all(torch.equal(files["zero3"][name], value) for name, value in files["in"].items())
    assert all(
        torch.equal(files["zero3 loaded"][name], value)
        for name, value in files["other values"].items()
    )


def test_it_may_be_written_in_another_dtype(found):
    """As weights are that were trained in float32 for a checkpoint of 16 bits."""
    _, files = found

    assert all(
        torch.equal(value, files["in"][name].bfloat16()) for name, value in files["half"].items()
    )


def test_nothing_but_the_checkpoint_stays_in_the_folder(found):
    """The temporary folder of shards is removed."""
    _, files = found

    assert files["left"] == ["model.safetensors"]


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(found):
    """Every rank raises with the names, before anything is read."""
    ranks, _ = found

    assert all("is not a checkpoint of this model" in refused for _, refused, *_ in ranks)


def test_no_rank_holds_a_dense_layer(found):
    """Nothing is larger than a piece or a tile, while the layers have 276 and 372 elements."""
    ranks, _ = found

    assert all(numel <= max(PIECE, TILE) for numel, *_ in ranks)


def test_another_folder_on_a_rank_is_told_to_all(found):
    """It raises: it would be ignored."""
    ranks, _ = found

    assert all("give the same on each rank" in said for _, _, said, _ in ranks)


def test_a_folder_that_cannot_be_made_is_told_to_all(found):
    """Every rank raises, and the message says what to do."""
    ranks, _ = found

    assert all("give another folder" in unwritable for *_, unwritable in ranks)


def test_a_whole_model_is_written_in_another_dtype_too(tmp_path):
    """Integers stay, and the file is that of the model in this dtype."""
    net = filled()
    net.counts = torch.arange(4)
    memtile.save_checkpoint(memtile.tile(net, out_splits=2), tmp_path, dtype=torch.bfloat16)
    files = load_file(tmp_path / "model.safetensors")

    assert files["counts"].dtype == torch.int64
    assert torch.equal(files["up.weight"], filled().up.weight.bfloat16())


def test_what_would_be_drawn_on_each_rank_is_refused(tmp_path):
    """A new head, and adapters without values: nothing is left as it came from memory."""
    build("llama").save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    head = memtile.empty_model(lambda: transformers.LlamaForSequenceClassification(config))
    base = memtile.empty_model(lambda: transformers.LlamaForCausalLM(config))
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))

    for model, name in ((head, "score.weight"), (lora, "lora_A")):
        with pytest.raises(CheckpointError, match=f"{name}.* values are not made over ranks"):
            found_for(model, tmp_path, is_first=True, strict=False)


def test_one_name_too_many_is_said_by_the_first_rank(tmp_path):
    """The others are silent; each refuses it where it is asked to be strict."""
    path = write({**dense_values(Net()), "more": torch.ones(2)}, tmp_path / "m.safetensors")

    with pytest.warns(CheckpointWarning, match="holds more, which the model has not"):
        first = found_for(Net(), path, is_first=True, strict=False)
    other = found_for(Net(), path, is_first=False, strict=False)

    assert first.unexpected == other.unexpected == ["more"]
    for is_first in (True, False):
        with pytest.raises(CheckpointError, match="it has more, which the model has not"):
            found_for(Net(), path, is_first=is_first, strict=True)
