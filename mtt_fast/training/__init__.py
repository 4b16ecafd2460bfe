"""SGD on real or distilled images: experts, evaluations, and what both share."""
