"""What a step of a transformers model is given: the inputs of its class's own forward, and labels.

Names come from the forward's signature, sizes from the config. Ids are real, as texts are: their
special tokens are in the places where the model looks for them. How many placeholders an image has
is what the model's own `get_image_features` gives of it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from memtile.convert import Work
from memtile.errors import ArgumentError
from memtile.integrations.pretrained import pretrained_models
from memtile.planner.operation_count import count_step
from memtile.planner.step_count import make_meta_copy

Inputs = dict[str, Any]  # tensors, and switches such as `use_cache`

# Pictures of an image (0: without an axis for them), and whether its size is given beside them:
# LLaVA, Mistral-3, Idefics-3, and LLaVA-Next, which cuts an image into several and adds the whole.
_FORMS: Final = ((0, False), (0, True), (1, False), *((pictures, True) for pictures in range(1, 7)))
_SIDE: Final = 448  # pixels of an image where the config names no size, as for Qwen2-VL
_MADE_HERE: Final = ("input_ids", "input_features", "input_values", "decoder_input_ids")
_TARGETS: Final = ("max_position_embeddings", "max_target_positions")
_SPECIAL: Final = ("_token_id", "_token_index", "_token_ids")


def step_work(model: Any, tokens: int, batch: int, trains: bool) -> Work | None:
    """One step of a transformers model: its loss, or its forward, with a cache where it writes.

    Args:
        model: with a `PreTrainedModel` in it that takes texts, images or sound; None for others.
        tokens: of the texts, over the batch. An encoder and its decoder read as many each; frames
            of audio count as tokens; images add their own.
        batch: sequences, images and recordings.
        trains: the loss is that of the class's head, else the mean of the first output.

    Raises:
        ArgumentError: a sequence is longer than the model reads at once, or it is not known in
            which form it takes images.
    """
    found = pretrained_models(model)
    if not found or not is_known(found[0]):
        return None
    step = StepInputs(found[0], tokens, batch)
    kept: list[Any] = []  # outputs: their cache stays in memory while text is generated

    def forward(meta_copy: Any) -> Tensor | None:
        inputs = step.inputs()
        if not trains:
            kept[:] = [meta_copy(**inputs, **step.writing())]
            return None
        outputs = meta_copy(**inputs, **step.learning(inputs))
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        return _first(outputs).float().mean() if loss is None else loss

    return forward


def text_work(model: Any, batch: int, read: int, written: int | None = None) -> Work:
    """The forward of `batch` sequences of `read` tokens, without images and with a cache.

    `written`: what the decoder of a model with an encoder has of each, if not as many.
    """
    step = StepInputs(pretrained_models(model)[0], batch * read, batch, with_images=False)
    step.written = written or read
    kept: list[Any] = []

    def forward(meta_copy: Any) -> None:
        kept[:] = [meta_copy(**step.inputs(), **step.writing())]

    return forward


def is_known(model: Any) -> bool:
    """Whether the forward of a `PreTrainedModel` takes something that can be made here."""
    takes = inspect.signature(model.forward).parameters
    return not takes.keys().isdisjoint({*_MADE_HERE, "pixel_values"})


class StepInputs:
    """Makes the inputs of a step of a `PreTrainedModel`; see `step_work`."""

    def __init__(self, model: Any, tokens: int, batch: int, *, with_images: bool = True) -> None:
        self.model, self.batch, self.length = model, batch, tokens // batch
        self.written = self.length  # tokens of each sequence of a decoder behind an encoder
        self.config: Any = model.config
        self.text: Any = self.config.get_text_config()
        self.takes = inspect.signature(model.forward).parameters
        ids = (getattr(self.config, name, None) for name in ("image_token_id", "image_token_index"))
        self.image_token = next((n for n in ids if isinstance(n, int)), None)
        self.images: Callable[[], Inputs] = dict
        self.image_tokens = 0  # of each sequence
        if "pixel_values" in self.takes and (with_images or "input_ids" not in self.takes):
            self._look_at_images()
        self._check_length()

    def inputs(self) -> Inputs:
        """All that the forward takes but labels."""
        made = self.images()
        for name in _MADE_HERE:
            if name in self.takes:
                made[name] = getattr(self, f"_{name}")()
        if self.image_tokens:
            is_image = (made["input_ids"] == self.image_token).long()
            kinds = ("mm_token_type_ids", "token_type_ids")
            made.update({name: is_image for name in kinds if name in self.takes})
        return made

    def writing(self) -> Inputs:
        """What a forward that generates is given besides."""
        wanted = {"use_cache": True, "logits_to_keep": 1} if self.model.can_generate() else {}
        return {name: value for name, value in wanted.items() if name in self.takes}

    def learning(self, inputs: Inputs) -> Inputs:
        """The labels of the model's head, and what else a training step is given."""
        made: Inputs = {"use_cache": False, "return_loss": True}
        made = {name: value for name, value in made.items() if name in self.takes}
        if "start_positions" in self.takes:
            middle = torch.full((self.batch,), self.length // 2)
            return {**made, "start_positions": middle, "end_positions": middle.clone()}
        labels = self._labels(inputs) if "labels" in self.takes else None
        return made if labels is None else {**made, "labels": labels}

    def _labels(self, inputs: Inputs) -> Tensor | None:
        """What this class's loss compares with; None where that is not known."""
        name, classes = type(self.model).__name__, int(getattr(self.config, "num_labels", 2))
        ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if ids is not None and (self.model.can_generate() or "MaskedLM" in name):
            return torch.clone(ids)
        if ids is not None and "TokenClassification" in name:
            return torch.remainder(inputs["input_ids"], classes)
        if self._has_choices:
            return torch.zeros(self.batch, dtype=torch.long)
        if not name.endswith("Classification"):
            return None
        if getattr(self.config, "problem_type", None) == "multi_label_classification":
            return torch.ones(self.batch, classes)
        return torch.ones(self.batch) if classes == 1 else torch.arange(self.batch) % classes

    @property
    def _has_choices(self) -> bool:
        """Whether each sequence is one of several, here of one, that the head chooses from."""
        return type(self.model).__name__.endswith("ForMultipleChoice")

    def _check_length(self) -> None:
        length = self.length + self.image_tokens
        is_audio = "input_ids" not in self.takes and "decoder_input_ids" not in self.takes
        found = [getattr(self.text, name, None) for name in _TARGETS]
        longest = next((n for n in found if isinstance(n, int) and n > 0), length)
        if length > longest and not is_audio:
            more = f", {self.image_tokens} of them an image's," if self.image_tokens else ""
            raise ArgumentError(
                f"tokens={self.length * self.batch} in batch={self.batch}: sequences of "
                f"{length}{more} and {type(self.model).__name__} reads {longest} at once; give "
                "fewer tokens or more batch"
            )

    def _input_ids(self) -> Tensor:
        """(batch, length) ids: an image's placeholders, then ids all over the vocabulary."""
        text = self._texts(self.length, self.text.vocab_size)
        if self._has_choices:
            return text.unsqueeze(1)
        if not self.image_tokens:
            return text
        assert self.image_token is not None
        image = torch.full((self.batch, self.image_tokens), self.image_token)
        return torch.cat([image, text], dim=1)

    def _decoder_input_ids(self) -> Tensor:
        return self._texts(self.written, self.config.get_text_config(decoder=True).vocab_size)

    def _texts(self, length: int, vocabulary: int) -> Tensor:
        """Texts that end with the config's end; no other special token is in them."""
        tokens = self.batch * length
        ids = torch.arange(tokens) * max(1, vocabulary // tokens) % vocabulary
        special = {number for number in _special(self.config) if number < vocabulary}
        plain = next((n for n in range(vocabulary) if n not in special), 0)
        ids[torch.isin(ids, torch.tensor([*special, -1]))] = plain
        ids = ids.view(self.batch, length)
        end = getattr(self.text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < vocabulary and length > 1:
            ids[:, -1] = end
        return ids

    def _input_features(self) -> Tensor:
        """Whisper's: two frames for each position of the encoder."""
        bins, positions = (self._of_config(n) for n in ("num_mel_bins", "max_source_positions"))
        return self._empty(self.batch, bins, 2 * positions)

    def _input_values(self) -> Tensor:
        """Samples that give a frame for each token, through the convolutions before the encoder."""
        samples = self.length
        kernels, strides = (self._of_config(name) for name in ("conv_kernel", "conv_stride"))
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return self._empty(self.batch, samples)

    def _empty(self, *shape: int) -> Tensor:
        """An input of which only the shape is needed; models may ask for its gradient."""
        return torch.empty(*shape, dtype=self.model.dtype, device="meta")

    def _of_config(self, name: str) -> Any:  # of whatever type the config has it in
        value = getattr(self.config, name, None)
        if value is None:
            raise ArgumentError(
                f"{type(self.config).__name__} has no {name}, from which the input's size would "
                f"follow: give work=…, the forward of one step of {type(self.model).__name__}"
            )
        return value

    def _look_at_images(self) -> None:
        """Learn in which form the model takes an image, and how many placeholders it has."""
        features = getattr(self.model, "get_image_features", None)
        if self.image_token is None or features is None or "input_ids" not in self.takes:
            self.images = self._pixels
            return
        names = inspect.signature(features).parameters
        pixels = [partial(self._pixels, pictures, sized) for pictures, sized in _FORMS]
        forms = [self._patches] if "image_grid_thw" in names else pixels
        refused = ""
        for form in forms:
            try:
                self.image_tokens = _feature_rows(self.model, form) // self.batch
            except Exception as error:  # the model's own code, which may do anything
                refused = refused or f"{type(error).__name__}: {error}"
                continue
            self.images = form
            return
        raise ArgumentError(
            f"it is not known in which form {type(self.model).__name__} takes images ({refused}): "
            "give work=…, a function that is called with the model and gives the loss of one step"
        )

    def _pixels(self, pictures: int = 0, sized: bool = False) -> Inputs:
        """(batch, channels, height, width) or (batch, pictures, …), with the images' sizes."""
        height, width = self._size()
        shape = (self.batch, *([pictures] if pictures else []), self._channels(), height, width)
        made: Inputs = {"pixel_values": torch.ones(shape, dtype=self.model.dtype)}
        if sized:
            made["image_sizes"] = torch.tensor([[height, width]] * self.batch)
        return made

    def _patches(self) -> Inputs:
        """(patches, values of a patch) of all images, and how many patches each has, by axis."""
        vision = self._vision()
        merged = getattr(vision, "spatial_merge_size", 1)
        grid = [max(1, side // (vision.patch_size * merged)) * merged for side in self._size()]
        width = self._channels() * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        patches = torch.ones(self.batch * math.prod(grid), width, dtype=self.model.dtype)
        grids = torch.tensor([[1, *grid]] * self.batch)
        return {"pixel_values": patches, "image_grid_thw": grids}

    def _vision(self) -> Any:  # a config of transformers
        return getattr(self.config, "vision_config", self.config)

    def _size(self) -> tuple[int, int]:
        size = getattr(self._vision(), "image_size", None) or _SIDE
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def _channels(self) -> int:
        names = ("num_channels", "in_channels", "in_chans")
        found = (getattr(self._vision(), name, None) for name in names)
        return next((n for n in found if isinstance(n, int)), 3)


def _feature_rows(model: Any, form: Callable[[], Inputs]) -> int:
    """How many vectors `get_image_features` makes of these images."""
    takes = inspect.signature(model.get_image_features).parameters
    rows: list[int] = []

    def look(meta_copy: Any) -> None:
        images = {name: value for name, value in form().items() if name in takes}
        found = meta_copy.get_image_features(**images)
        found = getattr(found, "pooler_output", found)
        rows.extend(t.numel() // t.shape[-1] for t in _tensors(found))

    meta_copy = make_meta_copy(model).eval()
    count_step(meta_copy, look, drops_gradients=False, goes_home=False)
    return sum(rows)


def _special(config: Any) -> Iterator[int]:
    """The ids that a config gives a meaning."""
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith(_SPECIAL):
                values = value if isinstance(value, list) else [value]
                yield from (number for number in values if isinstance(number, int))


def _first(outputs: object) -> Tensor:
    return next(_tensors(outputs))


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of outputs, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for each in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(each)
