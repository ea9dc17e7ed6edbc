"""Models on a GPU: torch's attention replaced, and a learned α sharded. What they do on the CPU is tested elsewhere."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adasplash import patch_sdpa, scaled_dot_product_attention

pytestmark = pytest.mark.backends("cuda")


def keys_seen(lengths: list[int], keys: int) -> torch.Tensor:
    """(B, 1, 1, N), True for the first keys of each entry."""
    return (torch.arange(keys) < torch.tensor(lengths)[:, None])[:, None, None]


MASKS = {
    "none": None,
    "lengths": keys_seen([70, 130], 130),
    "channels": torch.arange(130) % 3 != 1,
    "triangle": torch.ones(130, 130).tril().bool(),
    "dense": torch.rand(130, 130, generator=torch.Generator().manual_seed(0)) < 0.8,
}


@pytest.mark.parametrize("mask", MASKS)
def test_results_and_gradients_are_the_cpus(backend, mask):
    def results(device):
        tensors = torch.randn(3, 2, 4, 130, 64, generator=torch.Generator().manual_seed(1)).mul(1.5).to(device)
        query, key, value = (x.clone().requires_grad_() for x in tensors)
        given = None if MASKS[mask] is None else MASKS[mask].to(device)
        out = scaled_dot_product_attention(query, key, value, given)
        return [x.cpu() for x in (out, *torch.autograd.grad(out.square().sum(), (query, key, value)))]

    for found, expected in zip(results("cuda"), results("cpu"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("compiled", (False, True))
def test_a_patched_encoder(backend, compiled):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    patch_sdpa(model)
    x, padding = torch.randn(3, 50, 64), torch.arange(50) >= torch.tensor([50, 20, 33])[:, None]
    expected = model(x, src_key_padding_mask=padding)
    on_gpu = copy.deepcopy(model).cuda()
    run = torch.compile(on_gpu, fullgraph=True) if compiled else on_gpu
    found = run(x.cuda(), src_key_padding_mask=padding.cuda())
    torch.testing.assert_close(found.cpu()[~padding], expected[~padding], atol=2e-4, rtol=1e-3)
    found[~padding.cuda()].square().sum().backward()
    assert all(each.grad.isfinite().all() for each in on_gpu.parameters())
    half = on_gpu.bfloat16()(x.cuda().bfloat16(), src_key_padding_mask=padding.cuda())
    torch.testing.assert_close(half.float().cpu()[~padding], expected[~padding], atol=0.1, rtol=0.1)


def test_timms_vision_transformer(backend):
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    patch_sdpa(model)
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    torch.testing.assert_close(model.cuda()(images.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)
    assert model.bfloat16()(images.cuda().bfloat16()).isfinite().all()


def test_a_learned_alpha_under_fully_shard(backend):
    """Over NCCL, with one rank: α of a shard of its own is made of its float32 logit, and the model learns as it does
    unsharded."""
    pytest.importorskip("transformers")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from adasplash.integrations.transformers import shard_alpha
    from dense_models import build, draw_ids

    def trained(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(3):
            model(draw_ids(4, 12).cuda()).last_hidden_state.float().pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        logits = {name: each for name, each in model.named_parameters() if name.endswith("alpha_logit")}
        return {name: getattr(each, "full_tensor", lambda each=each: each)().detach() for name, each in logits.items()}

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        mesh = dist.device_mesh.init_device_mesh("cuda", (1,))
        single = build("bert", dtype=torch.float32, adasplash_learn_alpha=True).train().cuda()
        for policy, near in (
            (MixedPrecisionPolicy(), 1e-5),
            (MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), 2e-3),
        ):
            sharded = copy.deepcopy(single)
            shard_alpha(sharded, mesh=mesh)
            for layer in sharded.encoder.layer:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(sharded, mesh=mesh, mp_policy=policy)
            found, expected = trained(sharded), trained(copy.deepcopy(single))
            assert list(found) == list(expected) and found
            for name, logit in found.items():
                assert logit.dtype == torch.float32
                torch.testing.assert_close(logit, expected[name], atol=near, rtol=near)
    finally:
        dist.destroy_process_group()
