"""Distil a data set: options, initial state, experts, segments, gradients, updates, evaluation, dry run."""
