"""ZeRO-3 configs for tiles, and findings about other configs; no processes are started."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from small_experts import EXPERTS, experts_model
from torch import nn

import memtile
from memtile.engines import zero3_config
from memtile.engines.deepspeed_zero3 import Finding, attach, check, config
from memtile.errors import ArgumentError, EngineError

ZERO = "zero_optimization"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """A DeepSpeed that is recent enough, whether there is one or not."""
    monkeypatch.setattr(zero3_config, "version", lambda name: "0.19.8")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def model(bias=True, device="meta", splits=4):
    linears = [nn.Linear(64, 128, bias, device=device), nn.Linear(128, 64, bias, device=device)]
    return memtile.tile(nn.Sequential(*linears, nn.LayerNorm(64, device=device)), out_splits=splits)


def large():
    """A layer with tiles of 1024 × 1024 elements."""
    return memtile.tile(nn.Sequential(nn.Linear(1024, 4096, device="meta")), out_splits=4)


def keys(findings):
    return [finding.key.removeprefix(f"{ZERO}.") for finding in findings]


def test_every_key_comes_from_the_tiles():
    """Tiles of 2048 elements, biases of 32 and 16, and a norm of 64 and 64."""
    found = config(model(), micro_batch=3, accumulation=2)

    assert found == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        ZERO: {
            "stage": 3,
            "stage3_prefetch_bucket_size": 1,
            "stage3_max_live_parameters": 2048 + 4 * 32 + 4 * 16 + 1,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 32,
            "reduce_bucket_size": 2048,
        },
    }


@pytest.mark.parametrize("given", [{}, {"prefetch": 2}, {"prefetch": 0}, {"clip": 0.5}])
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("splits", [1, 3, 4])
def test_what_config_gives_is_found_to_be_right(given, offload, bias, splits):
    """`check` finds nothing in a config that `config` made."""
    tiled = model(bias, splits=splits)
    found = config(tiled, offload_param=offload, offload_optimizer=offload, **given)

    assert check(found, tiled, prefetch=given.get("prefetch", 1)) == []


def test_tiles_on_a_disk_fit_their_buffers(tmp_path, monkeypatch):
    """A buffer holds a rank's part of a tile; masters are in memory for one parameter at a time."""
    monkeypatch.setattr(zero3_config, "_check_libaio", lambda place: None)
    found = config(large(), offload_param=tmp_path, offload_optimizer=tmp_path, world_size=3)
    zero, part = found[ZERO], -(-(1 << 20) // 3)

    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "nvme"
    assert zero["offload_param"]["nvme_path"] == str(tmp_path)
    assert zero["offload_param"]["buffer_size"] == part
    assert zero["sub_group_size"] == 1
    assert zero["offload_param"]["buffer_count"] == 5
    assert zero["offload_param"]["max_in_cpu"] == 0
    assert check(found, large(), world_size=3) == []


@pytest.mark.parametrize(
    ("dtype", "key"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, None)]
)
def test_the_dtype_is_the_models_own(dtype, key):
    """16 bits are trained with float32 masters."""
    found = config(model().to(dtype))

    assert {name for name in ("bf16", "fp16") if name in found} == ({key} if key else set())
    assert config(model(), dtype=dtype).get(key or "bf16") == ({"enabled": True} if key else None)


def test_every_default_of_deepspeeds_is_found():
    """A config that says stage 3 and nothing else."""
    findings = check({ZERO: {"stage": 3}}, model())

    assert keys(findings) == [
        "stage3_max_reuse_distance",
        "stage3_max_live_parameters",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "reduce_bucket_size",
        "gradient_clipping",
    ]
    assert all(finding.is_default for finding in findings)


def test_modules_that_are_gathered_at_once_are_found():
    """DeepSpeed's default names transformers' classes: all experts of a layer would be live."""
    tiled = memtile.tile(experts_model("qwen3"), out_splits=EXPERTS)
    assert check(config(tiled), tiled) == []

    given = config(tiled)
    del given[ZERO]["leaf_module"]

    (found,) = check(given, tiled)
    assert found.key == f"{ZERO}.leaf_module.classes"
    assert "all tiles of model.layers.0.mlp are gathered at once" in str(found)


def test_a_finding_is_a_sentence():
    """It gives the key, its value, whether it is a default, its effect, and a better value."""
    first, *_ = check({ZERO: {"stage": 3}}, model())

    assert str(first) == (
        "zero_optimization.stage3_max_reuse_distance is 1000000000 (DeepSpeed's default): a tile "
        "that is used again within so many elements, in backward say, is kept; 0 would do"
    )
    assert first == Finding(first.key, 1000000000, True, first.reason, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", 2),
        ("stage3_max_reuse_distance", 2 * 2048 + 1),
        ("stage3_max_live_parameters", 2 * 2048 + 1),
        ("stage3_prefetch_bucket_size", 2049),
        ("stage3_param_persistence_threshold", 2048),
        ("stage3_param_persistence_threshold", 31),
        ("reduce_bucket_size", 2049),
        ("stage3_prefetch_bucket_size", "auto"),
        ("stage3_param_persistence_threshold", "auto"),
        ("reduce_bucket_size", "auto"),
    ],
)
def test_the_first_value_that_is_wrong_is_found(key, value):
    """A value one above the right one, and accelerate's "auto", are found."""
    given = config(model())
    given[ZERO][key] = value

    (found,) = check(given, model())
    assert (found.key, found.value, found.is_default) == (f"{ZERO}.{key}", value, False)
    assert ("accelerate" in str(found)) == (value == "auto")
    given[ZERO][key] = found.instead
    assert check(given, model()) == []


def test_a_disk_that_tiles_do_not_fit_is_found(tmp_path):
    """A buffer smaller than a part of a tile, and parts that are never swapped."""
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_size": 2047, "max_in_cpu": 0}
    given = config(model())
    given[ZERO]["offload_param"] = offload

    assert keys(check(given, model())) == ["offload_param.buffer_size", "offload_param.device"]
    offload["buffer_size"] = 2048
    assert keys(check(given, model())) == ["offload_param.device"]


def test_parts_that_stay_in_memory_are_found(tmp_path):
    """DeepSpeed's default keeps 10⁹ elements in memory that are offloaded to a disk."""
    given = config(large())
    given[ZERO]["offload_param"] = {"device": "nvme", "nvme_path": str(tmp_path)}

    (found,) = check(given, large())
    assert (found.key, found.instead) == (f"{ZERO}.offload_param.max_in_cpu", 0)


def test_groups_of_parameters_on_a_disk_are_found(tmp_path):
    """DeepSpeed's default puts all of them into one; a group of one parameter is right."""
    given = config(model())
    given[ZERO]["offload_optimizer"] = {"device": "nvme", "nvme_path": str(tmp_path)}

    assert keys(check(given, model())) == ["sub_group_size"]
    given[ZERO]["sub_group_size"] = 17
    assert keys(check(given, model())) == ["sub_group_size"]
    given[ZERO]["sub_group_size"] = 16
    assert check(given, model()) == []


def test_a_file_is_read(tmp_path):
    """`check` takes the path of a config file, as the launcher does."""
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config(model())))

    assert check(path, model()) == []
    path.write_text("[]")
    with pytest.raises(ArgumentError, match="a JSON object"):
        check(path, model())
    with pytest.raises(ArgumentError, match="no DeepSpeed config"):
        check(tmp_path / "other.json", model())


@pytest.mark.parametrize("given", [{"micro_batch": 0}, {"prefetch": -1}, {"accumulation": True}])
def test_numbers_that_mean_nothing_are_refused(given):
    """Counts that are no whole numbers, or too small, raise."""
    with pytest.raises(ArgumentError, match="whole number"):
        config(model(), **given)


def test_a_model_without_tiles_is_refused():
    """DeepSpeed by itself is enough for it."""
    with pytest.raises(ArgumentError, match="nothing of Linear is tiled"):
        config(nn.Linear(2, 2))


def test_tiles_that_are_too_small_for_a_disk_are_refused(tmp_path, monkeypatch):
    """They raise here; DeepSpeed would silently keep them in memory."""
    monkeypatch.setattr(zero3_config, "_check_libaio", lambda place: None)

    with pytest.raises(ArgumentError, match="at least 262144 elements"):
        config(model(), offload_param=tmp_path)


def test_a_missing_deepspeed_is_said(monkeypatch):
    """The message has the command that installs it."""

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(zero3_config, "version", missing)
    for act in (config, attach):
        with pytest.raises(EngineError, match=r"pip install .memtile\[deepspeed\]"):
            act(model())


def test_an_old_deepspeed_is_said(monkeypatch):
    """The message has the release that is needed."""
    monkeypatch.setattr(zero3_config, "version", lambda name: "0.9.5+abc")

    with pytest.raises(EngineError, match=r"0\.9\.5.* is installed, which is too old"):
        config(model())


def test_a_missing_libaio_is_said(monkeypatch, tmp_path):
    """The message names the package that has it."""
    builder = SimpleNamespace(is_compatible=lambda verbose: False)
    builders = SimpleNamespace(AsyncIOBuilder=lambda: builder)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", builders)

    with pytest.raises(EngineError, match="libaio-dev"):
        config(large(), offload_param=tmp_path)
