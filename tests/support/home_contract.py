"""What every home promises, as tests to inherit."""

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final

import pytest
import torch
from home_probes import (
    in_threads,
    known_allocation,
    random_values,
    read_whole,
    same,
    write_whole,
)

from memtile.errors import ArgumentError, HomeError
from memtile.homes import (
    PAGE,
    Home,
    Traffic,
    aligned_buffer,
    allocate_copy,
    allocation_of,
    register,
)

_DTYPES: Final = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
# A scalar, nothing, ragged, a page exactly, a byte beyond most dtypes' pages, many pages.
_SHAPES: Final = ((), (0,), (3, 0, 2), (1,), (7, 13), (1024,), (4097,), (129, 257))


class HomeContract(ABC):
    """Tests that a home keeps its promises: inherit it in a test file and give `make_home`.

    Example:
        ```python
        class TestMyHome(HomeContract):
            def make_home(self) -> Home:
                return MyHome()
        ```
    """

    @abstractmethod
    def make_home(self) -> Home:
        """A new, open, empty home, with room for 64 MiB at least."""

    def test_every_dtype_and_shape_comes_back_as_it_was_parked(self) -> None:
        """Values of any dtype and shape, without elements too, are bit for bit what was given."""
        with self.make_home() as home:
            for dtype, shape in _kinds():
                values = random_values(shape, dtype)

                parked = allocate_copy(home, values)

                assert (parked.dtype, parked.shape) == (dtype, values.shape)
                assert same(parked, values), (dtype, shape)

    def test_a_tensor_owns_a_storage_of_exactly_its_bytes(self) -> None:
        """torch.save writes a tensor's whole storage: it is no byte longer than the tensor."""
        with self.make_home() as home:
            for dtype, shape in _kinds():
                allocation = home.allocate(shape, dtype)
                tensor = allocation.tensor()

                assert tensor.untyped_storage().nbytes() == allocation.nbytes, (dtype, shape)
                assert tensor.storage_offset() == 0
                assert tensor.is_contiguous()

    def test_an_allocation_tells_its_sizes(self) -> None:
        """`nbytes` is the tensor's size, `room` the same in whole pages, with no page too many."""
        with self.make_home() as home:
            for dtype, shape in _kinds():
                allocation = home.allocate(shape, dtype)

                assert allocation.nbytes == torch.Size(shape).numel() * dtype.itemsize
                assert allocation.room % PAGE == 0
                assert 0 <= allocation.room - allocation.nbytes < PAGE
                assert allocation.home is home

    def test_each_call_gives_a_new_tensor_over_the_same_bytes(self) -> None:
        """Two tensors of an allocation are two objects at its address with the same values."""
        with self.make_home() as home:
            allocation = home.allocate((5, 7), torch.float32)
            first, second = allocation.tensor(), allocation.tensor()

            first.fill_(3)

            assert first is not second
            assert first.data_ptr() == second.data_ptr() == allocation.address
            assert bool((second == 3).all())

    def test_a_tensor_may_become_a_parameter_that_trains(self) -> None:
        """A tensor is a leaf of its own, also one that was made in inference mode."""
        with self.make_home() as home:
            with torch.inference_mode():
                made = home.allocate((3, 5), torch.float32).tensor()
            parameter = torch.nn.Parameter(made)
            with torch.no_grad():
                parameter.fill_(2)

            (parameter * parameter).sum().backward()

            assert parameter.grad is not None
            assert bool((parameter.grad == 4).all())

    def test_read_sees_what_a_tensor_wrote(self) -> None:
        """Values written through a tensor are what `read` gives, the first time and later."""
        with self.make_home() as home:
            allocation = home.allocate((129, 257), torch.float32)
            tensor = allocation.tensor()
            for seed in range(3):
                tensor.copy_(random_values((129, 257), torch.float32, seed))

                assert same(read_whole(allocation), tensor)

    def test_a_tensor_sees_what_write_wrote(self) -> None:
        """Bytes written past a tensor are its values at once, whether it was read before or not."""
        with self.make_home() as home:
            allocation = home.allocate((129, 257), torch.float32)
            tensor = allocation.tensor()
            for seed in range(3):
                values = random_values((129, 257), torch.float32, seed)

                write_whole(allocation, values)

                assert same(tensor, values)
                assert same(allocation.tensor(), values)

    def test_pieces_are_read_and_written_where_they_belong(self) -> None:
        """A piece at `start` is that part of the room, and its neighbours are left alone."""
        with self.make_home() as home:
            allocation = home.allocate((3 * PAGE + 5,), torch.uint8)
            values = random_values((3 * PAGE + 5,), torch.uint8)
            write_whole(allocation, values)
            middle = aligned_buffer(PAGE)

            allocation.write(middle.fill_(7), PAGE)
            allocation.read(last := aligned_buffer(2 * PAGE), 2 * PAGE)

            values[PAGE : 2 * PAGE] = 7
            assert same(allocation.tensor(), values)
            assert same(last[: PAGE + 5], values[2 * PAGE :])

    def test_pieces_that_do_not_fit_are_refused(self) -> None:
        """A piece past the room, off a page, of another dtype or rank raises ArgumentError."""
        with self.make_home() as home:
            allocation = home.allocate((2 * PAGE,), torch.uint8)
            buffer = aligned_buffer(3 * PAGE)
            one = buffer[:PAGE]
            for piece, start in (
                (buffer, 0),
                (one, 2 * PAGE),
                (one, -PAGE),
                (one, 1),
                (buffer[1 : PAGE + 1], 0),
                (buffer[:7], 0),
                (one.view(torch.int32), 0),
                (one.view(2, -1), 0),
            ):
                with pytest.raises(ArgumentError):
                    allocation.read(piece, start)
                with pytest.raises(ArgumentError):
                    allocation.write(piece, start)

    def test_a_room_is_not_used_again_while_a_tensor_lies_over_it(self) -> None:
        """A view that outlives its allocation keeps its values, however much is parked after it."""
        with self.make_home() as home:
            # Not by allocate_copy: views keep registered tensors, and these their allocations.
            tensors = [home.allocate((1000,), torch.float32).tensor().fill_(n) for n in range(8)]
            views = [tensor.view(-1)[1:] for tensor in tensors]
            del tensors
            gc.collect()

            others = [allocate_copy(home, torch.full((1000,), -1.0)) for _ in range(32)]

            assert all(bool((view == n).all()) for n, view in enumerate(views))
            assert all(bool((other == -1).all()) for other in others)

    def test_a_room_is_not_used_again_while_its_allocation_is_alive(self) -> None:
        """An allocation keeps its bytes when all its tensors are gone, and makes new ones."""
        with self.make_home() as home:
            allocations = [home.allocate((1000,), torch.float32) for _ in range(8)]
            for number, allocation in enumerate(allocations):
                allocation.tensor().fill_(number)
            gc.collect()

            others = [allocate_copy(home, torch.full((1000,), -1.0)) for _ in range(32)]

            assert all(bool((b.tensor() == n).all()) for n, b in enumerate(allocations))
            assert all(bool((other == -1).all()) for other in others)

    def test_parking_and_dropping_can_go_on(self) -> None:
        """What is parked and dropped over and over keeps its values while it is there."""
        with self.make_home() as home:
            for number in range(24):
                parked = allocate_copy(home, torch.full((1 << 18,), number, dtype=torch.int32))

                assert int(parked[0]) == int(parked[-1]) == number
                del parked

    def test_evict_keeps_the_contents(self) -> None:
        """What was written through a tensor, or past it, is there after `evict`."""
        with self.make_home() as home:
            values = random_values((129, 257), torch.float32)
            allocation = home.allocate((129, 257), torch.float32)
            tensor = allocation.tensor()
            tensor.copy_(values)

            allocation.evict()

            assert same(tensor, values)
            write_whole(allocation, values + 1)
            allocation.evict()
            allocation.evict()
            assert same(read_whole(allocation), values + 1)
            assert same(tensor, values + 1)

    def test_held_room_is_there(self) -> None:
        """Allocations of the rooms that were held fit, and others may be made beside them."""
        with self.make_home() as home:
            held = home.hold([PAGE, 3 * PAGE, PAGE])
            others = [home.allocate((PAGE,), torch.uint8) for _ in range(4)]

            with held.used_by_this_thread():
                allocations = [
                    home.allocate((size,), torch.uint8) for size in (PAGE, PAGE, 3 * PAGE)
                ]
            del held

            assert len({allocation.address for allocation in [*others, *allocations]}) == 7

    def test_any_number_of_threads_may_read(self) -> None:
        """Reads of several threads, and writes to other allocations meanwhile, do not meet."""
        with self.make_home() as home:
            values = [random_values((50_000,), torch.float32, seed) for seed in range(4)]
            parked = [allocate_copy(home, value) for value in values]
            wrong: list[int] = []

            def work(number: int) -> None:
                allocation = known_allocation(parked[number])
                for turn in range(8):
                    if not same(read_whole(allocation), values[number]):
                        wrong.append(number)
                    if turn % 2:
                        write_whole(allocation, values[number])

            in_threads(work, 4)

            assert not wrong

    def test_any_number_of_threads_may_park_and_drop(self) -> None:
        """Allocations taken at the same time never overlap."""
        with self.make_home() as home:
            wrong: list[int] = []

            def work(number: int) -> None:
                for turn in range(40):
                    kept = [
                        allocate_copy(home, torch.full((1500,), number))
                        for _ in range(1 + turn % 3)
                    ]
                    if not all(bool((tensor == number).all()) for tensor in kept):
                        wrong.append(number)

            in_threads(work, 4)

            assert not wrong

    def test_traffic_counts_what_read_and_write_moved(self) -> None:
        """Traffic grows by the bytes of each piece; using tensors adds nothing to it."""
        with self.make_home() as home:
            allocation = home.allocate((2 * PAGE,), torch.uint8)
            piece = aligned_buffer(PAGE)
            allocation.tensor().zero_()
            before = home.traffic

            allocation.write(piece, PAGE)
            allocation.read(piece)
            allocation.read(piece)

            assert before == Traffic(0, 0)
            assert home.traffic == Traffic(read_bytes=2 * PAGE, written_bytes=PAGE)

    def test_a_label_can_be_set(self) -> None:
        """An allocation has no label at first, and the one that it is given then."""
        with self.make_home() as home:
            allocation = home.allocate((1,), torch.float32)
            assert allocation.label is None

            allocation.label = "layers.0.weight"

            assert allocation.label == "layers.0.weight"

    def test_a_closed_home_refuses(self) -> None:
        """Once closed, `allocate`, `hold`, `read` and `write` raise HomeError."""
        home = self.make_home()
        allocation, piece = home.allocate((PAGE,), torch.uint8), aligned_buffer(PAGE)

        home.close()

        with pytest.raises(HomeError):
            home.allocate((1,), torch.float32)
        with pytest.raises(HomeError):
            home.hold([PAGE])
        with pytest.raises(HomeError):
            allocation.read(piece)
        with pytest.raises(HomeError):
            allocation.write(piece)

    def test_close_is_idempotent(self) -> None:
        """Closing twice, and closing inside the block that closes too, is closing once."""
        with self.make_home() as home:
            home.close()
            home.close()

            assert home.closed

    def test_tensors_outlive_their_home(self) -> None:
        """A tensor can be read and written after its home was closed and dropped."""
        home = self.make_home()
        values = random_values((129, 257), torch.float32)
        parked = allocate_copy(home, values)
        home.close()
        del home
        gc.collect()

        assert same(parked, values)
        parked.add_(1)
        assert same(parked, values + 1)

    def test_a_tensor_is_found_in_its_allocation_only_while_it_lies_there(self) -> None:
        """A parameter that was registered is known until its data is moved away."""
        with self.make_home() as home:
            parked = allocate_copy(home, torch.arange(6.0).view(2, 3))
            parameter = torch.nn.Parameter(parked)
            register(parameter, known_allocation(parked))
            assert allocation_of(parameter) is allocation_of(parked)

            parameter.data = torch.zeros(2, 3)

            assert allocation_of(parameter) is None
            assert allocation_of(parked) is not None


def _kinds() -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
    return ((dtype, shape) for dtype in _DTYPES for shape in _SHAPES)
