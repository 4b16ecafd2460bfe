"""How a device is kept busy and a process behaves: CUDA graphs, prefetching, numerics, signals, seeds, memory."""
