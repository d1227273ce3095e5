"""Mixtures of experts whose stacks are tiles do what the dense models do."""

import copy
import io
import pickle
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from small_experts import CONFIGS, EXPERTS, experts_model, experts_of, tokens

import memtile
from memtile.convert import select_linears, set_checkpointing
from memtile.errors import ParkedCopyWarning
from memtile.layers import TiledStack
from memtile.optim import dense_parameters

SIZES = {  # one expert a tile; several whole ones; three parts of each; as the bytes have it
    "parked": {"home": "host"},
    "whole": {"out_splits": 2},
    "within": {"out_splits": 3 * EXPERTS, "home": "host"},
    "bytes": {"max_tile_bytes": 6000, "home": "host"},
}
ONE_OF_EACH = list(zip(CONFIGS, [*SIZES, *SIZES], strict=True))  # each family with one of them


def stacks(model):
    return [module for module in model.modules() if isinstance(module, TiledStack)]


def gradients(model):
    """Dense gradients by name; zero in tiles that have none."""
    found = {}
    for dense in dense_parameters(model):
        tiles = [part for part in dense.parts if part.parameter.grad is not None]
        out = torch.zeros(dense.shape, dtype=dense.parts[0].parameter.dtype)
        for part in tiles:
            part.view(out).copy_(part.parameter.grad)
        found |= {dense.name: out} if tiles else {}
    return found


def flat(tensors):
    """All elements of a dictionary's tensors in one row, in the order of their names."""
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


def assert_as_accurate(ours, dense, truth):
    """Within twice the dense result's own error, and the rounding of the result itself."""
    eps = torch.finfo(dense.dtype).eps
    ours, dense, truth = (each.detach().double().flatten() for each in (ours, dense, truth))
    assert (ours - truth).norm() <= 2 * (dense - truth).norm() + eps * truth.norm()


def in_float64(name, run):
    """What `run` gives for the dense model in float64."""
    return run(experts_model(name, "batched_mm").double())


@pytest.mark.parametrize(("name", "size"), ONE_OF_EACH)
def test_logits_and_gradients_are_as_accurate_as_the_dense_models(name, size):
    """In every family and at every kind of grid, with the router's auxiliary loss."""
    ids = tokens()

    def run(model):
        out = model(input_ids=ids, labels=ids, output_router_logits=name != "glm4")
        out.loss.backward()
        return out.logits, gradients(model)

    dense, truth = run(experts_model(name)), in_float64(name, run)
    logits, grads = run(memtile.tile(experts_model(name), **SIZES[size]))

    assert_as_accurate(logits, dense[0], truth[0])
    assert grads.keys() == dense[1].keys() == truth[1].keys()
    assert_as_accurate(*map(flat, (grads, dense[1], truth[1])))


@pytest.mark.parametrize("name", CONFIGS)
def test_stacks_are_chosen_and_named_as_parameters(name):
    """A decision for each stack, as the matrix of its experts one below another."""
    model = experts_model(name)
    shapes = {n: p.shape for n, p in model.named_parameters() if p.dim() == 3}

    decisions = {d.name: d for d in select_linears(model, out_splits=2) if d.name in shapes}

    assert decisions.keys() == shapes.keys()
    for key, decision in decisions.items():
        experts, rows, columns = shapes[key]
        assert decision.tiled
        assert decision.reason == f"a stack of {experts} experts"
        assert decision.shape == (experts * rows, columns)
        assert decision.grid.out_parts == (0, 3 * rows, 5 * rows)


def test_one_stack_alone_can_be_tiled():
    """By its name; its neighbour stays a parameter, and logits are the dense ones."""
    model, ids = experts_model("gpt-oss"), tokens()
    expected = experts_model("gpt-oss")(input_ids=ids).logits
    memtile.tile(model, home="host", modules=["model.layers.1.mlp.experts.down_proj"])

    assert len(stacks(model)) == 1
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_untiling_gives_the_dense_model_back(name):
    """Class, names and their order, values, gradients, what trains."""
    dense, model = experts_model(name), experts_model(name)
    for each in (dense, model):
        experts_of(each).down_proj.requires_grad_(False)
        each(input_ids=tokens()).logits.sum().backward()
    memtile.tile(model, home="host")
    assert isinstance(experts_of(model), type(experts_of(dense)))

    memtile.untile(model)

    assert type(experts_of(model)) is type(experts_of(dense))
    assert list(model.state_dict()) == list(dense.state_dict())
    for (key, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
        assert ours.requires_grad == theirs.requires_grad
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("home", [None, "host"])
def test_copies_compute_the_same(copied, home):
    """Tiles that were parked are in memory in a copy, as those of linears."""
    model = memtile.tile(experts_model("gpt-oss"), out_splits=2, home=home)
    expected = model(input_ids=tokens()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParkedCopyWarning)
        if copied == "deepcopy":
            second = copy.deepcopy(model)
        elif copied == "pickle":
            second = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            second = torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    torch.testing.assert_close(second(input_ids=tokens()).logits, expected)
    assert type(experts_of(memtile.untile(second))) is type(experts_of(experts_model("gpt-oss")))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("saved", [None, 2, 7, 15])
def test_any_form_of_state_dict_loads(saved, assign):
    """Dense names, and tile names of every kind of grid."""
    source = experts_model("gpt-oss")
    expected = source(input_ids=tokens()).logits
    state = (source if saved is None else memtile.tile(source, out_splits=saved)).state_dict()
    model = memtile.tile(experts_model("gpt-oss"), out_splits=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.3)

    model.load_state_dict(state, assign=assign)

    torch.testing.assert_close(model(input_ids=tokens()).logits, expected)


def test_dense_names_are_the_models_own():
    """`dense_state_dict` gives the tensors of the dense model, stacks with three dimensions."""
    dense = experts_model("gpt-oss").state_dict()
    model = memtile.tile(experts_model("gpt-oss"), home="host")

    found = {name: tensor.clone() for name, tensor in memtile.dense_state_dict(model)}

    assert found.keys() == dense.keys()
    assert all(torch.equal(found[name], dense[name]) for name in dense)


def test_stacks_are_found_by_get_parameter():
    """From their owner by their own name, from the model by the handle's; it reads and writes."""
    dense, model = experts_model("gpt-oss"), memtile.tile(experts_model("gpt-oss"), home="host")
    path = "model.layers.1.mlp.experts.down_proj"
    expected, own = dense.get_parameter(path), experts_of(model).get_parameter("down_proj")
    assert own.shape == experts_of(dense).down_proj.shape
    assert torch.equal(own, experts_of(dense).down_proj)
    assert experts_of(model).get_parameter("down_proj_bias").dim() == 2

    found = model.get_parameter(f"{path}.weight")
    assert torch.equal(found, expected)
    with torch.no_grad():
        found.mul_(2)

    assert torch.equal(dict(memtile.dense_state_dict(model))[path], 2 * expected)


def test_a_missing_stack_is_named():
    """A checkpoint without it is refused as torch does."""
    model = memtile.tile(experts_model("qwen3"), out_splits=2)
    state = experts_model("qwen3").state_dict()
    del state["model.layers.0.mlp.experts.down_proj"]

    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.experts\.down_proj"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "size", "mode"),
    [
        (*each, mode)
        for each, mode in zip(ONE_OF_EACH, ["classic", "in_backward"] * 4, strict=False)
    ],
)
def test_adamw_steps_are_the_dense_models(name, size, mode):
    """Parameters after three steps, where every expert is hit in each."""
    model, dense = memtile.tile(experts_model(name), **SIZES[size]), experts_model(name)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours = memtile.TileOptimizer(model, torch.optim.AdamW, mode=mode, **options)
    theirs = torch.optim.AdamW(dense.parameters(), **options)
    truth = experts_model(name).double()
    exact = torch.optim.AdamW(truth.parameters(), **options)
    for seed in range(2):
        for each, optimizer in ((model, ours), (dense, theirs), (truth, exact)):
            ids = tokens(batch=2, length=41, seed=seed)
            each(input_ids=ids, labels=ids).loss.backward()
            assert mode == "in_backward" or all(p.grad is not None for p in each.parameters())
            optimizer.step()
            optimizer.zero_grad()

    found = {name: value.clone() for name, value in memtile.dense_state_dict(model)}
    expected, exactly = dense.state_dict(), truth.state_dict()
    assert found.keys() == exactly.keys()
    assert_as_accurate(*map(flat, (found, expected, exactly)))


def test_the_optimizers_state_dict_is_the_dense_ones():
    """Its entries stand under the numbers that the dense model's parameters have."""
    model, dense = memtile.tile(experts_model("gpt-oss"), home="host"), experts_model("gpt-oss")
    ours = memtile.TileOptimizer(model, torch.optim.AdamW, lr=1e-2)
    theirs = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    ids = tokens(batch=4, length=33)
    for each, optimizer in ((model, ours), (dense, theirs)):
        each(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    found, expected = ours.state_dict()["state"], theirs.state_dict()["state"]

    assert found.keys() == expected.keys()
    for number, entries in expected.items():
        assert found[number]["exp_avg"].shape == entries["exp_avg"].shape
        torch.testing.assert_close(found[number]["exp_avg"], entries["exp_avg"])
    ours.load_state_dict(theirs.state_dict())


def routed(experts, index, weights=None):
    """The experts' output for given routes."""
    torch.manual_seed(5)
    hidden = torch.randn(index.shape[0], 24)
    weights = torch.rand(index.shape) if weights is None else weights
    return experts(hidden, index, weights)


ROUTES = {
    "one token": torch.tensor([[3, 1]]),
    "top 1": torch.randint(0, EXPERTS, (17, 1), generator=torch.Generator().manual_seed(2)),
    "all to one expert": torch.full((13, 1), 4),
    "an expert never hit": torch.tensor([[0, 1], [1, 3], [4, 0]]),
    "the same expert twice": torch.tensor([[2, 2], [2, 1]]),
    "no token": torch.zeros(0, 2, dtype=torch.long),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", SIZES)
def test_any_routing_is_computed(route, size):
    """Whatever the router chose, values are those of the dense form."""
    dense = experts_of(experts_model("gpt-oss"))
    ours = experts_of(memtile.tile(experts_model("gpt-oss"), **SIZES[size]))

    torch.testing.assert_close(routed(ours, ROUTES[route]), routed(dense, ROUTES[route]))


def test_pairs_of_other_ranks_are_ignored():
    """Numbers from E on mean that an expert of another rank has the pair."""
    dense, model = experts_of(experts_model("gpt-oss")), experts_model("gpt-oss")
    ours = experts_of(memtile.tile(model, home="host"))
    index = torch.tensor([[EXPERTS, 1], [2, EXPERTS], [EXPERTS, EXPERTS]])
    dense._is_expert_parallel = ours._is_expert_parallel = True

    torch.testing.assert_close(routed(ours, index), routed(dense, index))


def test_experts_without_tokens_are_not_read():
    """Only tiles of experts that are hit are brought in, forward and backward; others have no
    gradient.
    """
    model = memtile.tile(experts_model("qwen3"), home="host")
    experts = experts_of(model)
    routed(experts, torch.tensor([[1, 4], [4, 1]])).sum().backward()

    for stack in (experts.gate_up_proj, experts.down_proj):
        hit = [tile.weight.grad is not None for tile in stack.stacks]
        assert hit == [False, True, False, False, True]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_choice_of_an_implementation_does_not_matter(implementation):
    """`set_experts_implementation` before and after tiling."""
    expected = experts_model("qwen3")(input_ids=tokens()).logits
    model = memtile.tile(experts_model("qwen3", implementation), home="host")
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected)

    model.set_experts_implementation("eager")

    torch.testing.assert_close(model(input_ids=tokens()).logits, expected)


@pytest.mark.parametrize("size", ["parked", "within"])
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_sixteen_bits_are_as_accurate_as_the_dense_model(name, size, precision):
    """The last experts module, with its gradients, in bfloat16 and under autocast."""
    generator = torch.Generator().manual_seed(4)
    hidden, weights = torch.randn(700, 24, generator=generator), torch.rand(700, 2)
    index = torch.randint(0, EXPERTS, (700, 2), generator=generator)

    def run(experts, dtype, autocast=False):
        x = hidden.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = experts(x, index, weights.to(dtype))
        out.float().square().mean().backward()
        return out, x.grad

    half = precision == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    models = [experts_model(name).to(dtype) for _ in range(2)]
    truth = run(experts_of(experts_model(name).to(dtype).double()), torch.float64)
    dense = run(experts_of(models[0]), dtype, not half)
    ours = run(experts_of(memtile.tile(models[1], **SIZES[size])), dtype, not half)

    for mine, theirs, exact in zip(ours, dense, truth, strict=True):
        a, b, t = (each.detach().double() for each in (mine, theirs, exact))
        assert (a - t).norm() <= 2 * (b - t).norm()


def test_activations_can_be_recomputed():
    """Gradient checkpointing gives the gradients that it gives the dense model."""
    grads = []
    for model in (experts_model("qwen3"), memtile.tile(experts_model("qwen3"), home="host")):
        set_checkpointing(model, True)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        grads.append(gradients(model))

    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


@pytest.mark.parametrize("home", [None, "host"])
def test_foreign_code_reads_a_stack_as_its_parameter(home):
    """Shape, dtype, device, some experts, or the whole of it in torch's functions."""
    dense, model = experts_of(experts_model("qwen3")).down_proj, experts_model("qwen3")
    stack = experts_of(memtile.tile(model, out_splits=15, home=home)).down_proj
    ids = torch.tensor([[4, 0], [0, 2]])

    assert (stack.shape, stack.dtype, stack.device) == (dense.shape, dense.dtype, dense.device)
    assert torch.equal(stack[ids], dense[ids])
    assert torch.equal(stack[3], dense[3])
    assert torch.equal(stack[1:4], dense[1:4])
    assert torch.equal(stack[1, 2], dense[1, 2])
    x = torch.ones(EXPERTS, 3, dense.shape[2])
    assert torch.equal(torch.bmm(x, stack.weight.mT), torch.bmm(x, dense.mT))
    assert torch.equal(torch.sum(stack), dense.sum())
    if home is None:
        stack[ids].sum().backward()
        assert stack.stacks[0].weight.grad.eq(2).all()


def test_writing_to_a_stack_through_torch_reaches_its_tiles():
    """`nn.init` draws the numbers of the dense stack."""
    dense = experts_model("qwen3")
    stack = experts_of(memtile.tile(copy.deepcopy(dense), home="host")).down_proj
    for weight in (experts_of(dense).down_proj, stack.weight, stack):
        torch.manual_seed(1)
        torch.nn.init.normal_(weight)

    assert torch.equal(stack.weight, experts_of(dense).down_proj)


def test_adapters_of_attention_train_beside_tiled_experts():
    """LoRA on q_proj and v_proj: the adapters' gradients are those beside dense experts."""
    peft = pytest.importorskip("peft")
    grads = []
    for tiles in (False, True):
        model = experts_model("qwen3")
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        if tiles:
            memtile.tile(adapted, home="host")
            assert len(stacks(adapted)) == 4
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        named = adapted.named_parameters()
        grads.append({name: p.grad for name, p in named if p.requires_grad})

    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


def test_a_stack_that_peft_adapts_stays_dense():
    """With `target_parameters` PEFT reads the parameter itself; the other stack becomes tiles."""
    peft = pytest.importorskip("peft")
    outputs = []
    for tiles in (False, True):
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=2, target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
        )
        adapted = peft.get_peft_model(experts_model("qwen3"), config)
        if tiles:
            decisions = {d.name: d.reason for d in select_linears(adapted)}
            memtile.tile(adapted, home="host")
        outputs.append(adapted(input_ids=tokens()).logits)

    kept = [why for name, why in decisions.items() if name.endswith("down_proj")]
    assert kept == ["PEFT adapts it, and reads it from the parameter itself"] * 2
    assert len(stacks(adapted)) == 2
    torch.testing.assert_close(outputs[1], outputs[0])


def test_experts_on_the_meta_device_share_the_tokens():
    """With shapes alone every expert gets as many pairs as the others, or one more."""
    model = memtile.empty_model(lambda: experts_model("qwen3"))
    memtile.tile(model, out_splits=EXPERTS)
    experts, seen = experts_of(model), []
    for tile in experts.down_proj.stacks:
        tile.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))

    out = experts(
        torch.empty(9, 24, device="meta"),
        torch.empty(9, 2, dtype=torch.long, device="meta"),
        torch.empty(9, 2, device="meta"),
    )

    assert out.shape == (9, 24)
    assert seen == [4, 4, 4, 3, 3]
