"""Make small training sets by other methods, and evaluate them by the same protocol: `python -m mtt_fast.baselines METHOD`.

Four methods choose real images (random, herding, forgetting, kmeans), and seven learn a set: by matching embeddings (dm) or
gradients (dc, dsa), or through the student's steps to a loss on real images (dd, ld, ratbptt, atbptt), by `mtt_fast.unroll`.
A method is a function in a file of its own; catalogue.py lists the methods, command.py runs one.
"""
