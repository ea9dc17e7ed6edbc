"""`python dying_ranks.py RANK STORE`: two processes, of which the second one is gone before the second call."""

import datetime
import os
import sys

import torch
import torch.distributed as dist

from adasplash.distributed import entmax_attn_context_parallel

if __name__ == "__main__":
    rank, store = int(sys.argv[1]), sys.argv[2]
    wait = datetime.timedelta(hours=1)  # longer than the test waits: the error has to come before
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    x = torch.randn(1, 2, 8, 4, requires_grad=True)
    out = entmax_attn_context_parallel(x, x, x)
    if rank == 1:
        os._exit(0)
    for call in (out.sum().backward, lambda: entmax_attn_context_parallel(x, x, x)):
        try:
            call()
        except RuntimeError as error:
            print(error)
        else:
            sys.exit("went through alone")
    os._exit(0)  # what is left of the group would wait for the other one
