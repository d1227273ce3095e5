"""Names that a folder and a model do not share: as transformers, and said in a warning."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors_files import same_tensors
from small_models import SIZES, build
from stored_models import dense_values, write

import memtile
from memtile.convert import IncompatibleKeys
from memtile.errors import CheckpointError, CheckpointWarning, HomeIOError, NewWeightsWarning

transformers.utils.logging.disable_progress_bar()

OLD = {  # by kind, names in older files that transformers ignores
    "llama": "model.layers.0.self_attn.rotary_emb.inv_freq",
    "gpt2": "transformer.h.1.attn.bias",
    "bert": "bert.embeddings.position_ids",
}
MORE = {  # and names that it reports
    "llama": "model.layers.2.mlp.up_proj.weight",
    "gpt2": "transformer.h.0.attn.masked_bias",
    "bert": "bert.embeddings.strange",
}
HEADS: dict[str, Any] = {
    "llama": transformers.LlamaForSequenceClassification,
    "gpt2": transformers.GPT2ForSequenceClassification,
    "bert": transformers.BertForSequenceClassification,
}


def bert() -> Any:
    """A masked language model, which has no pooler."""
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def saved(kind: str, folder: Path, besides: str | None = None) -> Path:
    """A folder of this kind's causal or masked model, with a name that it has besides."""
    model = bert() if kind == "bert" else build(kind)
    model.save_pretrained(folder)
    if besides is not None:
        state = {name: t for name, t in dense_values(model).items() if "position_ids" not in name}
        write({**state, besides: torch.ones(3)}, folder / "model.safetensors")
    return folder


def empty(cls: Any, folder: Path) -> Any:
    """A model of a class, made of a folder's config alone."""
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=5)
    return memtile.empty_model(lambda: cls._from_config(config).eval())


def own_class(kind: str) -> Any:
    """The class that a folder was written by."""
    return type(bert() if kind == "bert" else build(kind))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", OLD)
def test_what_transformers_ignores_is_ignored(kind: str, strict: bool, tmp_path: Path) -> None:
    """Buffers in older files are neither refused nor warned of."""
    folder = saved(kind, tmp_path, OLD[kind])

    model = memtile.tile(
        empty(own_class(kind), folder), out_splits=3, checkpoint=folder, strict=strict
    )
    told = memtile.load_checkpoint(model, folder)

    assert told == IncompatibleKeys((), ())


@pytest.mark.parametrize("kind", MORE)
def test_what_it_does_not_know_is_said(kind: str, tmp_path: Path) -> None:
    """One name too many is a warning that names it; an error where it is asked to be strict."""
    folder = saved(kind, tmp_path, MORE[kind])
    theirs = own_class(kind).from_pretrained(folder)

    with pytest.raises(CheckpointError, match=rf"it has {MORE[kind]}.*strict=False"):
        memtile.tile(empty(own_class(kind), folder), out_splits=3, checkpoint=folder, strict=True)
    with pytest.warns(CheckpointWarning, match=rf"holds {MORE[kind]}, which the model has not"):
        model = memtile.tile(empty(own_class(kind), folder), out_splits=3, checkpoint=folder)

    assert same_tensors(dense_values(model), dict(theirs.state_dict()))


@pytest.mark.parametrize("home", [None, "disk", "checkpoint"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_new_head_is_drawn_as_transformers_draws_it(
    kind: str, home: str | None, tmp_path: Path
) -> None:
    """Over a language model's folder: the bits of from_pretrained with the same seed, and named."""
    folder = saved(kind, tmp_path / "model")
    torch.manual_seed(5)
    theirs = HEADS[kind].from_pretrained(folder, num_labels=5)

    torch.manual_seed(5)
    with pytest.warns(CheckpointWarning) as said:
        model = memtile.tile(
            empty(HEADS[kind], folder),
            out_splits=2,
            checkpoint=folder,
            home=memtile.DiskHome(tmp_path) if home == "disk" else home,
        )

    assert same_tensors(dense_values(model), dict(theirs.state_dict()))
    new = {str(w.message) for w in said if isinstance(w.message, NewWeightsWarning)}
    assert len(new) == 1
    assert ("classifier.weight" if kind == "bert" else "score.weight") in new.pop()
    with torch.no_grad():
        ids = torch.tensor([[3, 7, 11]])
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits)


def test_a_new_head_is_refused_where_it_is_strict(tmp_path: Path) -> None:
    """A missing name is an error."""
    folder = saved("llama", tmp_path)
    model = empty(HEADS["llama"], folder)

    with pytest.raises(CheckpointError, match=r"has no score\.weight"):
        memtile.tile(model, out_splits=2, checkpoint=folder, strict=True)
    assert model.score.weight.is_meta


@pytest.mark.parametrize(
    ("cls", "lost"),
    [
        (transformers.LlamaForCausalLM, "lm_head.weight"),
        (transformers.LlamaForCausalLM, "model.layers.1.mlp.up_proj.weight"),
        (HEADS["llama"], "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_what_was_lost_is_refused(cls: Any, lost: str, tmp_path: Path) -> None:
    """A missing name of the folder's own class is an error, not initialised."""
    folder = saved("llama", tmp_path)
    state = {k: v for k, v in dense_values(build("llama")).items() if k != lost}
    write(state, folder / "model.safetensors")

    with pytest.raises(CheckpointError, match=f"it has no {lost}"):
        memtile.tile(empty(cls, folder), out_splits=2, checkpoint=folder)


def test_a_config_that_names_no_class_still_tells_a_head_from_the_base(tmp_path: Path) -> None:
    """With a config that names no class, only names outside the base are new."""
    folder = saved("llama", tmp_path)
    config = transformers.LlamaConfig(**SIZES, num_labels=5)
    model = memtile.empty_model(lambda: HEADS["llama"](config))
    base = memtile.empty_model(
        lambda: transformers.LlamaModel(
            transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 3})
        )
    )

    with pytest.warns(CheckpointWarning):
        memtile.tile(model, out_splits=2, checkpoint=folder)
    with pytest.raises(CheckpointError, match=r"it has no layers\.2\."):
        memtile.tile(base, out_splits=2, checkpoint=folder)


def test_an_error_half_way_puts_a_new_head_back(tmp_path: Path, monkeypatch: Any) -> None:
    """After an error the model is dense and without values, and a second try works."""
    folder = saved("llama", tmp_path)
    model = empty(HEADS["llama"], folder)

    def fail(*given: object) -> None:
        raise HomeIOError(5, "broken")

    with monkeypatch.context() as patched:
        patched.setattr("memtile.convert.materializing.bring_in", fail)
        with pytest.raises(HomeIOError):
            memtile.tile(model, out_splits=2, checkpoint=folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.warns(CheckpointWarning):
        memtile.tile(model, out_splits=2, checkpoint=folder)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_load_checkpoint_makes_what_has_no_values(tmp_path: Path) -> None:
    """A dense model on the meta device too; a head that has values keeps them."""
    folder = saved("llama", tmp_path)
    model = empty(HEADS["llama"], folder)

    with pytest.raises(CheckpointError, match=r"has no score\.weight"):
        memtile.load_checkpoint(model, folder)
    told = memtile.load_checkpoint(model, folder, strict=False)
    drawn = model.score.weight.clone()
    memtile.load_checkpoint(model, folder, strict=False)

    assert told == IncompatibleKeys(("score.weight",), ("lm_head.weight",))
    assert drawn.std() > 0
    assert torch.equal(model.score.weight, drawn)


def adapted(base: Any, **options: Any) -> Any:
    """A model with an adapter on some linears and a copy of its head."""
    torch.manual_seed(1)
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT notes about the base
        return peft.get_peft_model(base, config)


def adapters(folder: Path) -> Any:
    """A trained model, in one folder its base, in another its adapters."""
    base = build("llama")
    base.save_pretrained(folder / "base")
    model = adapted(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / "adapters")
    return model.eval()


def trained(model: Any) -> dict[str, torch.Tensor]:
    """What of a model is trained."""
    return {k: v for k, v in dense_values(model).items() if "lora_" in k or "modules_to_save" in k}


@pytest.mark.parametrize("how", ["together", "afterwards", "inside", "by PEFT"])
def test_adapters_around_an_empty_model_are_filled(how: str, tmp_path: Path) -> None:
    """Adapters load from their own folder beside the base's, or by load_checkpoint."""
    truth = adapters(tmp_path)
    base, own = tmp_path / "base", tmp_path / "adapters"
    cls = transformers.LlamaForCausalLM
    if how == "inside":
        config = transformers.AutoConfig.from_pretrained(base)
        model = memtile.empty_model(lambda: adapted(cls._from_config(config)))
    elif how == "by PEFT":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it fills nothing on the meta device
            model = peft.PeftModel.from_pretrained(empty(cls, base), own)
    else:
        model = adapted(empty(cls, base))

    if how == "afterwards":
        with pytest.warns(CheckpointWarning, match=r"lora_A.*have no values yet.*load_checkpoint"):
            memtile.tile(model, out_splits=3, checkpoint=base)
        told = memtile.load_checkpoint(model, own)
        assert told == IncompatibleKeys((), ())
    else:
        home = memtile.DiskHome(tmp_path)
        memtile.tile(model, out_splits=3, checkpoint=[base, own], home=home)

    assert trained(truth)
    assert same_tensors(trained(model), trained(truth))
    with torch.no_grad():
        ids = torch.tensor([[3, 7, 11]])
        torch.testing.assert_close(model.eval()(ids).logits, truth(ids).logits)


def test_a_copy_of_a_head_begins_as_the_head(tmp_path: Path) -> None:
    """PEFT's copy of a module that it trains has the values of the base's, without a folder."""
    base = build("llama")
    base.save_pretrained(tmp_path)
    model = adapted(empty(transformers.LlamaForCausalLM, tmp_path))

    with pytest.warns(CheckpointWarning, match="have no values yet") as said:
        memtile.tile(model, out_splits=3, checkpoint=tmp_path)

    copied = model.base_model.model.lm_head.modules_to_save.default.weight
    assert torch.equal(copied, base.lm_head.weight)
    assert copied.requires_grad
    assert "lm_head" not in str(said[0].message)


def test_a_classifier_is_tuned_over_an_empty_model(tmp_path: Path) -> None:
    """PEFT trains a copy of the new head, which has the head's own drawn values."""
    folder = saved("llama", tmp_path)
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(empty(HEADS["llama"], folder), peft.LoraConfig(**options))

    with pytest.warns(CheckpointWarning) as said:
        memtile.tile(model, out_splits=2, checkpoint=folder, home=memtile.DiskHome(tmp_path))

    score = model.base_model.model.score
    drawn = dense_values(model)["base_model.model.score.original_module.weight"]
    assert any(isinstance(warning.message, NewWeightsWarning) for warning in said)
    assert drawn.std() > 0
    assert torch.equal(score.modules_to_save.default.weight, drawn)


def test_half_of_the_adapters_is_refused(tmp_path: Path) -> None:
    """A folder that lacks an adapter's tensor is refused."""
    adapters(tmp_path)
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    state = dict(memtile.checkpoints.Checkpoint.open(file).items())
    some = {name: tensor.read() for name, tensor in state.items() if "layers.0" not in name}
    write(some, file)
    model = adapted(empty(transformers.LlamaForCausalLM, tmp_path / "base"))

    with pytest.raises(CheckpointError, match=r"it has no base_model\.model\.model\.layers\.0"):
        memtile.tile(model, out_splits=3, checkpoint=[tmp_path / "base", tmp_path / "adapters"])
