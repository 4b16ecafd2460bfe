"""Parametrisations of the synthetic images: what is learned in place of their pixels."""
