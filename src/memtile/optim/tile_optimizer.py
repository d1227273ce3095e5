"""`TileOptimizer`: any element-wise torch optimizer, for parameters that live in homes."""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memtile.errors import OptimizerError
from memtile.homes import Allocation, Reservation
from memtile.optim.backward_hooks import Hooked, hook, remove
from memtile.optim.checks import (
    IdleMode,
    StepMode,
    check_arguments,
    check_dtypes,
    check_in_memory,
    check_parameters,
    check_still_of,
    refuse_copy,
    refuse_scaler,
    refusing_parameters,
)
from memtile.optim.clipping import clip_gradients, torch_clipping_check
from memtile.optim.dense_state import (
    ParamGroup,
    load_dense_state,
    through_hooks,
    to_dense_state,
    with_groups,
)
from memtile.optim.idle import IdleSteps
from memtile.optim.interrupts import uninterrupted, uninterrupted_backward
from memtile.optim.kept_experts import KeptExperts
from memtile.optim.slice_optimizer import SliceOptimizer
from memtile.optim.state_layout import StateLayout
from memtile.optim.stepping import Stepper
from memtile.transfer import catch_up, rings_of


class TileOptimizer(Optimizer):
    """A torch optimizer for a model whose tiles may live in homes.

    It is a `torch.optim.Optimizer`: parameter groups, schedulers, `zero_grad`, `state_dict` work.
    Each parameter is stepped by itself, and its moments live in the home of its tile. Room for
    moments and gradients is held there until the optimizer is dropped. Ctrl-C waits until a step
    is whole. After an I/O error in `step`, calling it again goes on with what was not stepped.

    A gradient that is not finite is never applied. Gradients in memory are all checked before the
    first parameter is stepped; that of a parked tile just before it is applied, when tiles before
    it have been stepped. `clip_grad_norm_(…, error_if_nonfinite=True)` checks all of them first.

    In "in_backward" mode every parameter is stepped as soon as its gradient is complete, and the
    gradient is dropped, so gradients take no memory. Call `step()` once after each backward; a
    second backward before it is refused, and so are clipping, by `torch.nn.utils` too, and a
    `torch.amp.GradScaler`, at its first `step`, which its scaled gradients precede. An exception
    in such a backward, `NotFiniteError` included, leaves some parameters stepped.

    Tiles of experts that saw no token have no gradient. With idle="replay" they end up as in the
    dense model, where their gradient is zero and AdamW still moves them: parked ones stay at home,
    and the steps that they miss are applied when they are next brought in, or read or saved by
    memtile. Call `catch_up()` before other code reads or writes their memory or state.

    Copying and pickling are refused: `state_dict()` and `memtile.save_training` keep its state.

    Args:
        model: whose parameters are optimized.
        optimizer_class: an element-wise `torch.optim.Optimizer` class; others are refused.
        mode: "classic" or "in_backward".
        params: parameters or groups of them, as torch optimizers take them; all by default.
        masters: step 16-bit parameters in float32, kept beside the moments; False: in 16 bits.
        idle: what steps do to experts without a gradient: "replay" as dense, "skip" nothing.
        **options: go to `optimizer_class`.

    Raises:
        ArgumentError: `model` is no module, or `mode` or `idle` is neither of the two.
        OptimizerError: the class is not element-wise, or does not take the options.
        HomeFullError: a home has no room for moments, masters and gradients.

    Examples:
        >>> model = memtile.tile(model, max_tile_bytes=64 << 10, home="disk")
        >>> optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, lr=1e-3)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: type[Optimizer],
        *,
        mode: StepMode = "classic",
        params: Iterable[Any] | None = None,
        masters: bool = True,
        idle: IdleMode = "replay",
        **options: Any,  # whatever optimizer_class takes
    ) -> None:
        check_arguments(model, mode, idle)
        self.mode: StepMode = mode
        self.idle: IdleMode = idle
        self._model = model
        self._inner = SliceOptimizer(optimizer_class, options)
        self._held: list[Reservation] = []
        self._dtypes: dict[Tensor, torch.dtype] = {}  # that state and room are of
        self._stepped: set[nn.Parameter] = set()
        self._unfinished: list[tuple[nn.Parameter, ParamGroup]] | None = None
        self._group_of: dict[nn.Parameter, ParamGroup] = {}
        self._hooks: list[Hooked] = []
        given = model.parameters() if params is None else params
        with refusing_parameters():
            super().__init__(given, self._inner.defaults)
        check_parameters(model, list(self._all()))
        self._layout = StateLayout(self._inner, self.state, masters)
        self._stepper = Stepper(self._layout, model)
        self._idle = IdleSteps(self._stepper)
        self._kept = KeptExperts(self._stepper, keeps_gradients=mode == "classic")
        self._id = id(self)  # another one's in Lightning's wrapper, a copy of `__dict__`
        self._take_in(self.param_groups)
        if mode == "in_backward":
            torch_clipping_check.add(self)
        weakref.finalize(self, remove, self._hooks).atexit = False

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add parameters with options of their own, as torch optimizers do.

        Raises:
            OptimizerError: they are not of the model, have no values, or are in another group.
            HomeFullError: a home has no room for what they need. Nothing was added then.
        """
        with refusing_parameters():
            super().add_param_group(param_group)
        if not hasattr(self, "_stepper"):  # the constructor reserves for all groups at once
            return
        added = self.param_groups[-1]
        try:
            check_parameters(self._model, added["params"])
            self._take_in([added])
        except BaseException:
            self.param_groups.pop()
            raise

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler's `step` reads first; False: the scaler unscales gradients itself."""
        if self.mode == "in_backward":
            refuse_scaler()
        return False

    def _take_in(self, groups: Sequence[ParamGroup]) -> None:
        parameters = [parameter for parameter, _ in with_groups(groups)]
        catch_up(parameters)  # with what another optimizer has put off
        self._reserve(groups)
        if self.idle == "replay":
            self._idle.add(self._model, groups)
        self._kept.add(self._model, parameters)
        if self.mode == "in_backward":
            self._hooks += hook(parameters, weakref.WeakMethod(self._step_now))

    def _reserve(self, groups: Iterable[ParamGroup]) -> None:
        """Hold room in each home for state and gradients, while this optimizer lives."""
        places = Counter(p for _, p in self._model.named_parameters(remove_duplicate=False))
        needed = [
            # in backward only ties need room for a gradient: they are summed in the home
            (parameter, group, self.mode == "classic" or places[parameter] > 1)
            for parameter, group in with_groups(groups)
        ]
        self._held += self._layout.hold_rooms(needed)
        self._dtypes |= {parameter: parameter.dtype for parameter, *_ in needed}

    def _all(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter, _ in with_groups(self.param_groups))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; an unfinished step or backward is given up."""
        self._stepped.clear()
        self._unfinished = None
        self._idle.give_up()
        super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; in backward mode, those not stepped yet.

        Raises:
            OptimizerError: the model was tiled, untiled or cast since.
            NotFiniteError: a gradient holds NaN or infinity.
            HomeIOError: a tile could not be read or written. Call `step()` again to go on with the
                parameters that were not stepped, or `zero_grad()` to give them up.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        check_still_of(self._model, self._all())
        check_dtypes(self._model, self._dtypes)
        with uninterrupted():
            self._step_all()
        return loss

    def _step_all(self) -> None:
        homes = {held.home for held in self._held}
        rings = [rings_of(each) for each in homes if not (each.works_in_place or each.closed)]
        for each in rings:
            if self._idle:
                each.flush()  # what was replayed in a forward without a backward
            each.clear()
        for parameter in self._stepped:
            parameter.grad = None  # part of one, from a second backward that was refused
        if self._unfinished is None:
            self._unfinished = self._begin()
        todo = self._unfinished
        while todo:
            parameter, group = todo[0]
            ahead = (self._stepper.allocations(later) for later, _ in todo[1:])
            self._step_one(parameter, group, filter(None, ahead))
            del todo[0]
            if self.mode == "in_backward":
                parameter.grad = None
        for each in rings:
            each.steps.flush()
            each.clear()
        self._idle.end()
        self._stepped.clear()
        self._unfinished = None
        self._kept.move()

    def _begin(self) -> list[tuple[nn.Parameter, ParamGroup]]:
        """What is to be stepped now, with the group that it is in."""
        waiting = [
            (parameter, group)
            for parameter, group in with_groups(self.param_groups)
            if parameter.grad is not None
        ]
        check_in_memory(self._model, (parameter for parameter, _ in waiting))
        if not self._idle:
            return waiting
        stepped = ((parameter, self._group_of[parameter]) for parameter in self._stepped)
        return waiting + self._idle.begin([*stepped, *waiting])

    def _step_one(
        self,
        parameter: nn.Parameter,
        group: ParamGroup,
        ahead: Iterable[Sequence[Allocation]] | None,
        in_backward: bool = False,
    ) -> None:
        if parameter in self._idle:
            ahead = () if in_backward else ahead  # no order of experts repeats
            owed = self._idle.owed(parameter)
            self._stepper.step(parameter, group, ahead, in_backward, owed)
            self._idle.paid(parameter)
        else:
            self._stepper.step(parameter, group, ahead, in_backward)
        if parameter.grad is not None:
            self._kept.note(parameter)

    def _step_now(self, parameter: nn.Parameter) -> None:
        """Step a parameter whose gradient is complete, in the backward that made it."""
        if parameter in self._stepped:
            parameter.grad = None
            raise OptimizerError(
                "a second backward came before step(): in mode='in_backward' a parameter is "
                "stepped by its first one and cannot accumulate; call step() after each "
                "backward, or use mode='classic'"
            )
        uninterrupted_backward()
        if not self._stepped:
            check_dtypes(self._model, self._dtypes)
            self._group_of = dict(with_groups(self.param_groups))
        self._step_one(parameter, self._group_of[parameter], None, in_backward=True)
        self._stepped.add(parameter)

    def catch_up(self) -> None:
        """Apply the steps that experts without a gradient have put off: each tile is read once.

        What memtile reads or saves is caught up without this; needed before other code reads or
        writes parameters or `state`.

        Raises:
            HomeIOError: a tile could not be read or written; call it again to go on.
        """
        self._idle.catch_up(list(self._all()))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:  # of copy and pickle; torch's type
        """Refused with OptimizerError: torch's copy would be without what steps the tiles."""
        refuse_copy()

    def __del__(self) -> None:
        is_whole = getattr(self, "_id", None) == id(self)  # its constructor did not fail
        if is_whole and not sys.is_finalizing():
            self._kept.end()
            self._idle.outlive_optimizer()

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scale all gradients so that their norm is at most `max_norm`, tile by tile.

        `torch.nn.utils.clip_grad_norm_` does the same, through the mapped memory.

        Returns:
            The norm before, a scalar.

        Raises:
            ArgumentError: `max_norm` or `norm_type` is no such number.
            OptimizerError: in backward mode, where there are no gradients to clip.
            OptimizerError: with `error_if_nonfinite`, the norm is not finite; nothing was scaled.
        """
        if self.mode == "in_backward":
            raise OptimizerError(
                "clip_grad_norm_ needs all gradients at once, and in mode='in_backward' each is "
                "dropped as soon as its parameter is stepped; use mode='classic'"
            )
        with uninterrupted():
            return clip_gradients(list(self._all()), max_norm, norm_type, error_if_nonfinite)

    def state_dict(self) -> dict[str, Any]:
        """The state as the plain optimizer over the dense model would give it.

        Moments of tiles are joined in the home of the tiles, in new room that is freed with the
        dictionary. Hooks run as with torch's own optimizers, and see the dense state.

        Raises:
            OptimizerError: some tiles of a weight are in a group and some are not.
            HomeFullError: there is no room.
        """
        self.catch_up()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = to_dense_state(self._model, self.state, self.param_groups)
        return through_hooks(self._optimizer_state_dict_post_hooks, self, state_dict)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a plain optimizer over the dense model, or of this class.

        Hooks run as with torch's own optimizers, and see the dense state.

        Raises:
            OptimizerError: it is of another model; nothing was changed.
        """
        self.catch_up()
        state_dict = state_dict.copy()  # torch's hooks may change theirs
        state_dict = through_hooks(self._optimizer_load_state_dict_pre_hooks, self, state_dict)
        load_dense_state(self, self._model, state_dict, self._layout.stepped_dtype)
        for parameter, group in with_groups(self.param_groups):
            if parameter in self.state:
                self._layout.drop_unused_master(parameter, group)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
