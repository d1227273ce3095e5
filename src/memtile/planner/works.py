"""What a step's forward is, where the user does not say it."""

import torch
from torch import Tensor, nn

from memtile.convert import Work, integrations, kind_of
from memtile.errors import ArgumentError


def work_for(model: nn.Module, tokens: int, batch: int, trains: bool) -> Work:
    """The forward that an integration knows, or one of what the first layer takes.

    Raises:
        ArgumentError: nobody knows what this model takes.
    """
    for integration in integrations():
        work = integration.work(model, tokens, batch, trains)
        if work is not None:
            return work
    first = next((module for module in model.modules() if kind_of(module) is not None), None)
    kind = None if first is None else kind_of(first)
    if first is None or kind is None:
        raise ArgumentError(
            f"it is not known what {type(model).__name__} takes: give work=…, a function that is "
            "called with the model and gives the loss of one step"
        )
    rows, columns = kind.shape(first)
    shape = (batch, tokens // batch)

    def forward(twin: nn.Module) -> Tensor | None:
        ids = torch.arange(tokens).view(shape) % rows
        x = ids if kind.rows_only else torch.empty(*shape, columns, device="meta")
        result: Tensor = twin(x)
        return result.float().square().mean() if trains else None

    return forward
