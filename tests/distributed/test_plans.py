"""Tensor parallelism, FSDP and context parallelism as dimensions of one mesh; checkpoints that another number of
processes goes on from."""

import os
import re
import sys

import plan_ranks
import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import common
import ranks


def run(tmp_path_factory, world, *others):
    def run_all(folder):
        ranks.run_ranks(plan_ranks.__file__, lambda rank: [rank, world, folder, *others], world)

    return common.build_once(tmp_path_factory, f"plans_{world}", run_all)


@pytest.mark.slow
def test_two_processes(tmp_path_factory):
    ranks.check_outcomes(run(tmp_path_factory, 2))


@pytest.mark.builds
def test_four_processes(tmp_path_factory):
    ranks.check_outcomes(run(tmp_path_factory, 4, run(tmp_path_factory, 2)), 4)


@pytest.mark.builds
def test_eight_processes(tmp_path_factory):
    """All three dimensions at once."""
    ranks.check_outcomes(run(tmp_path_factory, 8), 8)


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_have_saved(tmp_path_factory):
    """Parameters, learned alpha among them, and the optimiser's state: the next step is the same."""
    folder = run(tmp_path_factory, 2)
    model = plan_ranks.Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    parameters, state = get_state_dict(model, optimizer)
    saved = {"model": parameters, "optimizer": state}
    checkpoint.load(saved, checkpoint_id=folder / "checkpoint", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    assert "layers.0.attention.alpha_logit" in saved["model"]
    plan_ranks.take_a_step(model, optimizer)
    expected = torch.load(folder / "after.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-8, rtol=1e-8)


@pytest.mark.builds
def test_the_page_as_it_stands(tmp_path):
    """docs/distributed.md by two processes: its Python, one block behind the other."""
    pytest.importorskip("transformers")
    page = (common.ROOT / "docs/distributed.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "program.py").write_text("\n".join(blocks))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    said = common.run(*torchrun, "program.py", cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
    assert said.count("torch.Size([2, 32])") == said.count("torch.Size([2, 64, 256])") == 2
