"""The record in an expert's file beside its parameters, as text that survives a round trip."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtt_fast.errors import InputError
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.provenance import versions
from mtt_fast.storage.identity import UNKNOWN, DatasetIdentity
from mtt_fast.storage.records import check_fields, check_form
from mtt_fast.storage.text_files import MALFORMED, parse_json

FORMAT = "mtt_fast expert 2"  # raise the number when a reader of the old format would misread the new one
WAYPOINTS = "mtt_fast waypoints 2"
BEFORE_CHECKSUMS = {"mtt_fast expert 1": FORMAT, "mtt_fast waypoints 1": WAYPOINTS}
_RECORDED_HERE = {"train_epochs", "lr", "mom", "l2", "decay", "batch_size"}
"""Hyperparameters that experts trained by the commands have always recorded."""
TRAIN_AGAIN = "delete it and train it again with `python -m mtt_fast.experts`"


@dataclass(frozen=True)
class ExpertMetadata:
    """The record of an expert besides its parameters; its fields survive a round trip through JSON."""

    network: dict[str, Any]
    """kind, width, depth, in_channels, num_classes, image_size, …"""
    layout: str
    """the order of the flat parameters, `features.0.weight:128x3x3x3;…`, as `ParameterLayout.describe` writes it"""
    dataset: str
    fingerprint: str
    """digest of the data set's content"""
    whitening: str
    """as `DatasetIdentity.whitening`"""
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    """hyperparameters of its training, in any form; for an imported expert, only its origin"""
    seed: int = -1
    """-1 if not known"""
    accuracy: list[float] = dataclasses.field(default_factory=list)
    """on the test set, after every epoch; empty if it was not measured"""
    versions: dict[str, Any] = dataclasses.field(default_factory=versions)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """the other fields of the images' `DatasetIdentity`"""
    precision: str = ""
    """precision of the products of its training: fp32, tf32, fp16 or bf16; "" if not known"""
    made_of: str = ""
    """for a compressed expert, `TrajectoryStore.digest` of the uncompressed one"""

    @classmethod
    def of(cls, network: Trainable, identity: DatasetIdentity = UNKNOWN, **others: Any) -> ExpertMetadata:
        """Return the metadata of an expert of `network` that was trained on the images of `identity`, with the `others` as given.

        Raises `InputError` for a network without a description, such as a plain `nn.Module`.
        """
        if isinstance(network, type) or not hasattr(network, "layout"):
            found = type(network).__name__
            raise InputError(
                f"`network`: expected a ConvNet, or a FlatModule of a torch.nn.Module, found an object of {found}"
            )
        record = identity.record()
        own = {"dataset": record.pop("name")} | {name: record.pop(name) for name in ("fingerprint", "whitening")}
        return cls(network.describe(), network.layout.describe(), **own, data=record, **others)

    @property
    def identity(self) -> DatasetIdentity:
        """Return the identity of the images that the expert was trained on, as far as it is recorded."""
        own = {"name": self.dataset, "fingerprint": self.fingerprint, "whitening": self.whitening}
        return DatasetIdentity.from_record(own | self.data)

    @property
    def imported(self) -> bool:
        """Return whether the expert comes from other software, so that its hyperparameters are not known, or may mean something else."""
        return not self.hyperparameters.keys() >= _RECORDED_HERE

    def to_text(self) -> dict[str, str]:
        """Return the fields as the text that safetensors metadata can hold: JSON, each under its name."""
        return {field.name: json.dumps(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_text(cls, text: Mapping[str, str], where: str | os.PathLike[str]) -> ExpertMetadata:
        """Return the metadata in what `to_text` wrote. Raises `InputError`, which names the file `where`, for a broken one."""
        try:
            unknown = dict.fromkeys(("precision", "made_of"), '""') | {"data": "{}"}
            known = (unknown if text.get("format") in BEFORE_CHECKSUMS else {}) | dict(text)
            record = {field.name: parse_json(known[field.name]) for field in dataclasses.fields(cls)}
            check_fields(record, _TYPES)
            check_form(record["accuracy"], [int | float], "accuracy")
            ParameterLayout.from_text(record["layout"])
            metadata = cls(**record)
            metadata.identity  # noqa: B018 - a broken record shows here, with the file's name
            return metadata
        except MALFORMED as error:
            raise InputError(
                f"{where}: expected an expert's metadata, found none or broken ({error}); {TRAIN_AGAIN}"
            ) from error


_TYPES = {name: typing.get_origin(hint) or hint for name, hint in typing.get_type_hints(ExpertMetadata).items()}
"""The types of the metadata's fields."""
