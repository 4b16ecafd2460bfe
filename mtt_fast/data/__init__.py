"""Data sets: from the files people have to packed uint8 images, memory-mapped, and what networks see of them."""

from mtt_fast.data.catalogue import NAMES, load
from mtt_fast.data.image_data import DatasetInfo, ImageData, Split, from_tensors
from mtt_fast.data.transform import Normalisation, transform_for

__all__ = ["NAMES", "DatasetInfo", "ImageData", "Normalisation", "Split", "from_tensors", "load", "transform_for"]
