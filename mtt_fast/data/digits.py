"""The 1,797 handwritten digits that come with scikit-learn: real data for a first run, with nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtt_fast.data.image_data import DatasetInfo
from mtt_fast.data.packing import Contents, Part, Source, key_of
from mtt_fast.errors import InputError

INFO = DatasetInfo("digits", (1, 8, 8), num_classes=10, num_train=1_442, num_test=355)


def source() -> Source:
    """Describe the digits: 1x8x8, ten classes; of each class every fifth image is a test image, the others train.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part), grey
    values 0 … 16. Raises `InputError`, when it is read, if scikit-learn is not installed.
    """
    return Source("digits", "digits", key_of(Path(), (), "digits"), _read)


def _read() -> Contents:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            f"digits: expected scikit-learn, which holds the images, found none ({error}); pip install 'mtt-fast[demo]'"
        ) from error
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[4::5]] = True
    return Contents(
        tuple("0123456789"), INFO.image_shape, Part(labels[~test], [images[~test]]), Part(labels[test], [images[test]])
    )
