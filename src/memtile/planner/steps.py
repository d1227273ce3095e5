"""One step of a model that is tiled as a layout says, counted on a twin that holds nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from memtile.convert import Choice, Work, set_checkpointing
from memtile.errors import CannotTileError, MemtileError
from memtile.planner.counting import count_step
from memtile.planner.twins import meta_twin, park_twin
from memtile.planning import Products
from memtile.planning.model_records import Counted, ParkedLayout


class StepCount:
    """Counts a step of a layout, on a twin of the model that holds nothing.

    Args:
        model: that the twins are of.
        choices: its linears and embeddings.
        work: the forward.
        trains: whether there is a backward.
        drops_gradients: gradients are let go of as soon as they are complete.
        goes_home: gradients of what is parked leave memory: they are not counted.
        watch: is given each twin before it runs.
        workspaces: what their library keeps for products; None: it is not asked.
    """

    def __init__(
        self,
        model: nn.Module,
        choices: Sequence[Choice],
        work: Work,
        *,
        trains: bool,
        drops_gradients: bool,
        goes_home: bool,
        watch: Callable[[nn.Module], None] | None = None,
        workspaces: Callable[[Products], int] | None = None,
    ) -> None:
        self._model, self._choices, self._work, self._watch = model, choices, work, watch
        self._trains, self._workspaces = trains, workspaces
        self._drops_gradients, self._goes_home = drops_gradients, goes_home

    def __call__(self, layout: ParkedLayout, checkpointing: bool) -> Counted:
        """The step of this layout.

        Raises:
            CannotTileError: the model's code asks for values.
        """
        twin, parked = meta_twin(self._model), _with_grids(self._choices, layout)
        twin.train(self._trains)
        if any(choice.tiled for choice in parked):
            park_twin(twin, parked)
        set_checkpointing(twin, checkpointing)
        if self._watch is not None:
            self._watch(twin)
        try:
            counted = count_step(
                twin,
                self._work,
                drops_gradients=self._drops_gradients,
                goes_home=self._goes_home,
            )
        except MemtileError:
            raise
        except Exception as error:  # the model's own code, which may do anything
            raise CannotTileError(
                f"a step of {type(self._model).__name__} cannot be counted with shapes alone "
                f"({type(error).__name__}: {error}); give work=…, a forward that needs no values, "
                "or tile it without a plan, with memtile.tile(model, max_tile_bytes=…, home=…)"
            ) from error
        if self._workspaces is None:
            return counted
        return replace(counted, workspace_bytes=self._workspaces(counted.products))


def _with_grids(choices: Sequence[Choice], layout: ParkedLayout) -> list[Choice]:
    grids = {name: layout.grid_of(weight) for weight in layout.weights for name in weight.names}
    return [
        replace(choice, tiled=grids[choice.name] is not None, grid=grids[choice.name])
        for choice in choices
    ]
