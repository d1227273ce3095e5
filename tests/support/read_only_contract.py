"""What a read-only home promises, as tests to inherit."""

import gc
from abc import ABC, abstractmethod
from typing import Final

import pytest
import torch
from home_probes import in_threads, random_values, read_whole, same
from torch import Tensor

from memtile.errors import ArgumentError, HomeError
from memtile.homes import PAGE, Allocation, Traffic, aligned_buffer, allocation_of, register

_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8)
# A scalar, ragged, a page exactly, a byte beyond most dtypes' pages, many pages.
_SHAPES: Final = ((), (1,), (7, 13), (1024,), (4097,), (129, 257))


class ReadOnlyHomeContract(ABC):
    """Tests that a read-only home keeps its promises: inherit it and give `make_allocations`."""

    @abstractmethod
    def make_allocations(self, tensors: list[Tensor]) -> list[Allocation]:
        """Allocations of one new home, over tensors that lie there already, one after the other."""

    def _one(self, shape: tuple[int, ...] = (129, 257)) -> tuple[Allocation, Tensor]:
        values = random_values(shape, torch.float32)
        return self.make_allocations([values])[0], values

    def test_every_dtype_and_shape_is_read_as_it_lies_there(self) -> None:
        """Both ways to the bytes give the values, and the sizes are right."""
        tensors = [random_values(shape, dtype) for dtype in _DTYPES for shape in _SHAPES]

        for allocation, values in zip(self.make_allocations(tensors), tensors, strict=True):
            assert same(read_whole(allocation), values)
            assert same(allocation.tensor(), values)
            assert (
                allocation.tensor().untyped_storage().nbytes() == allocation.nbytes == values.nbytes
            )
            assert allocation.room % PAGE == 0
            assert 0 <= allocation.room - allocation.nbytes < 2 * PAGE  # at both ends
            assert allocation.room % PAGE == 0

    def test_the_home_says_that_it_is_read_only(self) -> None:
        """`allocate`, `hold` and `write` raise HomeError, which names the way out."""
        allocation, _ = self._one()

        assert allocation.home.is_read_only
        with pytest.raises(HomeError):
            allocation.home.allocate((1,), torch.float32)
        with pytest.raises(HomeError):
            allocation.home.hold([])
        with pytest.raises(HomeError):
            allocation.write(aligned_buffer(PAGE))

    def test_pieces_are_read_where_they_belong(self) -> None:
        """A piece at `start` is that part of the room."""
        values = random_values((3 * PAGE + 5,), torch.uint8)
        (allocation,) = self.make_allocations([values])

        allocation.read(last := aligned_buffer(2 * PAGE), 2 * PAGE)

        assert same(last[: PAGE + 5], values[2 * PAGE :])

    def test_pieces_that_do_not_fit_are_refused(self) -> None:
        """A piece past the room, off a page, of another dtype or rank raises ArgumentError."""
        (allocation,) = self.make_allocations([random_values((2 * PAGE,), torch.uint8)])
        buffer = aligned_buffer(allocation.room + PAGE)
        one = buffer[:PAGE]
        for piece, start in (
            (buffer, 0),
            (one, allocation.room),
            (one, -PAGE),
            (one, 1),
            (buffer[1 : PAGE + 1], 0),
            (one.view(torch.int32), 0),
        ):
            with pytest.raises(ArgumentError):
                allocation.read(piece, start)

    def test_what_is_written_through_a_tensor_is_read(self) -> None:
        """A write to a page, through `.data` too, is seen both ways; other pages are as before."""
        allocation, values = self._one()
        tensor = allocation.tensor()

        for row in (0, 77, 128):
            tensor.data[row].add_(1)
            values[row].add_(1)

            assert same(read_whole(allocation), values)
            assert same(allocation.tensor(), values)

    def test_evict_keeps_what_was_written(self) -> None:
        """Pages that were written to stay, and the others come back as they were."""
        allocation, values = self._one()
        allocation.tensor()[64:66].fill_(3)
        values[64:66].fill_(3)

        allocation.evict()
        allocation.evict()

        assert same(allocation.tensor(), values)
        assert same(read_whole(allocation), values)

    def test_neighbours_do_not_see_each_other(self) -> None:
        """A write to one tensor, on a page that it shares with another, leaves the other alone."""
        tensors = [random_values((100,), torch.float32, seed) for seed in range(3)]
        allocations = self.make_allocations(tensors)

        allocations[1].tensor().fill_(-1)
        for allocation in allocations:
            allocation.evict()

        assert same(read_whole(allocations[0]), tensors[0])
        assert bool((read_whole(allocations[1]) == -1).all())
        assert same(read_whole(allocations[2]), tensors[2])

    def test_any_number_of_threads_may_read(self) -> None:
        """Reads of several threads do not meet."""
        tensors = [random_values((50_000,), torch.float32, seed) for seed in range(4)]
        allocations, wrong = self.make_allocations(tensors), list[int]()

        def work(number: int) -> None:
            for _ in range(8):
                if not same(read_whole(allocations[number]), tensors[number]):
                    wrong.append(number)

        in_threads(work, 4)

        assert not wrong

    def test_traffic_counts_what_read_moved(self) -> None:
        """Traffic grows by the bytes of each piece; using tensors adds nothing to it."""
        allocation, _ = self._one()
        allocation.tensor().sum()

        allocation.read(aligned_buffer(PAGE), PAGE)

        assert allocation.home.traffic == Traffic(read_bytes=PAGE, written_bytes=0)

    def test_a_closed_home_refuses_and_tensors_outlive_it(self) -> None:
        """Once closed, `read` raises HomeError; a tensor stays memory that can be used."""
        allocation, values = self._one()
        tensor = allocation.tensor()

        allocation.home.close()

        with pytest.raises(HomeError):
            allocation.read(aligned_buffer(PAGE))
        del allocation
        gc.collect()
        assert same(tensor, values)
        assert same(tensor.add_(1), values + 1)

    def test_a_tensor_is_found_in_its_allocation_only_while_it_lies_there(self) -> None:
        """A parameter that was registered is known until its data is moved away."""
        allocation, _ = self._one()
        parameter = torch.nn.Parameter(allocation.tensor())
        register(parameter, allocation)
        assert allocation_of(parameter) is allocation
        assert parameter.data_ptr() == allocation.address

        parameter.data = torch.zeros(2, 3)

        assert allocation_of(parameter) is None
