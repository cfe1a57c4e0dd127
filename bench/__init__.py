"""Benchmarks: `python -m bench.kernels`, `bench.compile`, ... Results go to bench/results as json, table and
plot."""
