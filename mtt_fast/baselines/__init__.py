"""Other ways to a small training set, measured by the same protocol: `python -m mtt_fast.baselines METHOD`.

Chosen real images (random, herding, forgetting, kmeans), and sets that are learned: by matching embeddings (dm) or
gradients (dc, dsa), or through the student's steps to a loss on real images (dd, ld), by `mtt_fast.unroll` itself.
A method is a function in a file of its own; catalogue.py lists them, command.py runs one.
"""
