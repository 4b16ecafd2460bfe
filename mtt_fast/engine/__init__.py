"""The exact meta-gradient through N student steps: the two sweeps, the students that answer for one step, the memory plan."""
