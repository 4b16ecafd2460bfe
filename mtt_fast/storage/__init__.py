"""Files on disk, written whole or not at all: experts' trajectories, run folders, checkpoints, metrics."""
