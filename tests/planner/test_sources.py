"""Plans of what only describes a model: a config, or a folder with `config.json` alone."""

import json

import families
import pytest
import torch
from given_rates import RATES

import memtile
from memtile.costmodel import Plan
from memtile.errors import ArgumentError, BudgetError, CannotTileError, CheckpointError
from memtile.integrations.step_inputs import StepInputs

transformers = pytest.importorskip("transformers")


def config(**options: object) -> object:
    sizes = {
        "vocab_size": 1003,
        "hidden_size": 64,
        "intermediate_size": 150,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return transformers.LlamaConfig(**{**sizes, **options})


def planned(source: object, **options: object) -> Plan:
    given = {"tokens": 96, "budget": "1GiB", "rates": RATES, **options}
    return memtile.plan(source, **given)


@pytest.mark.parametrize("tied", [True, False])
def test_a_config_a_folder_and_the_model_get_one_plan(tmp_path, tied):
    """The plan depends on shapes alone."""
    described = config(tie_word_embeddings=tied)
    described.save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM(described)

    assert planned(described) == planned(tmp_path) == planned(str(tmp_path)) == planned(model)


def test_the_dtype_of_a_folder_is_its_own_or_the_one_asked_for(tmp_path):
    """A bfloat16 folder is planned as such, unless another dtype is given."""
    config(dtype="bfloat16").save_pretrained(tmp_path)

    assert {layer.dtype for layer in planned(tmp_path).layers} == {"bfloat16"}
    assert {layer.dtype for layer in planned(tmp_path, dtype=torch.float32).layers} == {"float32"}


def test_sixteen_bits_keep_masters_and_moments_in_float32():
    """Twelve bytes an element beside a bfloat16 weight; four where there are no masters."""
    for masters, entry in ((True, 12), (False, 4)):
        plan = planned(config(dtype="bfloat16"), masters=masters)
        terms = {term.name: term.nbytes for term in plan.terms}
        parameters = terms["resident weights"] + terms["norms, biases and other parameters"]

        assert terms["optimizer state of what is resident"] == parameters // 2 * entry


def test_a_plan_of_a_folder_fits_the_model_that_is_made_of_it(tmp_path):
    """Planned from `config.json` alone, tiled later."""
    described = config(tie_word_embeddings=True)
    described.save_pretrained(tmp_path)
    plan = planned(tmp_path, budget="4500KiB")
    model = transformers.LlamaForCausalLM(described)
    ids = torch.arange(9).view(1, -1)
    with torch.no_grad():
        dense = model(ids).logits

    memtile.tile(model, plan)

    assert plan.tiles > 0
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, dense, atol=1e-5)


def test_recomputing_activations_takes_less_memory_and_more_work():
    """Checkpointing is counted, both ways."""
    both = {on: planned(config(), tokens=512, checkpointing=on) for on in (False, True)}

    assert both[True].checkpointing
    assert both[True].peak_bytes < both[False].peak_bytes
    assert both[True].seconds > both[False].seconds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, None])
def test_products_of_experts_are_counted(dtype, optimizer):
    """A mixture of experts is planned in each dtype, with activations."""
    experts = transformers.MixtralConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=90,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )

    plan = planned(experts, dtype=dtype, optimizer=optimizer)
    terms = {term.name: term.nbytes for term in plan.terms}

    assert terms["temporary tensors and gradients"] > 96 * 90 * dtype.itemsize
    assert plan.products.kinds_16 if dtype is torch.bfloat16 else plan.products.widest[2] >= 500


def test_adapters_of_experts_are_counted():
    """A model on meta whose experts have adapters is planned, and autocast is as it was."""
    peft = pytest.importorskip("peft")
    sizes = {"num_hidden_layers": 1, "num_local_experts": 3, "intermediate_size": 90}
    empty = memtile.empty_model(
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**{**config().to_dict(), **sizes, "model_type": "mixtral"})
        )
    )
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts)
    adapted = peft.get_peft_model(empty, lora, low_cpu_mem_usage=True)

    plan = planned(adapted)

    assert {layer.trainable for layer in plan.layers} == {True, False}
    with pytest.raises(RuntimeError):
        torch.autocast("meta")


def test_the_class_that_a_config_names_is_planned(tmp_path):
    """An encoder-decoder, from its folder, with the work that its class takes."""
    sizes = {"vocab_size": 90, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, d_kv=8, decoder_start_token_id=0)
    )
    model.save_pretrained(tmp_path)
    ids = torch.ones(1, 8, dtype=torch.long)

    plan = planned(
        tmp_path, tokens=8, work=lambda reference: reference(input_ids=ids, labels=ids).loss
    )

    assert plan.model == "T5ForConditionalGeneration"


def test_rows_that_a_mask_of_ids_picks_are_counted():
    """What is asked of ids has values, though weights have none: masks, and if all are true."""

    class Picking(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            everywhere = torch.ones(ids.shape, device=self.weight.device)
            assert everywhere.to(device=self.weight.device, dtype=torch.bool).all().item()
            return super().forward(ids)[ids >= 64]

    model = torch.nn.Sequential(Picking(96, 8), torch.nn.Linear(8, 11))

    assert (32, 8, 11) in planned(model).products.shapes


def test_for_inference_work_may_give_its_result():
    """A frozen model has no backward."""
    ids = torch.ones(1, 96, dtype=torch.long)

    plan = planned(config(), optimizer=None, work=lambda reference: reference(input_ids=ids).logits)

    assert plan.optimizer is None


def test_a_step_that_asks_for_values_is_refused():
    """A step that cannot be counted is an error that says why and what to do."""

    class Asking(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = super().forward(x)
            return result if result.sum().item() > 0 else -result

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Asking(8, 8))

    with pytest.raises(CannotTileError, match=r"cannot be counted.*without a plan"):
        planned(model)


def test_more_tokens_take_more_memory():
    """Activations grow with the step; weights do not."""
    peaks = [planned(config(), tokens=tokens).peak_bytes for tokens in (32, 96, 512)]

    assert peaks == sorted(peaks)


def test_inference_keeps_no_moments_but_a_cache():
    """Without an optimizer there is the weights' memory and the cache of keys and values."""
    terms = {term.name: term.nbytes for term in planned(config(), optimizer=None).terms}
    cache = 2 * 3 * 96 * 2 * 16 * 4  # keys and values, layers, tokens, heads, width, bytes

    assert "optimizer state of what is resident" not in terms
    assert terms["KV cache and result"] >= cache


def test_more_tokens_than_positions_are_refused():
    """A sequence longer than the model can read is refused."""
    with pytest.raises(ArgumentError, match="reads 512 at once"):
        planned(config(), tokens=1024)

    assert planned(config(), tokens=1024, batch=2).batch == 2


def test_an_encoder_reads_tokens_and_its_decoder_as_many():
    """Twice as many products as in a decoder alone; the start token need not be in the config."""
    sizes = {"vocab_size": 90, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    described = transformers.T5Config(**sizes, d_kv=8)

    plan = planned(described, tokens=96)
    cached = planned(described, tokens=96, optimizer=None)

    assert getattr(described, "decoder_start_token_id", None) is None
    assert (96, 16, 90) in plan.products.shapes  # the logits, of all of the decoder's tokens
    terms = {term.name: term.nbytes for term in cached.terms}
    assert (
        terms["KV cache and result"] >= 2 * 2 * 96 * 16 * 4 + 96 * 90 * 4
    )  # own and the encoder's


@pytest.mark.parametrize("batch", [1, 3])
def test_images_have_their_placeholders_besides_the_texts_tokens(batch):
    """One image for each sequence, of as many placeholders as the vision tower makes of it."""
    model = families.build("LLaVA")
    text, patches = 8, 16  # of each sequence: 16 × 16 pixels in patches of 4 × 4
    rows = batch * (text + patches)

    plan = planned(model, tokens=batch * text, batch=batch)

    assert (rows, 24, 131) in plan.products.shapes


@pytest.mark.parametrize("family", ["Qwen3-VL", "Idefics3", "PaliGemma"])
def test_the_inputs_with_images_are_what_the_model_takes(family):
    """The model itself checks how many placeholders there are: its loss is a number."""
    model = families.build(family).train()
    step = StepInputs(model, 16, 2)
    inputs = step.inputs()

    loss = model(**inputs, **step.learning(inputs)).loss

    assert loss.isfinite()
    assert inputs["input_ids"].shape == (2, 8 + step.image_tokens)
    assert step.image_tokens > 0


def test_a_sequence_with_its_image_that_is_too_long_is_refused():
    """The message counts the placeholders in."""
    with pytest.raises(ArgumentError, match=r"72, 16 of them an image's, and Llava.* reads 64"):
        planned(families.build("LLaVA"), tokens=56)


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("ForSequenceClassification", (2,)),
        ("ForTokenClassification", (2, 8)),
        ("ForMaskedLM", (2, 8)),
        ("ForQuestionAnswering", None),
        ("Model", None),
    ],
)
def test_labels_are_those_of_the_head(head, labels):
    """A head's loss is counted where its labels are known, else the mean of the first output."""
    cls = getattr(transformers, f"Bert{head}")
    model = cls(transformers.BertConfig(**families.BERT))
    step = StepInputs(model, 16, 2)
    given = step.learning(step.inputs())

    assert (tuple(given["labels"].shape) if "labels" in given else None) == labels
    assert ("start_positions" in given) == (head == "ForQuestionAnswering")
    assert planned(model, tokens=16, batch=2).model == f"Bert{head}"


def test_the_code_of_a_folder_is_named_and_not_run(tmp_path):
    """The files and the classes that it would run, and how to make the model without a folder."""
    code = {"AutoConfig": "configuration_odd.Odd", "AutoModel": "modeling_odd.OddModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": code}))
    for file in ("configuration_odd.py", "modeling_odd.py"):
        (tmp_path / file).write_text("raise SystemExit('it ran')")

    with pytest.raises(ArgumentError, match=r"Odd of configuration_odd\.py, OddModel of modeling"):
        planned(tmp_path)


@pytest.mark.parametrize("source", [7, None, "nowhere", "org/name", object()])
def test_what_describes_no_model_is_refused(source):
    """The message says what can be given."""
    with pytest.raises(ArgumentError, match=r"config\.json|folder|nn\.Module"):
        planned(source)


def test_a_broken_config_is_refused(tmp_path):
    """A `config.json` that cannot be read is a clear error."""
    (tmp_path / "config.json").write_text("{")

    with pytest.raises(ArgumentError, match=r"config\.json"):
        planned(tmp_path)


def test_classic_mode_is_told_of_the_other():
    """Where gradients take the memory, the message says how to keep none."""
    with pytest.raises(BudgetError, match="mode='in_backward'"):
        planned(config(), budget="1MiB", mode="classic")


def test_quantized_weights_are_refused(tmp_path):
    """Their folder or config describes other bytes than are loaded."""
    described = config(quantization_config={"quant_method": "fp8"})
    described.save_pretrained(tmp_path)

    for source in (described, tmp_path):
        with pytest.raises(CheckpointError, match=r"quantized by fp8.*give the folder of the"):
            planned(source)


def test_a_folder_without_a_dtype_has_that_of_its_files(tmp_path):
    """As from_pretrained gives it; without files it is float32."""
    described = config()
    transformers.LlamaForCausalLM(described).half().save_pretrained(tmp_path / "files")
    for folder in (tmp_path, tmp_path / "files"):
        described.dtype = None
        described.save_pretrained(folder)

    assert {layer.dtype for layer in planned(tmp_path).layers} == {"float32"}
    assert {layer.dtype for layer in planned(tmp_path / "files").layers} == {"float16"}
