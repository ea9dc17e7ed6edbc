"""What test_distributed_models.py says of models of transformers over two processes: `python two_models.py RANK PORT
FOLDER` runs every case and writes what went wrong in each, "" if nothing did."""

import copy
import datetime
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dense_models import build, draw_ids
from ranks import run_cases

CASES = {}
IDS = draw_ids(4, 12)


def case(function):
    CASES[function.__name__] = function
    return function


def logits(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if name.endswith("alpha_logit")}


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def joined(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor of both processes, whole. Parts of it are DTensors, and plain tensors in older versions of transformers
    (5.2)."""
    x = whole(x)
    split = [dim for dim in range(x.dim()) if x.shape[dim] != shape[dim]]
    for dim in split:
        parts = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x.contiguous())
        x = torch.cat(parts, dim)
    return x


def seen_types(model: nn.Module) -> list[torch.dtype]:
    """Fills up with the type that each layer's logit has where α is made of it."""
    types: list[torch.dtype] = []
    for module in model.modules():
        if hasattr(module, "entmax_norm"):
            norm = module.entmax_norm
            norm.value = lambda norm=norm: types.append(norm.alpha_logit.dtype) or type(norm).value(norm)
    return types


def fully_sharded(dtype: torch.dtype, alone: bool) -> tuple[nn.Module, list[torch.dtype]]:
    model = build("bert", dtype=dtype, adasplash_learn_alpha=True).train()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    types = seen_types(model)
    if alone:
        shard_alpha(model, mesh=MESH)
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=MESH, mp_policy=policy)
    return fully_shard(model, mesh=MESH, mp_policy=policy), types


def train(model: nn.Module, rows: torch.Tensor, steps: int = 2) -> list[dict[str, torch.Tensor]]:
    """Gradients of the logits, and after all steps the logits."""
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    facts = []
    for _ in range(steps):
        model(rows).last_hidden_state.float().pow(2).mean().backward()
        facts.append({name: whole(each.grad).clone() for name, each in logits(model).items()})
        optimizer.step()
        optimizer.zero_grad()
    return [*facts, {name: whole(each).detach().clone() for name, each in logits(model).items()}]


@case
def fully_shard_without_mixed_precision_is_one_process():
    single = build("bert", dtype=torch.float32, adasplash_learn_alpha=True).train()
    sharded = copy.deepcopy(single)
    for layer in sharded.encoder.layer:
        fully_shard(layer, mesh=MESH)
    fully_shard(sharded, mesh=MESH)
    for found, expected in zip(train(sharded, IDS.chunk(2)[RANK]), train(single, IDS), strict=True):
        assert list(found) == list(expected)
        for name, x in found.items():
            torch.testing.assert_close(x, expected[name], atol=1e-6, rtol=1e-3)


@case
def fully_shard_with_mixed_precision():
    """α of a shard of its own is computed with in float32, and trains from float32; in its layer's it is a float32
    parameter too, and computed with in the layer's type."""
    for alone, expected in ((True, torch.float32), (False, torch.bfloat16)):
        model, types = fully_sharded(torch.float32, alone)
        before = {name: whole(each).detach().clone() for name, each in logits(model).items()}
        *gradients, after = train(model, IDS.chunk(2)[RANK])
        assert set(types) == {expected}, types
        for name, logit in logits(model).items():
            assert logit.dtype == after[name].dtype == gradients[0][name].dtype == torch.float32
            assert (after[name] != before[name]).all()


@case
def fully_shard_of_a_model_of_bfloat16():
    model, types = fully_sharded(torch.bfloat16, alone=True)
    train(model, IDS.chunk(2)[RANK])
    assert set(types) == {torch.float32}
    with record(model) as seen:
        model(IDS)
    assert all(1.4 < facts.alpha.min() <= facts.alpha.max() < 1.6 for facts in seen.layers.values())
    model, _ = fully_sharded(torch.bfloat16, alone=False)
    try:
        train(model, IDS.chunk(2)[RANK])
    except AssertionError as error:
        assert "uniform original parameter dtype" in str(error)
    else:
        raise AssertionError("FSDP2 takes mixed types now, which docs/transformers.md should say")


@case
def trainer_with_fsdp2():
    """By accelerate, which has it on GPUs only: on a CPU it is told so behind its back."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    for alone in (False, True):
        model = build("gpt2", "ForCausalLM", torch.float32, adasplash_learn_alpha=True)
        options = dict(use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no", bf16=True, weight_decay=0.1)
        arguments = TrainingArguments(
            FOLDER / "trainer", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, **options
        )
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["GPT2Block"],
            state_dict_type="FULL_STATE_DICT",
        )
        plugin.set_mixed_precision("bf16")
        state = trainer.accelerator.state
        state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
        trainer.is_fsdp_enabled = True
        assert trainer.accelerator.is_fsdp2
        if alone:
            shard_alpha(model)
        types = seen_types(model)
        trainer.train()
        assert isinstance(model.transformer.h[0], FSDPModule)
        assert types and set(types) == {torch.float32 if alone else torch.bfloat16}
        mine = {id(logit) for logit in logits(model).values()}
        decays = [
            group["weight_decay"]
            for group in trainer.optimizer.param_groups
            for each in group["params"]
            if id(each) in mine
        ]
        assert decays == [0.0, 0.0], decays
        expected = {name: whole(each).detach().clone() for name, each in logits(model).items()}
        assert all(each.dtype == torch.float32 and (each != 0.1).all() for each in expected.values())
        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        for name, x in expected.items():
            assert gathered[name].dtype == torch.float32 and torch.equal(gathered[name], x)


def saved(name: str, **options) -> Path:
    """A model's folder, written by the first process."""
    folder = FOLDER / name
    if RANK == 0:
        build("llama", "ForCausalLM", torch.float32, num_key_value_heads=2, **options).save_pretrained(folder)
    dist.barrier()
    return folder


def loaded(folder: Path, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@case
def tensor_parallel():
    """Logits and gradients of one process, with one α for all heads of a layer."""
    folder = saved("llama", adasplash_alpha=[1.3, 1.7])
    single, split = loaded(folder), loaded(folder, tp_plan="auto")
    assert split.model.layers[0].self_attn.config._attn_implementation == "adasplash"
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    results = []
    for model in (single, split):
        out = whole(model(IDS, attention_mask=mask).logits)
        out[mask.bool()].square().mean().backward()
        results.append((out.detach(), {name: each.grad for name, each in model.named_parameters()}))
    (out, gradients), (found, split_gradients) = results
    torch.testing.assert_close(found[mask.bool()], out[mask.bool()], atol=1e-5, rtol=1e-4)
    compared = 0
    for name, expected in gradients.items():
        grad = joined(split_gradients[name], expected.shape)
        assert grad.shape == expected.shape, (name, grad.shape)
        torch.testing.assert_close(grad, expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=1e-3)
        compared += 1
    assert compared == len(list(single.parameters()))


@case
def tensor_parallel_with_alpha_by_head():
    for name, options in (
        ("listed", dict(adasplash_alpha=[[1.2, 1.4, 1.6, 1.8]] * 2)),
        ("learned", dict(adasplash_learn_alpha=True)),
    ):
        model = loaded(saved(name, **options), tp_plan="auto")
        try:
            model(IDS)
        except RuntimeError as error:
            assert "a tensor-parallel plan goes with one α for all heads of a layer" in str(error), error
        else:
            raise AssertionError(f"{name}: α by head went through")


if __name__ == "__main__":
    RANK, PORT, FOLDER = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=PORT, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import init_device_mesh
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from adasplash.integrations.transformers import record, shard_alpha

    # What goes wrong in one process alone leaves the other waiting.
    dist.init_process_group("gloo", rank=RANK, world_size=2, timeout=datetime.timedelta(minutes=30))
    MESH = init_device_mesh("cpu", (2,))
    run_cases(CASES, FOLDER / f"{RANK}.json")
    dist.destroy_process_group()
