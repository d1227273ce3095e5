"""`park_activations`: the same bits from every home, each piece of memory stored once."""

import pytest
import torch
from rings import saved_is_written
from saving_blocks import BATCH, BLOCKS, LENGTH, SMALL, WIDTH, Blocks, equal, kept, step
from tiny_llama import llama
from torch import nn
from watched_home import WatchedHome

import memtile
from memtile.checkpoints import CheckpointHome
from memtile.errors import ArgumentError, HomeError, ParkedError
from memtile.homes import DiskHome, HostHome, tensor_of

HOMES = ("host", "mapped", "buffered", "direct")


@pytest.fixture
def in_slabs():
    """Replaces the fixture of the folder: `home` says how the disk is used."""


@pytest.fixture(params=HOMES)
def home(request, monkeypatch):
    """Host memory, and a disk in each way."""
    if request.param == "host":
        yield HostHome()
        return
    if request.param == "buffered":
        request.getfixturevalue("buffered")
    if request.param == "direct":
        monkeypatch.setattr("memtile.homes.disk.page_cache_fit", lambda size: (False, "a test"))
    made = DiskHome()
    if request.param == "direct" and made.path != "direct":
        pytest.skip("no direct I/O in the folder for temporary files")
    assert made.is_mapped == (request.param == "mapped")
    yield made
    made.close()


@pytest.fixture
def buffered(monkeypatch):
    monkeypatch.setattr("memtile.homes.filesystems._OVERWRITING", frozenset())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_have_the_same_bits(home, reentrant):
    """With and without recomputation, with backward after the block and in it, in every step."""
    model = Blocks(reentrant)
    parked = memtile.park_activations(home, smallest_bytes=SMALL, model=model)

    for seed in range(3):
        expected = step(model, seed=seed)
        assert equal(step(model, parked, seed=seed), expected)
        assert equal(step(model, parked, inside=True, seed=seed), expected)


@pytest.mark.parametrize("home", ["mapped"], indirect=True)
def test_pages_are_dropped_once_no_node_needs_them(home, monkeypatch):
    """After backward none is mapped, although each piece was in use there."""
    pages, uses = home._mapped, []
    real = pages.use
    monkeypatch.setattr(pages, "use", lambda *given: (uses.append(given), real(*given)))
    step(Blocks(reentrant=None), memtile.park_activations(home, smallest_bytes=SMALL))

    assert uses
    uses.clear()
    assert not pages._used
    assert not pages._idle


@pytest.mark.usefixtures("buffered")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_llama_has_the_same_gradients(checkpointing):
    """transformers' own model and its checkpointing."""
    model, ids = llama().train(), torch.randint(3, 211, (2, 29))
    if checkpointing:
        model.activation_checkpointing_enable()

    def gradients():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = gradients()
    parked = memtile.park_activations("disk", smallest_bytes=SMALL)
    with parked:
        found = gradients()

    assert parked.home.traffic.written_bytes > 0
    assert equal(found, expected)


@pytest.mark.usefixtures("buffered")
def test_a_compiled_model_has_the_same_gradients():
    """What a compiled graph saves is parked too."""
    model = nn.Sequential(nn.Linear(WIDTH, 50), nn.Tanh(), nn.Linear(50, 50), nn.Sigmoid())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    parked = memtile.park_activations("disk", smallest_bytes=SMALL)

    def gradients(context):
        model.zero_grad()
        torch.manual_seed(3)
        x = torch.randn(31, WIDTH, requires_grad=True)
        with context:
            loss = compiled(x).sum()
        if context is parked:
            saved_is_written(parked.home)
        loss.backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    expected = gradients(torch.enable_grad())
    assert equal(gradients(parked), expected)
    assert parked.home.traffic.written_bytes > 0


@pytest.mark.usefixtures("buffered")
def test_weights_and_activations_may_live_in_one_home():
    """A tiled model with an optimizer in backward trains as it does without parked activations."""

    def losses(parks):
        home = DiskHome()
        model = memtile.tile(Blocks(reentrant=True), max_tile_bytes=4000, home=home)
        optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-2)
        parked = memtile.park_activations(home, smallest_bytes=SMALL) if parks else None
        found = []
        for seed in range(3):
            found.append(step_of(model, parked, seed))
            optimizer.step()
        return found

    def step_of(model, parked, seed):
        torch.manual_seed(seed)
        x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
        with parked or torch.enable_grad():
            loss = model(x * 1)
        loss.backward()
        return loss.detach()

    assert equal(losses(True), losses(False))


# What is stored


def written(home):
    """What was written, piece by piece, once all of it is."""
    saved_is_written(home)
    return home.labels("write")


def labels_after(parked, *tensors):
    """What is written, piece by piece, when a function saves these tensors, and what it gets."""
    parked.home.clear()
    with parked:
        loss, found = kept(*tensors)
    labels = written(parked.home)  # what backward has used up is not written any more
    loss.backward()
    return labels, found


@pytest.fixture
def watched():
    """Activations parked in a home that tells what it writes."""
    with WatchedHome() as home:
        yield memtile.park_activations(home, smallest_bytes=64)


def test_tensors_that_share_memory_are_stored_once(watched):
    """The same tensor again, its transpose, chunks and an expanded view: one piece."""
    x = torch.randn(8, 9) * 1
    row = torch.randn(1, 40) * 1
    views = [x, x, x.t(), *x.chunk(3, 1), x[:, 2], row.expand(30, 40), row]
    labels, found = labels_after(watched, *views)

    assert labels == ["activation float32 (8, 9)", "activation float32 (30, 40)"]
    assert equal(found, views)
    assert [f.stride() for f in found] == [v.stride() for v in views]


def test_tensors_that_count_writes_apart_are_stored_apart(watched):
    """A write to one does not show in the version of the other, which shares its memory."""
    x = torch.randn(8, 9) * 1

    labels, found = labels_after(watched, x, x.data)

    assert labels == ["activation float32 (8, 9)"] * 2
    assert equal(found, [x, x])


def test_a_small_part_of_a_large_storage_is_stored_alone(watched):
    """A few rows of a large table: their bytes, not those of the table."""
    table = torch.randn(100, 50) * 1
    labels, found = labels_after(watched, table[7:12])

    assert labels == ["activation float32 (5, 50)"]
    assert watched.home.traffic.written_bytes == 4096  # one page
    assert equal(found, [table[7:12]])
    assert found[0].data_ptr() % 64 == table[7:12].data_ptr() % 64


def test_each_version_of_a_tensor_is_stored(watched):
    """What is saved, written to in place, and saved again, comes back as it was each time."""
    x = torch.randn(8, 9) * 1
    with watched:
        first, before = kept(x)
        expected = x.clone()
        x.mul_(3)
        second, after = kept(x)
    assert len(written(watched.home)) == 2
    (first + second).backward()

    assert equal(before, [expected])
    assert equal(after, [x])


def test_an_lstm_has_the_same_gradients(watched):
    """Its gates lie in one storage with versions of their own, and are written to in turn."""
    cell = nn.LSTMCell(12, 12)

    def gradients():
        cell.zero_grad()
        torch.manual_seed(5)
        state = cell(torch.randn(7, 12))
        written(watched.home)
        (state[0].sum() + state[1].square().sum()).backward()
        return [p.grad.clone() for p in cell.parameters()]

    expected = gradients()
    with watched:
        found = gradients()

    assert watched.home.labels("write")
    assert equal(found, expected)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(900).view(30, 30).t(),
        torch.arange(900) % 3 == 0,
        torch.randn(40, 40).to(torch.bfloat16),
        torch.randn(40, 40, dtype=torch.complex64),
        torch.randn(4, 5, 6, 7).to(memory_format=torch.channels_last),
        torch.randn(3, 50)[:, ::2],
        torch.randn(40, dtype=torch.complex64).conj(),
        torch.randn(300).view(torch.int16),
        torch.randn(300)[3:200],
        torch.empty(0, 5),
        torch.tensor(3.0),
        torch.randn(30, 30).to_sparse(),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tensor.layout}",
)
def test_every_kind_of_tensor_comes_back(home, tensor):
    """Dtypes, strides, offsets, tensors without elements or without one memory."""
    parked = memtile.park_activations(home, smallest_bytes=64)
    with parked:
        loss, found = kept(tensor)
    loss.backward()

    assert torch.equal(found[0].to_dense(), tensor.to_dense())
    assert found[0].dtype == tensor.dtype
    assert found[0].layout == tensor.layout
    if tensor.layout == torch.strided:
        assert found[0].stride() == tensor.stride()
        assert found[0].is_conj() == tensor.is_conj()


def test_what_stays_in_memory_anyway_is_left_there(watched):
    """Leaves, parameters and their views, parked weights, storages of the model, small tensors."""
    model = nn.Linear(40, 40)
    model.register_buffer("mask", torch.ones(40, 40))
    leaf, other = torch.randn(40, 40, requires_grad=True), nn.Parameter(torch.randn(40, 40))
    parked_weight = tensor_of(watched.home.allocate((40, 40), torch.float32)).fill_(3)
    left = [leaf, leaf.t(), other, other.t(), parked_weight, torch.ones(15) * 1]
    with_model = memtile.park_activations(watched.home, smallest_bytes=64, model=model)
    own = [model.mask[:30], model.weight.detach()]

    labels, found = labels_after(watched, *left)
    labels_of_own, found_own = labels_after(with_model, *own)

    assert labels == labels_of_own == []
    for before, after in zip((*left, *own), (*found, *found_own), strict=True):
        assert after.data_ptr() == before.data_ptr()
    assert len(labels_after(watched, *own)[0]) == 2  # who does not know the model parks them


def test_inner_contexts_park_in_their_own_homes():
    """As with PyTorch's hooks, the innermost block takes what is saved in it."""
    outer, inner = (memtile.park_activations(WatchedHome(), smallest_bytes=64) for _ in range(2))
    tensors = [torch.randn(20 + n) * 1 for n in range(3)]
    with outer:
        first, _ = kept(tensors[0])
        with inner:
            second, _ = kept(tensors[1])
        third, _ = kept(tensors[2])

    assert written(outer.home) == ["activation float32 (20,)", "activation float32 (22,)"]
    assert written(inner.home) == ["activation float32 (21,)"]
    (first + second + third).backward()


# What is refused


def test_a_tensor_that_was_left_and_modified_raises():
    """As without hooks, though PyTorch does not look at versions under them."""
    parameter = nn.Parameter(torch.randn(5, 5))
    with memtile.park_activations("host"):
        loss = (parameter * parameter).sum()
    with torch.no_grad():
        parameter.mul_(2)

    with pytest.raises(ParkedError, match=r"shape \(5, 5\).*in-place.*version 0, now 1"):
        loss.backward()


def test_homes_where_nothing_can_be_parked_are_refused():
    """The device's own memory, what is only read, and no home at all; a size that is none."""
    for home in ("device", CheckpointHome(), "nowhere"):
        with pytest.raises(ArgumentError):
            memtile.park_activations(home)
    with pytest.raises(ArgumentError, match=r"model='llama' must be an nn\.Module"):
        memtile.park_activations("disk", model="llama")
    with pytest.raises(ArgumentError, match="smallest_bytes=-1"):
        memtile.park_activations("host", smallest_bytes=-1)


def test_a_closed_home_is_refused():
    """When the block is entered, and when backward reads."""
    parked = memtile.park_activations(WatchedHome(), smallest_bytes=64)
    with parked:
        loss, _ = kept(torch.randn(50) * 1)
    parked.home.close()

    with pytest.raises(HomeError, match="closed"):
        loss.backward()
    with pytest.raises(HomeError, match="closed"), parked:
        pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_blocks_of_a_recomputed_model_are_what_is_saved(watched, reentrant):
    """One piece for each block's input, one for the loss's, and nothing that is recomputed."""
    model = Blocks(reentrant)
    with memtile.park_activations(watched.home, smallest_bytes=SMALL, model=model):
        loss = model(torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True) * 1)
        labels = written(watched.home)
        loss.backward()

    assert labels == [f"activation float32 ({BATCH}, {LENGTH}, {WIDTH})"] * (BLOCKS + 1)
    assert watched.home.labels("write") == labels
