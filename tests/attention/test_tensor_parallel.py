"""EntmaxAttention under a tensor-parallel plan: two processes with half of the heads each compute what one does."""

import json

import pytest

from common import run_python

PROGRAM = """
import copy, json, os, sys, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from adasplash import EntmaxAttention

PLAN = {**{x: ColwiseParallel() for x in ("q_proj", "k_proj", "v_proj")}, "out_proj": RowwiseParallel()}
CASES = {
    "number": (dict(is_causal=True), PLAN, None),
    "grouped": (dict(num_kv_heads=2, window=(9, 3)), PLAN, None),
    "no bias, own head_dim": (dict(bias=False, head_dim=5), PLAN, None),
    "learned, whole": (dict(learn_alpha=True), PLAN, None),
    "learned, split": (dict(learn_alpha=True), PLAN, Shard(0)),
    "learned, replicated": (dict(learn_alpha=True, num_kv_heads=2), PLAN, Replicate()),
    "one head of key and value": (
        dict(num_kv_heads=1, learn_alpha=True), {x: PLAN[x] for x in ("q_proj", "out_proj")}, None
    ),
}

def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x

def work(rank, file, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, (options, plan, placement) in CASES.items():
        torch.manual_seed(0)
        alone = EntmaxAttention(16, 4, **options)
        with torch.no_grad():
            for p in alone.parameters():
                p.copy_(torch.randn(p.shape) * 0.5)
        split = copy.deepcopy(alone)
        if placement is not None:
            split.alpha_logit = torch.nn.Parameter(distribute_tensor(split.alpha_logit.detach(), mesh, [placement]))
        split = parallelize_module(split, mesh, plan)
        x = torch.randn(2, 30, 16)
        lengths = torch.tensor([30, 17])
        outs = [m(x, kv_seqlens=lengths) for m in (alone, split)]
        for out in outs:
            whole(out).square().sum().backward()
        errors = {"out": (whole(outs[1]) - outs[0]).abs().max().item()}
        largest = max(p.grad.abs().max().item() for p in alone.parameters())
        for (key, p), q in zip(alone.named_parameters(), split.parameters(), strict=True):
            errors[key] = (whole(q.grad) - p.grad).abs().max().item() / largest
        found[name] = errors
    torch.manual_seed(0)
    odd = parallelize_module(EntmaxAttention(16, 4, num_kv_heads=2), mesh, {x: PLAN[x] for x in ("q_proj", "out_proj")})
    try:
        odd(torch.randn(2, 30, 16))
    except ValueError as error:
        found["refused"] = str(error)
    json.dump(found, open(os.path.join(folder, str(rank)), "w"))
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, sys.argv[1:], nprocs=2, start_method="fork")
"""


@pytest.mark.slow
@pytest.mark.backends("cpu")
def test_two_processes_compute_what_one_does(tmp_path):
    """Results, and the gradients of all parameters, of an alpha_logit that stays whole as well: on both."""
    run_python(PROGRAM, tmp_path / "store", tmp_path)
    for rank in "01":
        found = json.loads((tmp_path / rank).read_text())
        assert found.pop("refused").startswith(
            "EntmaxAttention: k_proj and v_proj must be split into heads as q_proj is"
        )
        assert len(found) == 7
        for case, errors in found.items():
            assert max(errors.values()) < 1e-4, (rank, case, errors)
        assert "alpha_logit" in found["learned, whole"]
