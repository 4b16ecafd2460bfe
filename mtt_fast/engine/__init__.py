"""The exact meta-gradient through N student steps: the two sweeps, the students, and the memory plan."""
