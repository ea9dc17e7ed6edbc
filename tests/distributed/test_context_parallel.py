"""Context parallelism: sequences sharded over two and over four processes, each case against one process."""

import dying_ranks
import parallel_ranks
import pytest
import torch

import adasplash.distributed
import common
import ranks


@pytest.mark.slow
@pytest.mark.parametrize("world", (2, pytest.param(4, marks=pytest.mark.builds)))
def test_as_one_process(tmp_path, world):
    ranks.run_ranks(parallel_ranks.__file__, lambda rank: [rank, world, tmp_path], world)
    ranks.check_outcomes(tmp_path, world)


@pytest.mark.slow
def test_four_processes(tmp_path):
    """Some of the cases, which all are run by four processes above: seconds instead of a minute."""
    methods = ("gather", "exchange", "both")
    cases = ["layout", *(f"plain_by_{method}" for method in methods), "slopes_by_gather", "same_bits_by_gather"]
    ranks.run_ranks(parallel_ranks.__file__, lambda rank: [rank, 4, tmp_path, *cases], 4)
    ranks.check_outcomes(tmp_path, 4)


@pytest.mark.slow
def test_a_process_that_died_is_an_error_of_the_others(tmp_path):
    ranks.run_ranks(dying_ranks.__file__, lambda rank: [rank, tmp_path / "store"])


def test_without_a_process_group():
    x = torch.zeros(1, 1, 4, 4)
    for call in (
        lambda: adasplash.distributed.shard(x, 2),
        lambda: adasplash.distributed.unshard(x, 2),
        lambda: adasplash.distributed.entmax_attn_context_parallel(x, x, x),
    ):
        with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
            call()


def test_importing_the_package_leaves_torch_distributed_alone():
    """Torch may be built without it."""
    out = common.run_python("import sys, adasplash; print('adasplash.distributed' in sys.modules)")
    assert out.strip() == "False"
