"""Every option that a call with gradients takes, at once, in both forms: for what PyTorch puts around an op."""

import torch

import adasplash
from common import make_inputs


class Padded(torch.nn.Module):
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        alpha: torch.Tensor,
        q_seqlens: torch.Tensor,
        kv_seqlens: torch.Tensor,
        slopes: torch.Tensor,
    ) -> torch.Tensor:
        return adasplash.entmax_attn(
            query,
            key,
            value,
            alpha,
            True,
            0.3,
            q_seqlens,
            kv_seqlens,
            window=(20, -1),
            alibi_slopes=slopes,
            kv_starts=kv_seqlens // 3,
            dropout_p=0.3,
            dropout_seed=kv_seqlens.long().sum(),
            q_positions=kv_seqlens // 2 - 5,
            dropout_origin=kv_seqlens[:, None] + torch.arange(4, device=query.device),
        )


class Packed(torch.nn.Module):
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        alpha: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        slopes: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> torch.Tensor:
        return adasplash.entmax_attn_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            alpha,
            True,
            0.3,
            window=(20, -1),
            alibi_slopes=slopes,
            dropout_p=0.3,
            dropout_seed=cu_seqlens_k.long().sum(),
            q_positions=cu_seqlens_k.diff() // 2 - 5,
            dropout_origin=cu_seqlens_k[1:, None] + torch.arange(4, device=query.device),
        )


DIFFERENTIABLE = 4  # the first arguments of both: query, key, value and alpha
ALPHA = (1.0, 1.5, 1.7, 2.0)


def padded_arguments(q_lengths, k_lengths, device="cpu"):
    batch = len(q_lengths)
    inputs = make_inputs(batch, 4, max(q_lengths) + 2, max(k_lengths) + 3, kv_heads=2, device=device)
    lengths = [torch.tensor(x, dtype=torch.int32, device=device) for x in (q_lengths, k_lengths)]
    slopes = torch.linspace(0.1, 0.5, batch * 4, device=device).reshape(batch, 4)
    return (*inputs, torch.tensor(ALPHA, device=device), *lengths, slopes)


def packed_arguments(q_lengths, k_lengths, device="cpu"):
    batch = len(q_lengths)
    inputs = make_inputs(1, 4, sum(q_lengths), sum(k_lengths), kv_heads=2, device=device)
    inputs = [x[0].transpose(0, 1).contiguous() for x in inputs]
    ends = [torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (q_lengths, k_lengths)]
    slopes = torch.linspace(0.1, 0.5, batch * 4, device=device).reshape(batch, 4)
    return (*inputs, torch.tensor(ALPHA, device=device), *ends, slopes, max(q_lengths), max(k_lengths))


def resolved(inputs, alpha=1.5, is_causal=False, scale=None):
    """The private ops' options, for padded tensors and alpha as a number."""
    m, n = inputs.query.shape[2], inputs.key.shape[2]
    return None, alpha, is_causal, scale, None, None, None, None, m, n, [-1, -1], None


FORMS = {"padded": (Padded, padded_arguments), "packed": (Packed, packed_arguments)}


def run(function, arguments, training=True):
    """out and, where training, the gradients of query, key, value and alpha."""
    if not training:
        with torch.no_grad():
            return [function(*arguments)]
    leaves = [x.detach().requires_grad_() for x in arguments[:DIFFERENTIABLE]]
    out = function(*leaves, *arguments[DIFFERENTIABLE:])
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
