"""The machinery around the computation: CUDA graphs, prefetching, numerics, signals, seeds, memory."""
