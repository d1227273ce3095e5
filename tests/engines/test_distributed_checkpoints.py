"""Distributed checkpoints: saved by some ranks in one grid, loaded by others in another."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_worker import (
    CASES,
    HALF,
    STEPS,
    WIDTH,
    Net,
    optimizer_of,
    spawn,
    spawn_killed,
    tiled,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import memtile
from memtile.engines import distributed_checkpoints
from memtile.engines.dense_views import dense_view
from memtile.engines.distributed_checkpoints import load, save
from memtile.errors import (
    ArgumentError,
    CannotTileError,
    CheckpointError,
    NotFiniteError,
    OptimizerError,
)

_WORLDS = [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 4))]
_ALONE = "ignore:torch.distributed is"  # DCP says that there is one process


@pytest.fixture(scope="module", params=_WORLDS)
def outcome(request, tmp_path_factory):
    return spawn(request.param, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def dense():
    """The dense parameters of each case, trained in this process without a stop."""
    found = {}
    for name, case in CASES.items():
        model = Net(case.frozen)
        optimizer = optimizer_of(model)
        train(model, optimizer, 0)
        train(model, optimizer, HALF)
        found[name] = model.state_dict()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_plain_model_takes_what_ranks_saved_to_the_last_bit(outcome, name):
    """Parameters, buffers and moments of the shards, and the groups' options."""
    model, optimizer = ruined_plain(name)
    resumed = memtile.resume_training(outcome.folder / name, model, optimizer)

    half = outcome.states[name]["half"]
    assert (resumed.step, resumed.extra) == (HALF, {"name": name})
    assert_same(model.state_dict(), dense_of(name, half["model"]))
    for key in ("exp_avg", "exp_avg_sq"):
        theirs = {n: state[key] for n, state in half["state"].items()}
        assert_same(moments_of(model, optimizer, key), dense_of(name, theirs))
    assert {float(state["step"]) for state in optimizer.state.values()} == {HALF}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_a_run_goes_on_in_another_world_and_grid(outcome, dense, name, grid):
    """Stopped by ranks half-way, one process goes on to the uninterrupted run's parameters."""
    model, optimizer = tiled(CASES[name], grid, sharded=False)
    load(outcome.folder / name, model, optimizer)
    train(model, optimizer, HALF)

    assert_close(dict(memtile.dense_state_dict(model)), dense[name])


@pytest.mark.parametrize("key", ["resumed", "from one"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_go_on_from_what_another_grid_or_one_dense_process_saved(outcome, dense, name, key):
    """Saved half-way in another grid, or by a dense model alone: the same parameters in the end."""
    assert_close(dense_of(name, outcome.states[name][key]["model"]), dense[name])


@pytest.mark.filterwarnings(_ALONE)
@pytest.mark.parametrize("name", CASES)
def test_torch_alone_reads_what_ranks_saved(outcome, name):
    """`dcp.load` of an untiled model's own state dict, and of its optimizer's, needs no memtile."""
    by_view, _ = ruined_plain(name)
    dcp.load(by_view.state_dict(), checkpoint_id=outcome.folder / f"{name} by torch")
    model, optimizer = ruined_plain(name)
    values, state = get_state_dict(model, optimizer)
    given = {"model": values, "optimizer": state}
    dcp.load(given, checkpoint_id=next((outcome.folder / name).iterdir()))
    set_state_dict(
        model, optimizer, model_state_dict=given["model"], optim_state_dict=given["optimizer"]
    )

    ours, our_optimizer = ruined_plain(name)
    load(outcome.folder / name, ours, our_optimizer)
    assert_same(by_view.state_dict(), ours.state_dict())
    assert_same(model.state_dict(), ours.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        assert_same(moments_of(model, optimizer, key), moments_of(ours, our_optimizer, key))


@pytest.mark.parametrize("name", CASES)
def test_ranks_read_what_torch_saved_of_a_dense_model(outcome, name):
    """`dcp.load` of a sharded model's dense view takes a checkpoint that knows no tiles."""
    model, optimizer = ruined_plain(name)
    load(outcome.folder / f"{name} alone", model, optimizer)

    found = dense_of(name, outcome.states[name]["from torch"]["model"])
    assert_same(found, model.state_dict())


def test_no_rank_holds_a_dense_layer(outcome):
    """Saving and loading 16 tiles allocates less than four, also from a dense checkpoint."""
    layer_bytes = WIDTH * WIDTH * 4

    assert all(peak < layer_bytes // 4 for rank in outcome.ranks for peak in rank["peaks"])


def test_tied_tiles_take_what_rank_0_broadcasts(outcome):
    """`set_model_state_dict` with `broadcast_from_rank0` sends a tied tile under one name."""
    assert all(rank["broadcast"] for rank in outcome.ranks)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nothing there", "holds no training checkpoint"),
        ("another model", "of another model"),
        ("another shape", "up.weight is (31, 12)"),
        ("a missing name", "only this Net has 'extra.bias'"),
        ("no optimizer", "saved without an optimizer"),
        ("one rank alone", "of another model"),
        ("a failing disk", "No space left on device"),
        ("left", "['step-00000001']"),
    ],
)
def test_what_cannot_be_loaded_or_saved_is_said_on_every_rank(outcome, what, words):
    """All of them raise, also where it fails on one; none waits, and nothing is left behind."""
    assert all(words in rank["told"][what] for rank in outcome.ranks)


@pytest.mark.parametrize(
    ("world", "doomed"),
    [(2, 1), *(pytest.param(*way, marks=pytest.mark.slow) for way in ((2, 0), (4, 2)))],
)
def test_a_rank_killed_in_a_save_leaves_the_last_checkpoint(world, doomed, dense, tmp_path):
    """The others are told so within the group's timeout, and another world size goes on."""
    told = spawn_killed(world, doomed, tmp_path)
    model, optimizer = tiled(CASES["rows into a ragged grid"], (3, 5), sharded=False)
    resumed = load(tmp_path / "run", model, optimizer)
    train(model, optimizer, HALF)
    saved = save(tmp_path / "run", model, optimizer, step=STEPS)

    assert all(text.startswith("EngineError") and "was killed" in text for text in told)
    assert resumed.step == HALF
    assert_close(dict(memtile.dense_state_dict(model)), dense["rows into a ragged grid"])
    assert list((tmp_path / "run").iterdir()) == [saved]  # nothing half-written is left either


def test_parked_tiles_are_saved_and_loaded_where_they_live(tmp_path):
    """Tiles and moments in a home on disk, into another grid of them and out again."""
    torch.manual_seed(0)
    model, again = Net(), Net()
    with memtile.DiskHome(tmp_path) as home:
        memtile.tile(model, out_splits=3, home=home)
        memtile.tile(again, out_splits=2, in_splits=3, home=home)
        optimizers = [memtile.TileOptimizer(each, torch.optim.AdamW) for each in (model, again)]
        train(model, optimizers[0], 0)
        save(tmp_path / "run", model, optimizers[0], step=HALF)
        load(tmp_path / "run", again, optimizers[1])
        train(model, optimizers[0], HALF)
        train(again, optimizers[1], HALF)

        assert_close(dict(memtile.dense_state_dict(again)), dict(memtile.dense_state_dict(model)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_whatever_an_optimizer_keeps_comes_back(tmp_path, momentum):
    """Nothing, or no tensor; and nothing of what it kept before stays."""
    model = memtile.tile(Net(), out_splits=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=momentum)
    save(tmp_path, model, optimizer, step=0)
    train(model, optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.1
    load(tmp_path, model, optimizer)

    assert dict(optimizer.state) == {}
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_older_checkpoints_go_once_the_new_one_is_there(tmp_path):
    """`keep` of them stay, and what is not of this kind."""
    model = nn.Linear(3, 2)
    (tmp_path / "step-00000001").mkdir()
    for step in (2, 3, 4):
        save(tmp_path, model, step=step, keep=2)

    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_view_has_no_values():
    """What is computed from it is refused, and its repr says what it is."""
    view = dense_view(memtile.tile(nn.Sequential(nn.Linear(5, 7)), out_splits=2))["0.weight"]

    assert (view.shape, view.dtype) == ((7, 5), torch.float32)
    assert repr(view) == "DenseView((7, 5), torch.float32, 2 pieces here)"
    with pytest.raises(CheckpointError, match="holds no values"):
        view + 1


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Counting:
    """A scheduler that counts."""

    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def sharded():
    """A model in tiles and shards, and its optimizer after some steps."""
    model, optimizer = tiled(CASES["rows into a ragged grid"], (4, 1))
    train(model, optimizer, 0)
    return model, optimizer


def test_a_scheduler_goes_with_a_sharded_model(alone, tmp_path):
    """Into any model; another one, or none, is refused as for a whole model."""
    memtile.save_training(tmp_path, *sharded(), Counting(7), step=HALF)
    model, optimizer = ruined_plain("rows into a ragged grid")
    scheduler = Counting()
    memtile.resume_training(tmp_path, model, optimizer, scheduler)

    assert scheduler.count == 7
    with pytest.raises(CheckpointError, match="Counting, and is to be resumed with no scheduler"):
        memtile.resume_training(tmp_path, *sharded())


@pytest.mark.parametrize(("extra", "is_taken"), [({"count": 7}, True), ({"other": 7}, False)])
def test_a_run_saved_before_schedulers_had_a_field_goes_on(
    alone, tmp_path, monkeypatch, extra, is_taken
):
    """Its scheduler was saved as `extra`; anything else there is not taken for one."""
    made = distributed_checkpoints._outgoing

    def as_before(*given):
        state = made(*given)
        record = json.loads(state["memtile"])
        del record["scheduler"]
        return {**state, "memtile": json.dumps(record)}

    monkeypatch.setattr(distributed_checkpoints, "_outgoing", as_before)
    memtile.save_training(tmp_path, *sharded(), step=HALF, extra=extra)
    scheduler = Counting()

    if is_taken:
        assert memtile.resume_training(tmp_path, *sharded(), scheduler).extra == extra
        assert scheduler.count == 7
    else:
        with pytest.raises(CheckpointError, match="saved with no scheduler"):
            memtile.resume_training(tmp_path, *sharded(), scheduler)


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_a_sharded_model_that_is_not_finite_is_not_saved(alone, tmp_path, what):
    """Unless that is asked for; what is frozen may be anything."""
    model, optimizer = sharded()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    held = parameter if what == "weight" else optimizer.state[parameter]["exp_avg"]
    held.detach().to_local().view(-1)[0] = float("nan")

    with pytest.raises(NotFiniteError, match="is not finite; a run cannot go on from it"):
        memtile.save_training(tmp_path, model, optimizer, step=HALF)
    model.requires_grad_(False)
    memtile.save_training(tmp_path, model, optimizer, step=HALF, check_finite=what == "weight")


def test_what_an_engine_cannot_do_is_refused_with_the_way_out(alone, tmp_path):
    """Arguments of sharded models for whole ones, and the reverse."""
    whole, group = nn.Sequential(nn.Linear(3, 2)), dist.group.WORLD
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)

    with pytest.raises(ArgumentError, match=r"trainable_only=True.*leave it out"):
        memtile.save_training(tmp_path, *sharded(), step=1, trainable_only=True)
    for act in (
        lambda: memtile.save_checkpoint(whole, tmp_path, process_group=group),
        lambda: memtile.load_checkpoint(whole, tmp_path, process_group=group),
        lambda: memtile.save_training(tmp_path, whole, optimizer, step=1, process_group=group),
        lambda: memtile.resume_training(tmp_path, whole, optimizer, process_group=group),
    ):
        with pytest.raises(ArgumentError, match="leave process_group out"):
            act()
    with pytest.raises(ArgumentError, match="leave device out"):
        memtile.load_checkpoint(whole, tmp_path, device="cpu")


def test_a_sharded_model_does_not_resume_from_a_whole_one(alone, tmp_path):
    """The formats are two; the weights alone can be had."""
    model, (plain, ours) = sharded()[0], ruined_plain("rows into a ragged grid")
    saved = memtile.save_training(tmp_path, plain, ours, step=HALF)

    with pytest.raises(CheckpointError, match="of a model that was not sharded"):
        memtile.resume_training(tmp_path, model, None)
    memtile.load_checkpoint(model, saved)


def test_a_wrapped_model_has_the_names_of_the_plain_one(alone, tmp_path):
    """`DistributedDataParallel`, which puts "module." before each name, is looked through."""
    wrapped = DistributedDataParallel(memtile.tile(Net(), out_splits=2))
    optimizer, (plain, ours) = optimizer_of(wrapped), ruined_plain("one tile into rows")
    train(wrapped, optimizer, 0)
    save(tmp_path, wrapped, optimizer, step=HALF)
    load(tmp_path, plain, ours)

    assert_same(plain.state_dict(), dict(memtile.dense_state_dict(wrapped.module)))
    assert dense_view(wrapped).keys() == plain.state_dict().keys()
    assert len(ours.state) == len(list(plain.parameters()))


@pytest.mark.filterwarnings(_ALONE)
def test_a_view_is_copied_by_a_save_in_the_background(alone, tmp_path):
    """`dcp.async_save` writes the values of the moment at which it was called."""
    model = memtile.tile(nn.Sequential(nn.Linear(5, 7)), out_splits=2, in_splits=3)
    before, again = dict(memtile.dense_state_dict(model)), nn.Sequential(nn.Linear(5, 7))
    writing = dcp.async_save(dense_view(model), checkpoint_id=tmp_path / "background")
    with torch.no_grad():
        model[0].tile(0, 0).weight.fill_(7.0)
    writing.result()
    dcp.load(again.state_dict(), checkpoint_id=tmp_path / "background")

    assert_same(again.state_dict(), before)


def test_what_has_no_dense_form_is_refused():
    """A model that is none, extra state, values that are not there, two dtypes."""
    mixed = memtile.tile(nn.Sequential(nn.Linear(5, 7)), out_splits=2)
    mixed[0].tile(0, 0).double()

    with pytest.raises(ArgumentError, match=r"must be an nn\.Module"):
        dense_view({})
    with pytest.raises(CannotTileError, match="extra state"):
        dense_view(WithExtraState())
    with pytest.raises(CheckpointError, match="to_empty"):
        dense_view(memtile.tile(nn.Sequential(nn.Linear(5, 7, device="meta")), out_splits=2))
    with pytest.raises(CheckpointError, match="one dtype"):
        dense_view(mixed)


@pytest.mark.parametrize("grid", [(1, 1), (3, 2)])
def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path, grid):
    """A file of values that ends too early, then one that says what is where that is missing."""
    model = memtile.tile(Net(), out_splits=grid[0], in_splits=grid[1])
    place = save(tmp_path, Net(), step=1)
    values = place / "__0_0.distcp"
    values.write_bytes(values.read_bytes()[: values.stat().st_size // 2])

    with pytest.raises(CheckpointError, match="could not be read by rank 0"):
        load(tmp_path, model)
    (place / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="no distributed checkpoint"):
        load(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_saved_with_strides_of_its_own_is_read(tmp_path, dtype):
    """A transposed tensor, as torch writes it; dtypes are converted as torch does."""
    model = memtile.tile(nn.Sequential(nn.Linear(5, 7, bias=False, dtype=dtype)), out_splits=3)
    weight = torch.rand(5, 7).t()
    plain = nn.Sequential(nn.Linear(5, 7, bias=False))
    plain[0].weight = nn.Parameter(weight)
    save(tmp_path, plain, step=1)
    load(tmp_path, model)

    assert not plain[0].weight.is_contiguous()
    assert_same(dict(memtile.dense_state_dict(model)), {"0.weight": weight.to(dtype)})


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fn, torch.int64])
def test_buffers_of_any_dtype_are_read(tmp_path, dtype):
    """Also those whose form in a file only torch knows."""
    model, again = nn.Linear(3, 2), nn.Linear(3, 2)
    model.register_buffer("kept", torch.arange(6).view(2, 3).to(dtype))
    again.register_buffer("kept", torch.zeros(2, 3).to(dtype))
    save(tmp_path, model, step=1)
    load(tmp_path, again)

    assert torch.equal(again.kept.float(), torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("options", [{"step": -1}, {"step": 1, "keep": 0}])
def test_numbers_that_mean_nothing_are_refused(tmp_path, options):
    """What is no number of steps or of checkpoints."""
    with pytest.raises(ArgumentError, match="must be"):
        save(tmp_path, nn.Linear(2, 2), **options)


def test_another_optimizer_is_refused(tmp_path):
    """Of another class, with other groups, of another model."""
    model = Net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0)
    save(tmp_path, model, optimizer, step=HALF)
    sgd = torch.optim.SGD(model.parameters())

    with pytest.raises(CheckpointError, match="this optimizer is torch"):
        load(tmp_path, model, sgd)
    with pytest.raises(CheckpointError, match=r"1 parameter groups, the checkpoint .* has 2"):
        load(tmp_path, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(OptimizerError, match="make the optimizer after"):
        load(tmp_path, model, optimizer_of(Net()))
    with pytest.raises(ArgumentError, match=r"must be a torch\.optim\.Optimizer"):
        save(tmp_path, model, model.parameters(), step=6)


class WithExtraState(nn.Linear):
    """A module that keeps what is no tensor."""

    def __init__(self):
        super().__init__(2, 2)

    def get_extra_state(self):
        return 1


def ruined_plain(name):
    """An untiled model and its optimizer, with other values than were saved."""
    model = Net(CASES[name].frozen)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7.0)
    return model, optimizer_of(model)


def dense_of(name, tiles):
    """Tensors under names of tiles, of whichever grid of the case, joined under dense names."""
    case = CASES[name]
    grid = next(
        grid
        for grid in (case.saved, case.loaded)
        if f"up.linears.{grid[0] - 1}.{grid[1] - 1}.bias" in tiles
        and f"up.linears.{grid[0]}.0.bias" not in tiles
    )
    model = memtile.tile(Net(case.frozen), out_splits=grid[0], in_splits=grid[1])
    model.load_state_dict(tiles, strict=False)
    return dict(memtile.dense_state_dict(model))


def moments_of(model, optimizer, key):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: state[key] for parameter, state in optimizer.state.items()}


def assert_same(found, expected):
    assert found
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-9 * value.norm(), key
