"""Convolve 3×3 as conv.py does, with TMA loads: for sm_90 and later, and for planes that `tma_descriptors.fits` accepts."""

from __future__ import annotations

from functools import partial

from . import conv
from .tma_convolve import convolve
from .tma_correlate import correlate

conv3x3 = partial(conv.conv3x3, convolve=convolve)
conv3x3_dual = partial(conv.conv3x3_dual, convolve=convolve)
conv3x3_dual_input_gradient = partial(conv.conv3x3_dual_input_gradient, convolve=convolve)
conv3x3_dual_weight_gradient = partial(conv.conv3x3_dual_weight_gradient, correlate=correlate)
conv3x3_input_gradient = partial(conv.conv3x3_input_gradient, convolve=convolve)
conv3x3_input_gradient_tangent = partial(conv.conv3x3_input_gradient_tangent, convolve=convolve)
conv3x3_tangent = partial(conv.conv3x3_tangent, convolve=convolve)
conv3x3_weight_gradient = partial(conv.conv3x3_weight_gradient, correlate=correlate)
