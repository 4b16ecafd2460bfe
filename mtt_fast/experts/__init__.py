"""Train experts on real images and save their parameters after every epoch: `python -m mtt_fast.experts`."""
