"""Train networks by SGD on real or distilled images, for experts and for evaluations."""
