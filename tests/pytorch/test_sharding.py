"""DTensor: the rules by which calls split over devices, with two processes, each against one process."""

import pytest
import torch
import two_ranks

import adasplash
import common
import ranks

# In a process of its own, with a mesh of 2 x 2 devices of which only this one exists.
FAKE_MESH = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
mesh = init_device_mesh("cpu", (2, 2))
def split(*shape, placements):
    return distribute_tensor(torch.randn(shape), mesh, placements)
"""


@pytest.mark.slow
def test_as_one_process(tmp_path):
    ranks.run_ranks(two_ranks.__file__, lambda rank: [rank, tmp_path / "store", tmp_path / f"{rank}.json"])
    ranks.check_outcomes(tmp_path)


@pytest.mark.parametrize("first", ("adasplash", "torch.distributed.tensor"))
def test_rules_are_there_in_whichever_order(first):
    second = {"adasplash": "torch.distributed.tensor"}.get(first, "adasplash")
    out = common.run_python(
        f"""
import sys
import {first}
assert {first!r} != "adasplash" or "torch.distributed.tensor" not in sys.modules
import {second}
{FAKE_MESH}
query = split(2, 4, 8, 8, placements=[Shard(0), Shard(1)])
print(adasplash.entmax_attn(query, query, query).placements)
"""
    )
    assert out.split() == ["(Shard(dim=0),", "Shard(dim=1))"]


def test_looking_for_the_module_is_not_loading_it():
    common.run_python(
        """
import importlib.util, inspect, sys
import adasplash
assert importlib.util.find_spec("torch.distributed.tensor") is not None
assert "torch.distributed.tensor" not in sys.modules
import torch.distributed.tensor as module
rules = module.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
import torch
assert torch.ops.adasplash._entmax_attn_forward.default in rules
assert type(module.__loader__).__module__ == type(module.__spec__.loader).__module__ == "_frozen_importlib_external"
assert inspect.getsource(module)
assert not any(type(finder).__module__ == "adasplash._when_imported" and finder.name == module.__name__
               for finder in sys.meta_path)
"""
    )


def test_a_device_gets_whole_groups_of_heads():
    """6 key heads split in two, not in four, over which dimensions of the mesh ever."""
    out = common.run_python(
        FAKE_MESH
        + """
import adasplash
for key_heads in (4, 6):
    query = split(2, 24, 8, 8, placements=[Shard(1), Shard(1)]).requires_grad_()
    key = split(2, key_heads, 8, 8, placements=[Shard(1), Shard(1)])
    out = adasplash.entmax_attn(query, key, key)
    out.sum().backward()
    print(sum(p.is_shard(1) for p in out.placements), sum(p.is_shard(1) for p in query.grad.placements))
"""
    )
    assert out.split("\n")[:2] == ["2 2", "1 1"]


def test_a_changing_alpha_adds_nothing_to_what_dtensor_remembers():
    out = common.run_python(
        FAKE_MESH
        + """
import adasplash
cache = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding
query = split(2, 4, 8, 8, placements=[Shard(0), Shard(1)])
for alpha in (1.1, 1.2, 1.3, 1.4):
    adasplash.entmax_attn(query, query, query, alpha)
    print(cache.cache_info().currsize)
"""
    )
    assert len(set(out.split())) == 1


def test_dropout_is_of_the_whole_call():
    """A device that had a part of the heads would drop what the first ones drop."""
    out = common.run_python(
        FAKE_MESH
        + """
import adasplash
query = split(2, 4, 8, 8, placements=[Shard(0), Shard(1)])
print(adasplash.entmax_attn(query, query, query, dropout_p=0.5).placements)
out, stats = adasplash.entmax_attn_summary(query, query, query)
print(out.placements, stats.support_size.placements, stats.empty_tiles.placements)
"""
    )
    assert out.split("\n")[0] == "(Replicate(), Replicate())"
    assert out.split("\n")[1].count("Shard(dim=0), Shard(dim=1)") == 3


def test_an_index_is_refused():
    out = common.run_python(
        FAKE_MESH
        + """
import adasplash
query = split(2, 4, 8, 8, placements=[Shard(0), Shard(1)])
index = split(3, 2304, placements=[Replicate(), Replicate()]).to(torch.uint8)
try:
    with torch.no_grad():
        adasplash.entmax_attn(query, query, query, key_index=index)
except RuntimeError as error:
    print(error)
"""
    )
    assert out.startswith("entmax_attn: key_index is not split over devices, got one with a DTensor")


def test_the_rules_know_every_tensor():
    """Another tensor argument or result needs a thought on how it splits; this list is then to be extended with it."""
    assert adasplash.entmax_attn  # which registers the ops
    ops = torch.ops.adasplash
    known = {
        "_entmax_attn_forward": "query key value head_alpha q_seqlens kv_seqlens cu_seqlens_q cu_seqlens_k kv_starts "
        "alibi_slopes dropout_seed q_positions dropout_origin out row_state support tiles",
        "_entmax_attn_backward": "grad_out query key value row_state support tiles head_alpha q_seqlens kv_seqlens "
        "cu_seqlens_q cu_seqlens_k alibi_slopes kv_starts dropout_seed q_positions dropout_origin out dq dk dv dalpha",
        "_entmax_attn_summary": "query key row_state support tiles head_alpha q_seqlens kv_seqlens cu_seqlens_q "
        "cu_seqlens_k alibi_slopes kv_starts dropout_seed q_positions dropout_origin support_size largest_weight "
        "tile_counts",
        "_entmax_forward": "input row_alpha",
        "_entmax_backward": "grad_out output row_alpha grad_input grad_alpha",
    }
    for name, tensors in known.items():
        schema = getattr(ops, name).default._schema
        found = {x.name for x in (*schema.arguments, *schema.returns) if "Tensor" in str(x.type)} - {""}
        assert found == set(tensors.split())
