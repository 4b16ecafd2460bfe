"""Compute one step: what every student does, ConvNet's student, those of any network, and their memory."""
