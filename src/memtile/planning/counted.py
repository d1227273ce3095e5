"""What was counted of a model and of one step of it: the planner's whole knowledge of tensors."""

from dataclasses import dataclass

from memtile.errors import ArgumentError


@dataclass(frozen=True)
class Products:
    """The matrix products of a step.

    Args:
        shapes: (rows, depth, columns) of each different one in float32, in the step's order.
        kinds_16: different ones in 16 bits; the library compiles a kernel for each.
    """

    shapes: tuple[tuple[int, int, int], ...]
    kinds_16: int

    @property
    def widest(self) -> tuple[int, int, int] | None:
        """The shape with most columns, of those the deepest."""
        return max(self.shapes, key=lambda shape: shape[::-1], default=None)

    def at_least(self, other: "Products") -> "Products":
        """Those of both."""
        shapes = tuple(dict.fromkeys((*self.shapes, *other.shapes)))
        return Products(shapes, max(self.kinds_16, other.kinds_16))


@dataclass(frozen=True)
class Counted:
    """One step, counted with shapes alone.

    Args:
        forward_bytes: of what was made in forward and is held at the peak.
        backward_bytes: of what was made in backward and is held at the peak.
        kept_bytes: held at the end of forward, for backward.
        flops: of all matrix products.
        touched_bytes: read and written by everything else.
        products: what the products are.
        workspace_bytes: what their library keeps for those in float32.
    """

    forward_bytes: int
    backward_bytes: int
    kept_bytes: int
    flops: int
    touched_bytes: int
    products: Products
    workspace_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return self.forward_bytes + self.backward_bytes

    def at_least(self, other: "Counted") -> "Counted":
        """The larger of each."""
        return Counted(
            max(self.forward_bytes, other.forward_bytes),
            max(self.backward_bytes, other.backward_bytes),
            max(self.kept_bytes, other.kept_bytes),
            max(self.flops, other.flops),
            max(self.touched_bytes, other.touched_bytes),
            self.products.at_least(other.products),
            max(self.workspace_bytes, other.workspace_bytes),
        )


@dataclass(frozen=True)
class Weight:
    """A linear's or an embedding's weight, with all that share it.

    Args:
        names: the modules that have it, in the model's order.
        shape: (rows, columns).
        dtype: such as "float32".
        element_bytes: of one value.
        trainable: whether it gets gradients.
        is_looked_up: whether an embedding is among the modules.
        rows_only: whether only rows can be cut.
        obstacle: why it cannot be tiled; "" where it can.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    dtype: str
    element_bytes: int
    trainable: bool
    is_looked_up: bool
    rows_only: bool
    obstacle: str

    @property
    def elements(self) -> int:
        """Values."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.elements * self.element_bytes

    @property
    def is_tied(self) -> bool:
        """Whether several modules share it."""
        return len(self.names) > 1


@dataclass(frozen=True)
class Rest:
    """Parameters that are no linear's or embedding's weight, and buffers.

    Args:
        nbytes: of the parameters.
        trainable: how many bytes an element has → how many elements are trained.
        buffer_bytes: of the buffers.
        tensors: how many parameters there are.
    """

    nbytes: int
    trainable: tuple[tuple[int, int], ...]
    buffer_bytes: int
    tensors: int


@dataclass(frozen=True)
class State:
    """What an optimizer keeps of one element.

    Args:
        entries: for each number of bytes that an element of a weight has, those of each tensor that
            is kept beside it: moments, and the master where there is one.
        temporary_bytes: what stepping some rows takes for the moment.
    """

    entries: tuple[tuple[int, tuple[int, ...]], ...]
    temporary_bytes: int

    def of(self, element_bytes: int) -> tuple[int, ...]:
        """Bytes of each tensor that is kept, for an element of so many bytes."""
        return dict(self.entries)[element_bytes]


def check_tokens(tokens: object, batch: object) -> None:
    """Refuse what is no number of tokens.

    Raises:
        ArgumentError: it is none, or the batch does not divide it.
    """
    for name, value, example in (("tokens", tokens, 512), ("batch", batch, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(
                f"{name}={value!r} must be a whole number of at least 1, such as {name}={example}"
            )
    assert isinstance(tokens, int)
    assert isinstance(batch, int)
    if tokens % batch:
        raise ArgumentError(
            f"tokens={tokens} are not a whole number of sequences for batch={batch}: tokens are "
            "those of the whole step, batch times length"
        )
