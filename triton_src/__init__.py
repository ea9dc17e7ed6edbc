"""The GPU kernels, and what turns them into machine code ahead of time. Nothing here is needed at run time."""
