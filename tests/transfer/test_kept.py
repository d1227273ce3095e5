"""Kept experts: the most used tiles stay in memory, within their room, and are never stale."""

import contextlib
import errno
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from stored_models import write
from torch import nn
from watched_home import WatchedAllocation, WatchedHome

from memtile.checkpoints import Checkpoint, CheckpointHome
from memtile.errors import HomeFullError
from memtile.homes import PAGE, Allocation, DiskHome, aligned_buffer, allocation_of, tensor_of
from memtile.homes.live_file import LiveFile
from memtile.layers.parked import parameter_of
from memtile.transfer import ParkedSource, layer_call, rings_of
from memtile.transfer.kept import AGEING, KeptTiles

CPU = torch.device("cpu")


def watched(pages: int) -> WatchedHome:
    """A home that keeps so many pages of its tiles."""
    home = WatchedHome()
    home.tells, home.kept_bytes = True, pages * PAGE
    return home


def use(kept: KeptTiles, *tiles: WatchedAllocation) -> None:
    """Ask for the tiles in turn, and offer what is not kept."""
    for tile in tiles:
        if kept.find(tile) is None:
            kept.offer(tile, tile.tensor(), kept.epoch)


def labels(kept: KeptTiles, tiles: list[WatchedAllocation]) -> str:
    """The labels of those that are kept."""
    return "".join(tile.label or "" for tile in tiles if tile in kept)


def forward(parameters: list[nn.Parameter]) -> list[float]:
    """One call of a layer: the first value of each, read as tiles of experts."""
    found = []
    with layer_call():
        for parameter in parameters:
            with ParkedSource(parameter, parameters).values(CPU) as values:
                found.append(values.view(-1)[0].item())
    return found


def parameters_of(tiles: Sequence[Allocation]) -> list[nn.Parameter]:
    return [parameter_of(tensor_of(tile), requires_grad=False) for tile in tiles]


def test_a_kept_tile_is_not_read_again():
    """Two of three tiles fit: from the second forward on only the third is read."""
    home = watched(pages=2)
    parameters = parameters_of(home.tiles(3))

    assert forward(parameters) == [0, 1, 2]
    home.clear()
    assert forward(parameters) == [0, 1, 2]

    assert home.labels() == ["2"]
    kept = rings_of(home).kept
    assert (kept.used_bytes, kept.hit_bytes) == (6 * 12, 2 * 12)


def test_nothing_is_kept_of_a_home_that_cannot_tell_of_writes():
    """Every forward reads, and so sees, what was written through the tensors."""
    home = watched(pages=9)
    home.tells = False
    parameters = parameters_of(home.tiles(2))

    forward(parameters)
    parameters[1].data.fill_(7)

    assert forward(parameters) == [0, 7]
    assert rings_of(home).kept.hit_bytes == 0


def test_a_tile_takes_the_place_of_one_that_is_used_less():
    """It must lead by two uses: tiles in equal use do not replace each other."""
    tiles, kept = WatchedHome().tiles(3), KeptTiles(2 * PAGE)
    tiles[0].home.tells = True
    a, b, c = tiles
    use(kept, a, b, a, b)

    use(kept, c, c, c)
    assert labels(kept, tiles) == "01"
    use(kept, c)
    assert labels(kept, tiles) == "12"


def test_large_tiles_replace_several_small_ones_only_where_all_are_used_less():
    """One of two small tiles in use is enough to keep both."""
    home = watched(pages=0)
    small, large = home.tiles(2), home.tile("L", 1.0, length=2 * PAGE // 4)
    tiles, kept = [*small, large], KeptTiles(2 * PAGE)
    use(kept, *small, *[small[1]] * 9)

    use(kept, *[large] * 6)
    assert labels(kept, tiles) == "01"
    use(kept, *[large] * 6)
    assert labels(kept, tiles) == "L"


def test_old_uses_weigh_less():
    """What was used most long ago gives way to what is used now, after fewer uses than it had."""
    tiles, kept = WatchedHome().tiles(2), KeptTiles(PAGE)
    tiles[0].home.tells = True
    use(kept, *[tiles[0]] * 1000)

    use(kept, *[tiles[1]] * (8 * AGEING))

    assert labels(kept, tiles) == "1"


def test_the_room_is_never_exceeded():
    """Whatever is used, copies are within the limit; a tile that is larger is not kept."""
    home = watched(pages=0)
    tiles = [home.tile(str(n), n, length=(n % 4 + 1) * PAGE // 4) for n in range(12)]
    kept, order = KeptTiles(3 * PAGE), torch.Generator().manual_seed(0)

    for number in torch.randint(12, (600,), generator=order).tolist():
        use(kept, tiles[number])
        assert sum(tile.room for tile in tiles if tile in kept) <= 3 * PAGE
    assert not any(tile in kept for tile in tiles[3::4])


def test_tiles_that_have_gone_make_room():
    """A model that is dropped leaves the room to the others."""
    home, kept = watched(pages=0), KeptTiles(2 * PAGE)
    gone = home.tiles(2)
    use(kept, *gone)
    del gone

    tiles = home.tiles(2)
    use(kept, *tiles * 3)

    assert labels(kept, tiles) == "01"


def test_without_memory_for_copies_tiles_are_read(monkeypatch):
    """Where the system has none, nothing is kept and nothing fails."""

    def refused(room: int) -> memoryview:
        raise HomeFullError(12, f"no memory for {room} bytes")

    monkeypatch.setattr("memtile.transfer.kept.private_view", refused)
    home = watched(pages=9)
    parameters = parameters_of(home.tiles(2))

    assert forward(parameters) == forward(parameters) == [0, 1]
    assert rings_of(home).kept.hit_bytes == 0


def stored(folder: Path) -> tuple[CheckpointHome, list[nn.Parameter]]:
    """Two matrices in a checkpoint's file, of a home that keeps both."""
    values = {name: torch.full((50, 70), value) for name, value in (("a", 1.0), ("b", 2.0))}
    checkpoint = Checkpoint.open(write(values, folder / "model.safetensors"))
    home = CheckpointHome()
    home.kept_bytes = 1 << 20
    allocations = [home.rows_of(checkpoint[name], 0, (50, 70)) for name in "ab"]
    return home, parameters_of(allocations)


def test_tiles_in_files_are_read_once(tmp_path):
    """The second forward reads nothing."""
    home, parameters = stored(tmp_path)
    forward(parameters)
    before = home.traffic.read_bytes

    assert forward(parameters) == [1, 2]
    assert home.traffic.read_bytes == before > 0


@pytest.mark.parametrize("through_data", [True, False])
def test_a_write_to_a_kept_tile_is_seen(tmp_path, through_data):
    """A tile that is kept and then written to, through .data too, is as it was written."""
    _, parameters = stored(tmp_path)
    forward(parameters)
    with torch.no_grad():
        (parameters[1].data if through_data else parameters[1])[0, 0] = 5

    assert forward(parameters) == [1, 5]
    assert forward(parameters) == [1, 5]


def on_disk(folder: Path, number: int = 3) -> tuple[DiskHome, list[nn.Parameter]]:
    """Ragged tiles filled with their numbers, of a disk home that keeps all of them."""
    home = DiskHome(folder)
    home.kept_bytes = 1 << 20
    parameters = parameters_of([home.allocate((50, 71), torch.float32) for _ in range(number)])
    for value, parameter in enumerate(parameters):
        parameter.fill_(value)
    return home, parameters


def test_tiles_on_disk_are_read_once(tmp_path):
    """Each is read in the first forward, though it was written through its map just before."""
    home, parameters = on_disk(tmp_path)

    for _ in range(5):
        assert forward(parameters) == [0, 1, 2]

    assert home.traffic.read_bytes == sum(tensor_room(each) for each in parameters)


def tensor_room(parameter: nn.Parameter) -> int:
    """Bytes of whole pages."""
    return -(-parameter.nbytes // PAGE) * PAGE


def through_data(parameter: nn.Parameter, value: float) -> None:
    parameter.data[0, 0] = value


def in_place(parameter: nn.Parameter, value: float) -> None:
    with torch.no_grad():
        parameter.fill_(value)


def through_numpy(parameter: nn.Parameter, value: float) -> None:
    parameter.detach().numpy()[0, 0] = value


def past_the_map(parameter: nn.Parameter, value: float) -> None:
    allocation = allocation_of(parameter)
    buffer = aligned_buffer(PAGE)
    buffer.view(torch.float32).fill_(value)
    allocation.write(buffer)


@pytest.mark.parametrize("write_to", [through_data, in_place, through_numpy, past_the_map])
def test_every_write_to_a_kept_tile_on_disk_is_seen(tmp_path, write_to):
    """Written again and again, with and without a forward in between, it is as written last."""
    _, parameters = on_disk(tmp_path)
    forward(parameters)

    for value in (5, 6, 7, 8):
        write_to(parameters[1], value - 0.5)
        write_to(parameters[1], value)
        assert forward(parameters) == [0, value, 2]
        assert forward(parameters) == [0, value, 2]


def test_a_write_inside_a_forward_is_seen_by_the_next(tmp_path):
    """What was read ahead before the write is not kept past it."""
    _, parameters = on_disk(tmp_path)

    with layer_call():
        with ParkedSource(parameters[0], parameters).values(CPU):
            through_data(parameters[1], 5)
        with ParkedSource(parameters[1], parameters).values(CPU):
            pass

    assert forward(parameters) == [0, 5, 2]


def test_values_that_were_read_before_copies_were_dropped_are_not_kept():
    """Another thread began an iteration after a write, while this one worked on old values."""
    tiles, kept = WatchedHome().tiles(1), KeptTiles(PAGE)
    tiles[0].home.tells = True
    epoch = kept.epoch
    kept.find(tiles[0])

    kept.clear()
    kept.offer(tiles[0], tiles[0].tensor(), epoch)

    assert tiles[0] not in kept


def test_pages_that_cannot_be_unmapped_are_not_watched(tmp_path):
    """Locked pages stay mapped for writing, so the file says nothing of writes."""

    def refuse() -> None:
        raise OSError(errno.EINVAL, "locked")

    with contextlib.closing(LiveFile(tmp_path)) as file:
        file.watch(refuse)

        assert not file.is_unwritten()


def test_a_file_that_does_not_tell_of_writes_keeps_nothing(tmp_path, monkeypatch):
    """Where modification times do not follow writes, every forward reads."""
    monkeypatch.setattr("memtile.homes.live_file.LiveFile.tells_of_writes", False)
    home, parameters = on_disk(tmp_path)

    forward(parameters)
    forward(parameters)

    assert home.traffic.read_bytes == 2 * sum(tensor_room(each) for each in parameters)


def test_a_closed_home_keeps_nothing(tmp_path):
    """Closing frees the copies."""
    home, parameters = stored(tmp_path)
    forward(parameters)
    rings = rings_of(home)
    assert len(rings.kept._kept) == 2

    home.close()

    assert len(rings.kept._kept) == 0


def test_experts_that_are_hit_are_read_ahead():
    """While the first is worked on, the next two are being read; nothing else is."""
    home = watched(pages=0)
    tiles = home.tiles(4)
    parameters = parameters_of(tiles)
    forward(parameters)
    home.clear()

    hits = [parameters[n] for n in (1, 3, 0)]
    with layer_call(), ParkedSource(parameters[1], hits).values(CPU):
        home.begins("read", "3")
        home.begins("read", "0")

    assert set(home.labels()) == {"1", "3", "0"}


def test_in_backward_they_are_read_ahead_in_the_other_direction():
    """Where the last of three is worked on in backward, the two before it are being read."""
    home = watched(pages=0)
    hits = parameters_of(home.tiles(3))
    source = ParkedSource(hits[2], hits)
    source.resume()

    with layer_call(), source.values(CPU):
        home.begins("read", "1")
        home.begins("read", "0")

    assert set(home.labels()) == {"0", "1", "2"}
