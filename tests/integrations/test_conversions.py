"""Folders whose tensors transformers renames, merges, splits or transposes, read and written."""

import copy
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from converted_models import FAMILIES, empty, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors_files import same_tensors
from stored_models import dense_values, write
from torch import Tensor
from transformers import core_model_loading as ops

import memtile
from memtile.convert import Latest, TilingSpec, convert_checkpoint, converting_bytes
from memtile.convert.derived import RowMap
from memtile.errors import CheckpointError
from memtile.homes import allocation_of
from memtile.integrations.weight_conversion import Group
from memtile.planner import plan_ranks
from memtile.testing import LargestAllocation

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
# Patches are cut by convolutions, which stay as they are; so do small vectors.
pytestmark = pytest.mark.filterwarnings("ignore::memtile.errors.TileSizeWarning")

GRIDS: dict[str, dict[str, Any]] = {"ragged": {"max_tile_bytes": 700}, "whole": {"out_splits": 1}}


def contents(folder: Path) -> tuple[dict[str, set[str]], dict[str, Tensor]]:
    """The names in each file, and all tensors by name."""
    found: dict[str, Tensor] = {}
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        names[file.name] = set(tensors)
        found |= tensors
    return names, found


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_from_pretrained(family: str, tmp_path: Path) -> None:
    """Filled from the Hub's names, every tensor has its bits and its dtype, at any grid."""
    dense = make(family, torch.bfloat16)
    dense.save_pretrained(tmp_path)
    truth = type(dense).from_pretrained(tmp_path)

    for grid, home in (("ragged", "disk"), ("whole", None)):
        model = memtile.tile(empty(dense), **GRIDS[grid], home=home, checkpoint=tmp_path)

        assert same_tensors(dense_values(model), dict(truth.state_dict()))
    assert list(map(str, model._weight_conversions)) == list(map(str, truth._weight_conversions))


@pytest.mark.parametrize("family", ["gpt-neox", "gpt-oss", "jamba", "qwen2-vl", "qwen3-moe"])
def test_another_dtype_is_cast_as_transformers_casts_it(family: str, tmp_path: Path) -> None:
    """Files in float32 into a model of 16 bits: cast where from_pretrained does."""
    dense = make(family)
    dense.save_pretrained(tmp_path)
    truth = type(dense).from_pretrained(tmp_path, dtype=torch.bfloat16)

    model = memtile.tile(empty(dense, torch.bfloat16), max_tile_bytes=700, checkpoint=tmp_path)

    assert same_tensors(dense_values(model), dict(truth.state_dict()))


@pytest.mark.parametrize("size", [pytest.param("1GB", marks=pytest.mark.slow), "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_that_of_the_dense_model(family: str, size: str, tmp_path: Path) -> None:
    """Files, index, names, dtypes, shapes and bits are those that save_pretrained writes."""
    dense = make(family)
    dense.save_pretrained(tmp_path / "dense", max_shard_size=size)

    model = memtile.tile(make(family), max_tile_bytes=700, home="disk")
    model.save_pretrained(tmp_path / "tiled", max_shard_size=size)

    (our_files, ours), (their_files, theirs) = (
        contents(tmp_path / name) for name in ("tiled", "dense")
    )
    assert our_files == their_files
    assert same_tensors(ours, theirs)
    for name in ("config.json", "model.safetensors.index.json"):
        files = [tmp_path / folder / name for folder in ("tiled", "dense")]
        read = [json.loads(file.read_text()) if file.exists() else None for file in files]
        assert read[0] == read[1]


@pytest.mark.parametrize("family", ["gemma3", "llava", "mixtral", "qwen2-vl", "qwen3-moe"])
def test_what_was_read_is_written_again(family: str, tmp_path: Path) -> None:
    """A folder that was loaded and saved holds the same tensors under the same names."""
    make(family).save_pretrained(tmp_path / "source")
    model = memtile.tile(
        empty(make(family)), max_tile_bytes=700, home="disk", checkpoint=tmp_path / "source"
    )

    memtile.save_checkpoint(model, tmp_path / "again")

    assert contents(tmp_path / "again")[0] == contents(tmp_path / "source")[0]
    assert same_tensors(contents(tmp_path / "again")[1], contents(tmp_path / "source")[1])


@pytest.mark.parametrize("family", ["gpt-oss", "mixtral", "qwen3-moe"])
def test_own_names_and_tiles_are_read_too(family: str, tmp_path: Path) -> None:
    """The model's state dict, dense or in tiles, and the Hub's names cut into tiles."""
    dense = make(family)
    model = memtile.tile(make(family), max_tile_bytes=700)
    dense.save_pretrained(tmp_path / "hub")
    convert_checkpoint(
        tmp_path / "hub", tmp_path / "cut", TilingSpec(["model.layers.*"], out_splits=3)
    )
    write(dict(dense.state_dict()), tmp_path / "own" / "model.safetensors")
    write(dict(model.state_dict()), tmp_path / "tiles" / "model.safetensors")

    for folder in ("own", "tiles", "cut"):
        filled = memtile.tile(empty(dense), max_tile_bytes=900, checkpoint=tmp_path / folder)

        assert same_tensors(dense_values(filled), dict(dense.state_dict()))


Chain = tuple[list[str], list[str], list[Any], dict[str, tuple[int, ...]]]
_MERGED, _ROWS, _ROW = "experts.*.w.weight", (8, 6), (4, 6)
CHAINS: dict[str, Chain] = {  # patterns of sources and targets, operations, stored shapes
    "merged": (
        [_MERGED],
        ["experts.w"],
        [ops.MergeModulelist(0)],
        {f"experts.{n}.w.weight": _ROW for n in range(11)},
    ),
    "merged and joined": (
        ["experts.*.g.weight", "experts.*.u.weight"],
        ["experts.gu"],
        [ops.MergeModulelist(0), ops.Concatenate(1)],
        {f"experts.{n}.{own}.weight": _ROW for n in range(11) for own in "gu"},
    ),
    "chunks": (["qkv"], ["q", "k"], [ops.Chunk(0)], {"qkv.weight": _ROWS}),
    "joined": (["q", "k"], ["qk"], [ops.Concatenate(0)], {"k.weight": _ROW, "q.weight": _ROWS}),
    "permuted": (["q"], ["q_proj"], [ops.PermuteForRope()], {"q.weight": _ROWS}),
    "chunks permuted": (
        ["qk"],
        ["q", "k"],
        [ops.Chunk(0), ops.PermuteForRope()],
        {"qk.weight": (16, 6)},
    ),
    "interleaved": (["gu"], ["x"], [ops.Interleave(1)], {"gu.weight": (3, 8, 6)}),
    "interleaved and cut": (
        ["gu"],
        ["g", "u"],
        [ops.Interleave(0), ops.Chunk(0)],
        {"gu.weight": _ROWS},
    ),
}
COMPUTED: dict[str, Chain] = {
    "transposed": (["a"], ["b"], [ops.Transpose(0, 1)], {"a.weight": _ROWS}),
    "transposed stack": (["a"], ["b"], [ops.Transpose(1, 2)], {"a.weight": (3, 4, 6)}),
    "columns interleaved": (["a"], ["b"], [ops.Interleave(1)], {"a.weight": _ROWS}),
    "columns cut": (["a"], ["b", "c"], [ops.Chunk(1)], {"a.weight": _ROWS}),
}


@pytest.mark.parametrize("name", [*CHAINS, *COMPUTED])
def test_operations_of_transformers_move_rows_or_are_computed(name: str) -> None:
    """Values are those of the converter, in both directions; what only moves rows is told."""
    patterns, targets, operations, shapes = (CHAINS | COMPUTED)[name]
    rule = ops.WeightConverter(patterns, targets, operations)
    generator = torch.Generator().manual_seed(0)
    given = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    config = transformers.LlamaConfig(num_attention_heads=2)

    for transform in (rule, rule.reverse_transform()):
        group, truth = grouped(transform, given), copy.deepcopy(transform)
        for pattern, key in group.members:
            truth.add_tensor(group.first, key, pattern, given[key])
        expected = truth.convert(group.first, config=config)
        found = group.derived({k: Held(v) for k, v in given.items()}, config, {}, None, Latest())

        assert set(found) == set(expected)
        for key, source in found.items():
            value = expected[key][0] if isinstance(expected[key], list) else expected[key]
            assert torch.equal(source.rows(0, len(value)), value)
            if transform is rule or name in CHAINS:
                assert isinstance(source, RowMap) == (name in CHAINS)
        given = {key: source.rows(0, source.shape[0]) for key, source in found.items()}


def grouped(transform: Any, keys: Iterable[str]) -> Group:
    """All tensors as one call of a converter."""
    named = [
        (*transform.rename_source_key(key), key) for key in sorted(keys, key=ops.dot_natural_key)
    ]
    group = Group(named[0][0], transform)
    group.members += [(pattern, key) for _, pattern, key in named]
    return group


class Held:
    """A tensor in memory as a source."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor."""
        return self.tensor.reshape(-1)[start:stop].clone()

    def rows(self, start: int, stop: int) -> Tensor:
        """Whole rows."""
        return self.tensor[start:stop].clone()


def test_a_base_with_adapters_is_read_and_keeps_them(tmp_path: Path) -> None:
    """The Hub's names of the base, below a PEFT model."""
    dense = make("qwen3-moe")
    dense.save_pretrained(tmp_path)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(make("qwen3-moe"), config)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.zero_()
    memtile.tile(model, max_tile_bytes=700)

    memtile.load_checkpoint(model, tmp_path)

    values = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in dense_values(model).items()
        if "lora_" not in name
    }
    assert same_tensors(values, dict(dense.state_dict()))


def test_the_base_of_a_model_is_read_from_the_whole(tmp_path: Path) -> None:
    """A model without head from a causal model's folder, and the reverse, experts and all."""
    dense = make("qwen3-moe")
    dense.save_pretrained(tmp_path)
    cls = transformers.Qwen3MoeModel

    base = memtile.empty_model(lambda: cls._from_config(dense.config, dtype=torch.float32))
    with pytest.warns(UserWarning, match="lm_head"):
        memtile.tile(base, max_tile_bytes=700, checkpoint=tmp_path)

    assert same_tensors(dense_values(base), dict(cls.from_pretrained(tmp_path).state_dict()))


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    """The message has the file's names, and nothing is changed."""
    make("qwen3-moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, file)

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj") as said:
        memtile.tile(empty(make("qwen3-moe")), out_splits=2, checkpoint=tmp_path)

    assert "model.layers.1.mlp.experts.0.gate_proj.weight and 6 more" in str(said.value)


def test_a_shape_and_a_strange_name_are_said_with_the_names(tmp_path: Path) -> None:
    """A folder of another size gives both shapes; an unknown expert its name in the file."""
    make("qwen3-moe", moe_intermediate_size=24).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"the checkpoint's is \(4, 48, 32\), the model's"):
        memtile.tile(empty(make("qwen3-moe")), out_splits=2, checkpoint=tmp_path)

    make("qwen3-moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    strange = "model.layers.7.mlp.experts.0.up_proj.weight"
    save_file({**load_file(file), strange: torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match=rf"it has {strange}, which the model has not"):
        memtile.tile(empty(make("qwen3-moe")), out_splits=2, checkpoint=tmp_path, strict=True)


def test_a_merged_stack_is_filled_in_slabs(tmp_path: Path) -> None:
    """Nothing as large as a stack of experts is made while its tiles are filled, or saved."""
    changes = {"moe_intermediate_size": 96, "num_experts": 64, "num_hidden_layers": 1}
    changes |= {"hidden_size": 512}
    model = make("qwen3-moe", torch.bfloat16, **changes)
    stack = model.model.layers[0].mlp.experts.gate_up_proj.nbytes
    model.save_pretrained(tmp_path / "source")
    blank = empty(model)
    del model

    with LargestAllocation() as allocated:
        filled = memtile.tile(
            blank, max_tile_bytes=1 << 20, home="disk", checkpoint=tmp_path / "source"
        )
        memtile.save_checkpoint(filled, tmp_path / "saved")

    assert allocated.nbytes < stack / 2
    assert same_tensors(contents(tmp_path / "saved")[1], contents(tmp_path / "source")[1])


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("bytes_", [64 << 10, 128 << 10, 512 << 10])
def test_merged_experts_stay_in_their_files(family: str, bytes_: int, tmp_path: Path) -> None:
    """Parts of an expert, one, or several: gate and up are two pieces of the files, down is one."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "moe_intermediate_size": 256}
    dense = make(family, **sizes)
    dense.save_pretrained(tmp_path)
    truth = dense_values(dense)

    model = memtile.tile(
        empty(dense), max_tile_bytes=bytes_, home="checkpoint", checkpoint=tmp_path
    )

    homes = {
        type(allocation_of(parameter).home).__name__
        for name, parameter in model.named_parameters()
        if ".experts." in name
    }
    assert homes == {"CheckpointHome"}
    ids = torch.tensor([[3, 7, 11]])
    with torch.no_grad():
        resident = memtile.tile(make(family, **sizes), max_tile_bytes=bytes_)
        assert torch.equal(model(ids).logits, resident(ids).logits)
    assert same_tensors(dense_values(model), truth)


def test_what_is_copied_is_said_with_its_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Small pieces, or values that must be computed, name their tensors and what they cost."""
    dense = make("mixtral")
    dense.save_pretrained(tmp_path)

    with caplog.at_level(logging.WARNING, "memtile.checkpoints"):
        model = memtile.tile(empty(dense), out_splits=2, home="checkpoint", checkpoint=tmp_path)

    nbytes = 2 * dense.model.layers[0].mlp.experts.gate_up_proj.nbytes
    assert f"layers.1.mlp.experts.gate_up_proj are copied to a home on disk, {nbytes} bytes" in (
        caplog.text
    )
    assert same_tensors(dense_values(model), dense_values(dense))


def test_the_plan_of_a_folder_knows_what_must_be_computed(tmp_path: Path) -> None:
    """A transposed stack is in memory with its source while it is loaded; a merged one is not."""
    for family in ("mixtral", "qwen3-vl-moe"):
        make(family).save_pretrained(tmp_path / family)
    text = {**FAMILIES["qwen3-vl-moe"][2]["text_config"], "num_experts": 96}
    dense = make("qwen3-vl-moe", torch.bfloat16, text_config=text)
    dense.save_pretrained(tmp_path / "large")
    file = tmp_path / "large" / "model.safetensors"  # of which the Hub's have (in, out)
    stored = load_file(file)
    turned = {k: v.mT if k.endswith(("up_proj", "down_proj")) else v for k, v in stored.items()}
    save_file({k: v.contiguous() for k, v in turned.items()}, file, {"format": "pt"})
    stack = dense.model.language_model.layers[0].mlp.experts.gate_up_proj.nbytes

    def step(model: Any) -> Tensor:
        return model(input_ids=torch.arange(4).view(1, -1)).logits

    plan = memtile.plan(
        tmp_path / "large", budget="8GiB", tokens=4, optimizer=None, dtype=torch.bfloat16, work=step
    )

    assert converting_bytes(empty(make("mixtral")), tmp_path / "mixtral") == 0
    assert converting_bytes(empty(make("mixtral")), tmp_path / "nowhere") == 0
    assert converting_bytes(empty(dense), tmp_path / "large") == 3 * stack
    (term,) = (term for term in plan.terms if term.name.startswith("conversion of weights"))
    assert 0 < term.nbytes <= 3 * stack
    ranks = plan_ranks(
        tmp_path / "large", world_size=2, engine="fsdp2", tokens=4, dtype=torch.bfloat16, work=step
    )
    kept = {term.name: (term.place, term.nbytes) for term in ranks.kept}
    assert kept["conversion of weights while they are loaded"] == ("host", 3 * stack)
    model = memtile.tile(empty(dense), max_tile_bytes=9000, checkpoint=tmp_path / "large")
    assert same_tensors(dense_values(model), dict(dense.state_dict()))


def test_files_are_those_that_other_readers_know(tmp_path: Path) -> None:
    """Each expert of a tiled model is written by itself, under the Hub's names."""
    memtile.tile(make("qwen3-moe"), max_tile_bytes=700).save_pretrained(tmp_path)

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())

    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names
    assert not any("gate_up" in name for name in names)
