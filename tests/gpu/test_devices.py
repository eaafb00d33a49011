"""Several GPUs: kernels run where their tensors are, and DDP over NCCL synchronises statistics."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.op_cases import CASES, GpuCase
from smis_kernels import SPADE

pytestmark = [
    pytest.mark.cuda_only,
    pytest.mark.skipif(torch.cuda.device_count() < 2,
                       reason=f"needs two GPUs, {torch.cuda.device_count()} are here"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_runs_on_the_device_of_its_tensors(case: GpuCase) -> None:
    expected = case.run(case.inputs("cuda:0", torch.float32, "channels_last"), case.kind)
    with torch.cuda.device(0):  # not the device of the tensors
        got = case.run(case.inputs("cuda:1", torch.float32, "channels_last"), case.kind)
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-5)


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (4, 8, 8), generator=generator).repeat_interleave(2, 1)
    planes = nn.functional.one_hot(labels.repeat_interleave(2, 2), 5).permute(0, 3, 1, 2).float()
    return torch.randn((4, 8, 16, 16), generator=generator), planes


def _network() -> nn.Module:
    torch.manual_seed(0)
    return SPADE(8, 5, norm="syncbatch").train()


def _process(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    store = dist.FileStore(str(Path(folder, "store")), 2)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2)
    network = DistributedDataParallel(_network().cuda(), device_ids=[rank])
    x, planes = (t[2 * rank : 2 * rank + 2].cuda() for t in _inputs())
    network(x, planes, activation="leaky_relu").square().mean().backward()
    if rank == 0:
        state = {name: p.grad.cpu() for name, p in network.module.named_parameters()}
        state |= {name: b.cpu() for name, b in network.module.named_buffers()}
        torch.save(state, Path(folder, "state.pt"))
    dist.barrier()
    dist.destroy_process_group()


def test_ddp_over_nccl_equals_one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (folder,), nprocs=2)
        found = torch.load(Path(folder, "state.pt"), weights_only=True)
    network = _network().cuda()
    x, planes = (t.cuda() for t in _inputs())
    network(x, planes, activation="leaky_relu").square().mean().backward()
    expected = {name: p.grad.cpu() for name, p in network.named_parameters()}
    expected |= {name: b.cpu() for name, b in network.named_buffers()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
