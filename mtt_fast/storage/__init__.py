"""What lies on disk, and how it gets there whole: files, experts' trajectories, run folders, checkpoints, metrics."""
