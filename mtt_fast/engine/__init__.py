"""The exact meta-gradient through N student steps: the two sweeps and the memory plan; students/ computes one step."""
