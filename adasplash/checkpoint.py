"""What selective checkpointing is to keep of attention."""

import torch

#: The ops whose results are worth keeping where ``torch.utils.checkpoint`` would compute them again in the backward:
#: the forward of attention, padded and packed, with all that its backward needs. A policy sees these, and never
#: ``torch.ops.adasplash.entmax_attn``, which autograd takes apart before. As they are, or with what else is to be kept:
#:
#:     context_fn = functools.partial(create_selective_checkpoint_contexts, adasplash.ops_to_save)
#:     checkpoint(block, x, use_reentrant=False, context_fn=context_fn)
#:
#: The activation's forward, ``torch.ops.adasplash._entmax_forward.default``, is not among them: like softmax it costs
#: little more than reading what would be kept. Neither is alpha = 1 as a number, which is torch's own attention.
ops_to_save: list[torch._ops.OpOverload] = [torch.ops.adasplash._entmax_attn_forward.default]
