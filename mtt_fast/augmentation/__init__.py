"""Augmentations whose random numbers are drawn apart from the operation."""
