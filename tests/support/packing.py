"""Sequences of different lengths packed behind each other, for the tests of `entmax_attn_varlen`."""

import torch

from adasplash import entmax_attn_varlen
from common import Inputs, check_gradients, make_inputs


def packed(q_lengths, k_lengths, device="cpu", int_type=torch.int32, **options):
    """Inputs (tokens, heads, D), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    inputs = make_inputs(batch=1, m=sum(q_lengths), n=sum(k_lengths), device=device, **options)
    inputs = Inputs(*(x[0].transpose(0, 1).contiguous() for x in inputs))
    ends = [torch.tensor([0, *x]).cumsum(0).to(device, int_type) for x in (q_lengths, k_lengths)]
    return inputs, (*ends, max(q_lengths, default=0), max(k_lengths, default=0))


def alone(inputs, lengths, b):
    """Sequence b as a padded batch of one, and the tokens that are its own in query and in key."""
    q, k = (slice(int(ends[b]), int(ends[b + 1])) for ends in lengths[:2])
    parts = (x[part] for x, part in zip(inputs, (q, k, k), strict=True))
    return Inputs(*(x.transpose(0, 1)[None].contiguous() for x in parts)), (q, k)


def check_packed(inputs, lengths, *, op=entmax_attn_varlen, **keywords):
    """`check_gradients` with the lengths as the first options of both the op and the reference."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return check_gradients(op, inputs, **dict(zip(names, lengths, strict=True)), **keywords)
