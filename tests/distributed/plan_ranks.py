"""What test_plans.py says of plans over several dimensions of a mesh, run by several processes: `python plan_ranks.py
RANK WORLD FOLDER [SAVED]` runs the cases of that many, and writes what went wrong in each, "" if nothing did. SAVED is
the folder in which two processes ran theirs."""

import copy
import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from adasplash import EntmaxAttention
from adasplash.distributed import ContextParallel, context_parallel, shard, unshard
from ranks import run_cases

CASES = {2: {}, 4: {}, 8: {}}
TENSOR_PARALLEL = {
    **{f"layers.*.attention.{name}_proj": ColwiseParallel() for name in "qkv"},
    "layers.*.attention.out_proj": RowwiseParallel(),
}
BATCH, TOKENS, WIDTH = 2, 16, 8
DIMENSIONS = ("data", "context", "tensor")


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = EntmaxAttention(WIDTH, 8, head_dim=4, is_causal=True, dtype=torch.float64, **options)
        self.norm = nn.LayerNorm(WIDTH, dtype=torch.float64)

    def forward(self, x, **lengths):
        return x + self.attention(self.norm(x), **lengths)


class Model(nn.Module):
    """Two layers, of which the first learns its alpha."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(learn_alpha=True), Layer(num_kv_heads=4, window=(6, -1))])

    def forward(self, x, **lengths):
        for layer in self.layers:
            x = layer(x, **lengths)
        return x


def model():
    torch.manual_seed(0)
    made = Model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    return made


def planned(made, shape, method="gather"):
    """The model under FSDP over data and context, context parallelism and tensor parallelism; and its mesh."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)
    if shape[2] > 1:
        parallelize_module(made, mesh["tensor"], TENSOR_PARALLEL)
    if shape[1] > 1:
        parallelize_module(made, mesh["context"], {"layers.*.attention": ContextParallel(method)})
    of_data = mesh["data", "context"]._flatten("data_context")
    for part in (*made.layers, made):
        fully_shard(part, mesh=of_data)
    return mesh


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def loss_of(out, scale=1):
    return out.square().sum() * scale


def my_part(mesh, x):
    """The batch over data, the tokens over context."""
    rows = x.chunk(mesh["data"].size())[mesh["data"].get_local_rank()]
    return shard(rows, 1, mesh["context"].get_group()) if mesh["context"].size() > 1 else rows


def check(shape, method="gather"):
    alone = model()
    split = copy.deepcopy(alone)
    mesh = planned(split, shape, method)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    expected = alone(x)
    loss_of(expected).backward()
    out = split(my_part(mesh, x))
    torch.testing.assert_close(out, my_part(mesh, expected.detach()), atol=1e-9, rtol=1e-9)
    loss_of(out, mesh["data"].size() * mesh["context"].size()).backward()  # FSDP averages gradients
    for (name, one), other in zip(alone.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(whole(other.grad), one.grad, atol=1e-8, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


SHAPES = {2: ((2, 1, 1), (1, 2, 1), (1, 1, 2)), 4: ((2, 2, 1), (1, 2, 2), (2, 1, 2)), 8: ((2, 2, 2),)}
for world, shapes in SHAPES.items():
    for shape in shapes:
        name = "_".join(f"{size}_{dimension}" for size, dimension in zip(shape, DIMENSIONS, strict=True))
        CASES[world][name] = lambda shape=shape: check(shape)
        if shape[1] > 1:
            CASES[world][f"{name}_by_exchange"] = lambda shape=shape: check(shape, "exchange")


def case(function):
    CASES[2][function.__name__] = function
    return function


@case
def lengths_and_dropout_over_context():
    """Padding on the right, on the left, and the dropout that one process would have."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    alone = EntmaxAttention(WIDTH, 4, is_causal=True, dropout=0.3, dtype=torch.float64)
    split = parallelize_module(copy.deepcopy(alone), mesh, ContextParallel())
    for lengths in (dict(kv_seqlens=torch.tensor([16, 5])), dict(kv_starts=torch.tensor([3, 0])), {}):
        torch.manual_seed(3)
        expected = alone(x, **lengths)
        torch.manual_seed(3 + RANK)
        torch.testing.assert_close(unshard(split(shard(x, 1), **lengths), 1), expected, atol=1e-9, rtol=1e-9)


@case
def both_over_two_dimensions():
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    alone = EntmaxAttention(WIDTH, 4, is_causal=True, dtype=torch.float64)
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("hosts", "gpus"))
        split = parallelize_module(copy.deepcopy(alone), mesh, ContextParallel("both"))
        torch.testing.assert_close(unshard(split(shard(x, 1, mesh)), 1, mesh), alone(x), atol=1e-9, rtol=1e-9)


@case
def buffers_are_shards_within_the_context():
    mesh = init_device_mesh("cpu", (2,))
    tokens, positions = torch.arange(2 * TOKENS).view(2, TOKENS), torch.arange(TOKENS)
    before, address = tokens.clone(), tokens.data_ptr()
    buffers = dict(buffers=[tokens, positions], buffer_seq_dims=[1, 0])
    with context_parallel(mesh, **buffers, no_restore_buffers=[positions]):
        assert torch.equal(tokens, shard(before, 1)) and torch.equal(positions, shard(torch.arange(TOKENS), 0))
    assert torch.equal(tokens, before) and tokens.data_ptr() == address
    assert positions.shape == (TOKENS // 2,)
    try:
        with context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]):
            raise KeyError("of the caller")
    except KeyError:
        assert torch.equal(tokens, before)
    for options, words in (
        (dict(buffers=[tokens]), "a dimension for each of 1 buffers, got 0"),
        (dict(buffers=[tokens], buffer_seq_dims=[1], no_restore_buffers=[before]), "must be among buffers"),
        (dict(buffers=[torch.zeros(4, requires_grad=True)], buffer_seq_dims=[0]), "must not require a gradient"),
    ):
        try:
            with context_parallel(mesh, **options):
                raise AssertionError("nothing was said")
        except ValueError as error:
            assert words in str(error)


@case
def plans_refuse():
    mesh = init_device_mesh("cpu", (2,))
    for error, words, function in (
        (ValueError, "ContextParallel: method must be", lambda: ContextParallel("ring")),
        (
            TypeError,
            "must be EntmaxAttention, got Linear",
            lambda: parallelize_module(nn.Linear(2, 2), mesh, ContextParallel()),
        ),
    ):
        try:
            function()
        except error as raised:
            assert words in str(raised)
        else:
            raise AssertionError("nothing was said")


@case
def checkpoint_of_two_processes():
    """A step, and what it leaves, saved by both: test_plans.py goes on with it in one process."""
    split = model()
    mesh = planned(split, (1, 2, 1))
    optimizer = torch.optim.SGD(split.parameters(), lr=0.01, momentum=0.9)
    take_a_step(split, optimizer, lambda x: my_part(mesh, x), scale=2)
    parameters, state = get_state_dict(split, optimizer)
    checkpoint.save({"model": parameters, "optimizer": state}, checkpoint_id=FOLDER / "checkpoint")
    take_a_step(split, optimizer, lambda x: my_part(mesh, x), scale=2)
    after = {name: whole(x).detach() for name, x in split.named_parameters()}
    if RANK == 0:
        torch.save(after, FOLDER / "after.pt")


def four_processes_go_on_with_what_two_have_saved():
    """Over data and context, where the two had context alone: the next step is theirs."""
    split = model()
    mesh = planned(split, (2, 2, 1))
    optimizer = torch.optim.SGD(split.parameters(), lr=0.01, momentum=0.9)
    parameters, state = get_state_dict(split, optimizer)
    saved = {"model": parameters, "optimizer": state}
    checkpoint.load(saved, checkpoint_id=SAVED / "checkpoint")
    set_state_dict(split, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    take_a_step(split, optimizer, lambda x: my_part(mesh, x), scale=4)
    after = torch.load(SAVED / "after.pt")
    for name, parameter in split.named_parameters():
        torch.testing.assert_close(whole(parameter).detach(), after[name], atol=1e-8, rtol=1e-8)


CASES[4]["four_processes_go_on_with_what_two_have_saved"] = four_processes_go_on_with_what_two_have_saved


def take_a_step(trained, optimizer, part=lambda x: x, scale=1):
    torch.manual_seed(1)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    loss_of(trained(part(x)), scale).backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    RANK, WORLD, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    SAVED = Path(sys.argv[4]) if sys.argv[4:] else None
    torch.set_num_threads(1)
    wait = datetime.timedelta(minutes=30)
    store = f"file://{FOLDER / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=RANK, world_size=WORLD, timeout=wait)
    run_cases(CASES[WORLD], FOLDER / f"{RANK}.json")
    dist.destroy_process_group()
