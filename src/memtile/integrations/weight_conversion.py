"""Names and layouts that transformers changes between files and models, in both directions.

Which names, and how, transformers says itself: its conversion mapping for the model, its renaming
of keys and its converters are called here. They are given the tensors that memtile reads in slabs.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from memtile.convert import Latest, Outward, Renamed, Shown, TensorSource, derived
from memtile.integrations.saving import loaded_class


def in_model_names(
    model: Any, stored: Mapping[str, TensorSource], wanted: Mapping[str, Tensor]
) -> Renamed:
    """What `from_pretrained` would give to each name of a `PreTrainedModel`.

    Args:
        model: the model.
        stored: the tensors of a checkpoint.
        wanted: the model's tensors, on the meta device, by name.
    """
    from transformers import core_model_loading

    mapping = _mapping(model)
    rules = _Rules(mapping)
    found, groups = Renamed(loaded=lambda: _note_used(model, mapping)), dict[str, Group]()
    for key in sorted(stored, key=core_model_loading.dot_natural_key):
        name, pattern = rules.renamed(key, model.base_model_prefix, wanted)
        if pattern is not None and name in wanted:
            group = groups.setdefault(name, Group(name, rules.converters[pattern]))
            group.members.append((pattern, key))
        else:
            found.add(name, key, stored[key] if name in wanted else None)
    latest = Latest()
    for group in groups.values():
        sources = {key: stored[key] for _, key in group.members}
        _add_made(found, group, sources, model.config, wanted, latest)
    return found


def _add_made(
    found: Renamed,
    group: "Group",
    sources: Mapping[str, TensorSource],
    config: Any,  # of transformers
    wanted: Mapping[str, Tensor],
    latest: Latest,
) -> None:
    """Note what a converter makes of the sources; what it cannot make is a problem."""
    try:
        made = group.derived(sources, config, wanted, wanted[group.first].dtype, latest)
    except Exception as error:  # whatever the operations raise
        found.problems.append(
            f"{group.first}: transformers cannot make it of {_listed(sources)} ({error})"
        )
        return
    for target, source in made.items():
        for key in sources:
            found.add(target, key)
        found.sources[target] = source


def in_stored_names(model: Any, tensors: Sequence[Outward]) -> dict[str, TensorSource]:
    """What `save_pretrained` of a `PreTrainedModel` writes, by name, in its order."""
    from transformers import core_model_loading

    own = {name: each.source for each in tensors for name in _kept_names(model, each.names)}
    conversions = _reversed_conversions(model)
    if conversions is None:
        return own
    rules = _Rules(conversions)
    wanted = {
        name: torch.empty(each.source.shape, dtype=each.source.dtype, device="meta")
        for each in tensors
        for name in each.names
    }
    made: dict[str, TensorSource | Group] = {}
    for name in sorted(own, key=core_model_loading.dot_natural_key):
        target, pattern = core_model_loading.apply_converters(name, list(rules.converters_in_order))
        if pattern is None:
            made[core_model_loading.apply_renamings(name, rules.renamings)] = own[name]
            continue
        group = made.setdefault(target, Group(target, rules.converters[pattern]))
        assert isinstance(group, Group)
        group.members.append((pattern, name))
    latest = Latest()
    return dict(_written(made, own, rules, model.config, wanted, latest))


def _written(
    made: Mapping[str, Any],  # sources, and groups
    own: Mapping[str, TensorSource],
    rules: "_Rules",
    config: Any,
    wanted: Mapping[str, Tensor],
    latest: Latest,
) -> Iterator[tuple[str, TensorSource]]:
    from transformers import core_model_loading

    for target, each in made.items():
        if not isinstance(each, Group):
            yield target, each
            continue
        sources = {name: own[name] for _, name in each.members}
        for name, source in each.derived(sources, config, wanted, None, latest).items():
            yield core_model_loading.apply_renamings(name, rules.renamings), source


class _Rules:
    """A conversion mapping of transformers, as its loader sorts it."""

    def __init__(self, mapping: Iterable[Any]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = list(mapping)
        self.renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self.converters_in_order = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self.converters = {
            pattern: rule for rule in self.converters_in_order for pattern in rule.source_patterns
        }

    def renamed(
        self, key: str, prefix: str, wanted: Mapping[str, Tensor]
    ) -> tuple[str, str | None]:
        """A key's name in the model, and the pattern of the converter that it goes through."""
        from transformers.core_model_loading import rename_source_key

        names = dict(wanted)
        rules = self.renamings, self.converters_in_order
        name, pattern = rename_source_key(key, *rules, prefix, names)
        if name not in wanted and key in wanted:  # it is the model's own
            name, pattern = rename_source_key(key, [], [], prefix, names)
        return name, pattern


@dataclass
class Group:
    """The stored tensors of one call of a converter.

    Args:
        first: the name that transformers gives to the first result.
        converter: transformers' own.
        members: (pattern, name) of each tensor, in the order in which lists are joined.
    """

    first: str
    converter: Any
    members: list[tuple[str, str]] = field(default_factory=list)

    def derived(
        self,
        sources: Mapping[str, TensorSource],
        config: Any,
        wanted: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        latest: Latest,
    ) -> Mapping[str, TensorSource]:
        """Where the results are read, by their names."""

        def make(tensors: dict[str, Tensor], shown: Shown) -> dict[str, Tensor]:
            converter = copy.deepcopy(self.converter)
            for pattern, name in self.members:
                converter.add_tensor(self.first, name, pattern, tensors.pop(name))
            seen = SimpleNamespace(
                config=config, get_parameter=lambda name: shown(wanted[name])
            )  # all that the operations ask a model for
            made = converter.convert(self.first, model=seen, config=config)
            return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}

        return derived(sources, make, dtype, latest)


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def _mapping(model: Any, **options: bool) -> list[Any]:
    """transformers' rules for the model's names, some of which go by classes.

    What FSDP2 has given a class of its own has its model's meanwhile.
    """
    from transformers import conversion_mapping

    wrapper = loaded_class("torch.distributed.fsdp", "FSDPModule")
    wrapped = [(m, type(m)) for m in model.modules() if isinstance(m, wrapper)]
    try:
        for module, cls in wrapped:
            module.__class__ = cls.__mro__[cls.__mro__.index(wrapper) + 1]
        return list(conversion_mapping.get_model_conversion_mapping(model, **options))
    finally:
        for module, cls in wrapped:
            module.__class__ = cls


def _note_used(model: Any, mapping: Iterable[Any]) -> None:
    """Note which rules the files needed, as `from_pretrained` does: saving reverts them."""
    if getattr(model, "_weight_conversions", None) is None:
        model._weight_conversions = [rule for rule in mapping if rule.was_used()]


def _reversed_conversions(model: Any) -> list[Any] | None:
    """The rules for saving, in their order; None where there are none."""
    from transformers.core_model_loading import PrefixChange

    rules = getattr(model, "_weight_conversions", None)
    if rules is None:  # not loaded: whether files have a prefix is not known
        rules = _mapping(model, add_legacy=False)
        rules = [rule for rule in rules if not isinstance(rule, PrefixChange)] or None
    if rules is None or getattr(model, "_hf_peft_config_loaded", False):
        return None
    return [rule.reverse_transform() for rule in copy.deepcopy(rules)[::-1]]


def _kept_names(model: Any, names: Sequence[str]) -> list[str]:
    """Under which of a tensor's names it is written; none where it is not."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = model._keys_to_ignore_on_save or ()
    left = [name for name in names if name not in ignored]
    if len(left) < 2:
        return left
    try:
        shared = torch.empty(1)
        return list(remove_tied_weights_from_state_dict(dict.fromkeys(left, shared), model))
    except RuntimeError:  # a tie that the class does not know of
        return left[:1]
