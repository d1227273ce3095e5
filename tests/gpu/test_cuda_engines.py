"""Engines on a CUDA device: one process, NCCL."""

import pytest
import torch
import torch.distributed as dist
from engine_cases import Case, Net, batches, tiled
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from memtile import dense_state_dict, empty_model, load_checkpoint, save_checkpoint, tile
from memtile.engines import dense_files
from memtile.engines.torch_fsdp2 import shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def alone():
    """A process group of this process."""
    backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(model, optimizer):
    for ids in batches():
        optimizer.zero_grad()
        model(ids.cuda()).backward()
        optimizer.step()


@pytest.mark.parametrize("policy", [OffloadPolicy(), CPUOffloadPolicy()], ids=["there", "host"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_shards_train_as_the_dense_model_does(alone, tmp_path, policy, again):
    """After ten steps of AdamW in float64, on the device or from host memory."""
    case = Case(grid=(3, 5), again=again)
    dense = Net(case).cuda()
    train(dense, torch.optim.AdamW(dense.parameters(), lr=1e-2))
    model = shard(tiled(case).cuda(), unit_bytes=0, offload_policy=policy)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    dense_files.save_checkpoint(model, tmp_path)
    found = tiled(case)
    load_checkpoint(found, tmp_path)

    for name, value in dense_state_dict(found):
        expected = dense.state_dict()[name].cpu()
        assert (value - expected).norm() <= 1e-9 * expected.norm(), name


def test_files_go_into_shards_on_the_device(alone, tmp_path):
    """And out again, to the bit."""
    case = Case()
    save_checkpoint(Net(case), tmp_path / "in")
    model = shard(tile(empty_model(lambda: Net(case)), out_splits=4))
    dense_files.load_checkpoint(model, tmp_path / "in", device="cuda")
    dense_files.save_checkpoint(model, tmp_path / "out")

    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "in" / "model.safetensors").read_bytes()
