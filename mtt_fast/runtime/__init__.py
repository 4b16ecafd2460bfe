"""Support for the computation: CUDA graphs, prefetching, numerics, signals, seeds, provenance, memory."""
