"""The kernels of attention, each with its spec."""
