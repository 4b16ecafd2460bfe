"""Define the protocols by which the field evaluates small sets: how networks are trained on a set, and when they are tested.

Accuracies can only be compared under the same protocol, so the log describes it (`EvaluationProtocol.describe`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.errors import InputError

_TEST_INTERVAL, _TEST_INTERVAL_OF_SOFT = 10, 20  # epochs between tests for the best epoch, as in DD-Ranking
# The same in NCFM's code for 2000 epochs, and for as many with 50 and more images per class
_TEST_INTERVAL_IN_NCFM, _TEST_INTERVAL_OF_MANY, _MANY_IMAGES = 100, 2, 50
_FEWEST_TESTS = 8  # of fewer epochs; in NCFM's configurations they are 6 in 300 epochs, and 8 in 40
# The last learning rate of the loop "cosine", as a share of the first, as in SelMatch's code
_MIN_LR_FACTOR = 0.01


@dataclass(frozen=True)
class EvaluationProtocol:
    """A protocol to train a network on a small set and to test it. The defaults are MTT's (its `evaluate_synset`).

    Unless `lr`, `loop` and `optimizer` say otherwise, training is SGD at the set's learning rate, and at a tenth of it after half of
    the epochs.
    """

    epochs: int = 1000
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    augment: str = "color_crop_cutout_flip_scale_rotate"
    name: str = "mtt"
    loop: Literal["public", "scheduler", "cosine", "fifths"] = "public"
    """public: `epochs` + 1 epochs; after `epochs` // 2 + 2 of them a new optimizer at a tenth of the rate.
    scheduler: `epochs` epochs; after `epochs` // 2 of them a tenth of the rate in the same optimizer.
    cosine: `epochs` + 1 epochs; the rate falls to a hundredth along half a period of the cosine.
    fifths: `epochs` epochs; half the rate after each fifth of them"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """adamw: torch.optim.AdamW, which has no `momentum`"""
    lr: float | None = None
    """learning rate in place of the set's, see `initial_lr`"""
    combined: bool = False
    """augment each distilled image by an operation of its own, and real images in the set by a crop and a flip
    (mtt_fast/augmentation/combined.py)"""
    cutmix: bool = False
    """mix the images of half the batches by CutMix, and augment each image by a flip, colors and another operation
    (mtt_fast/augmentation/flip_and_color.py)"""
    best_epoch: bool = False
    """report the highest accuracy of all tests (`test_interval`), not the accuracy after the last epoch"""

    @property
    def total_epochs(self) -> int:
        """Return the number of epochs of a training."""
        return self.epochs + (self.loop in ("public", "cosine"))

    @property
    def epochs_before_drop(self) -> int:
        """Return the number of epochs before the learning rate is divided by ten. With the loop "cosine" this never happens."""
        return self.epochs // 2 + (2 if self.loop == "public" else 0)

    def initial_lr(self, set_lr: float) -> float:
        """Return the learning rate of the first epoch: the protocol's, or else the set's, `set_lr`."""
        return set_lr if self.lr is None else self.lr

    def lr_factor(self, epoch: int) -> float:
        """Return the learning rate in `epoch`, counted from 0, as a multiple of the first epoch's."""
        if self.loop == "cosine":
            return _MIN_LR_FACTOR + (1 - _MIN_LR_FACTOR) * (1 + math.cos(math.pi * epoch / max(self.epochs, 1))) / 2
        if self.loop == "fifths":
            return 0.5 ** sum(epoch >= fifth * self.epochs // 5 for fifth in range(1, 5))
        return 1.0 if epoch < self.epochs_before_drop else 0.1

    def test_interval(self, *, soft: bool, ipc: int) -> int:
        """Return the number of epochs between tests for the best epoch, with `soft` labels or class indices and `ipc` images per class."""
        if self.loop != "fifths":
            return _TEST_INTERVAL_OF_SOFT if soft else _TEST_INTERVAL
        if self.epochs < _FEWEST_TESTS * _TEST_INTERVAL_IN_NCFM:
            return max(1, self.epochs // _FEWEST_TESTS)
        return _TEST_INTERVAL_IN_NCFM if ipc < _MANY_IMAGES else _TEST_INTERVAL_OF_MANY

    def is_tested(self, epoch: int, test_interval: int) -> bool:
        """Return whether the network is tested after `epoch` (counted from 1), with the number that `test_interval` returns."""
        return epoch == self.total_epochs or (self.best_epoch and epoch % test_interval == 0)

    def describe(self) -> str:
        """Return the protocol in words, on one line."""
        sgd = f"SGD with momentum {self.momentum:g} and"
        optimizer = f"{sgd if self.optimizer == 'sgd' else 'AdamW with'} weight decay {self.weight_decay:g}"
        drop = {
            "public": f"a tenth of it after {self.epochs_before_drop} epochs in a new optimizer",
            "scheduler": f"a tenth of it after {self.epochs_before_drop} epochs in the same optimizer",
            "cosine": f"which falls to {_MIN_LR_FACTOR:g} of it along a cosine",
            "fifths": "half of it after each fifth of the epochs",
        }[self.loop]
        lr = "the set's learning rate" if self.lr is None else f"learning rate {self.lr:g}"
        return (
            f"protocol {self.name}: {self.total_epochs} epochs in batches of {self.batch_size}, {optimizer}, {lr}, "
            f"{drop}, augmentation {self.augment}{self._describe_augmentation()}; {self._describe_reported_epoch()}"
        )

    def _describe_augmentation(self) -> str:
        """Return how the operations of `augment` are used, as the end of a phrase."""
        how = ""
        if augment_by_strategy(self.augment) is not None:
            if self.combined:
                how = ", an operation of its own for each image, for real images in a distilled set a crop and a flip"
            elif self.cutmix:
                how = " (flip and colors of all images, one of the others in each step, no cutout)"
        return f"{how}, CutMix in half the steps" if self.cutmix else how

    def _describe_reported_epoch(self) -> str:
        if not self.best_epoch:
            return "the last epoch is reported"
        every, of_many = (self.test_interval(soft=False, ipc=ipc) for ipc in (1, _MANY_IMAGES))
        tests = f"of every {every}th epoch ({_TEST_INTERVAL_OF_SOFT}th with soft labels)"
        if self.loop == "fifths":
            many = f" ({of_many} with {_MANY_IMAGES} and more images per class)" if of_many < every else ""
            tests = f"after every {every} epochs{many}"
        return f"the BEST {tests} and the last is reported, chosen on the test images"

    def record(self) -> dict[str, Any]:
        """Return the settings, and their description, as a record."""
        return dataclasses.asdict(self) | {"text": self.describe()}


PROTOCOLS = {
    "mtt": EvaluationProtocol(),
    "datm": EvaluationProtocol(name="datm", batch_size=128),
    "ddranking": EvaluationProtocol(name="ddranking", loop="scheduler", best_epoch=True),
    "selmatch": EvaluationProtocol(name="selmatch", batch_size=128, loop="cosine", lr=0.1, combined=True),
    "ncfm": EvaluationProtocol(
        name="ncfm", epochs=2000, batch_size=128, loop="fifths", optimizer="adamw", lr=1e-3, weight_decay=0.01,
        cutmix=True, best_epoch=True,
    ),
}  # fmt: skip
"""Protocols by name.

mtt: the public MTT code, and FTD, TESLA and ATT, which share it.
datm: the same loop in batches of 128, as DATM's configurations say (soft labels come with the set).
    Its authors' numbers are of the set with the highest accuracy on the test images: `best.safetensors` of a run.
ddranking: DD-Ranking 0.2, which reports the best epoch. For a set without a learning rate it tries five and keeps the one
    that is best on the test images; here the caller gives the rate.
selmatch: SelMatch's code, for its sets of hundreds of images per class, on ResNet18BN. Its authors' numbers are of the set with
    the highest accuracy on the test images, as DATM's.
ncfm: NCFM's code with its configurations, whose weight decay does not reach the optimizer: it is torch.optim.AdamW's own.
"""


def published_protocol(name: str) -> EvaluationProtocol:
    """Return the protocol called `name`, with its published settings. Raises `InputError` for another name."""
    protocol = PROTOCOLS.get(name)
    if protocol is None:
        raise InputError(f"`protocol` {name}: expected {', '.join(PROTOCOLS)}")
    return protocol


def protocol_by_name(
    name: str, *, epochs: int | None, batch_size: int | None, augment: str, best_epoch: bool
) -> EvaluationProtocol:
    """Return the protocol called `name` with this augmentation and, if given, these `epochs` and this batch size.

    `best_epoch` reports the best epoch even if the protocol reports the last. Raises `InputError` for an unknown name.
    """
    published = published_protocol(name)
    protocol = dataclasses.replace(
        published,
        epochs=published.epochs if epochs is None else epochs,
        batch_size=published.batch_size if batch_size is None else batch_size,
        augment=augment,
        best_epoch=best_epoch or published.best_epoch,
    )
    if protocol.total_epochs < 1:
        raise InputError(f"`epoch_eval_train` {epochs}: expected at least 1 with `protocol` {name}")
    return protocol
