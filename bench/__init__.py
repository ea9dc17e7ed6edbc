"""Benchmarks: α-entmax attention beside its peers (`bench.attention`), and threshold solvers (`bench.solver`)."""
