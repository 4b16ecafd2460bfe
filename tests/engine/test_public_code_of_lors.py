"""Compare iterations on pairs of images and texts with those that LoRS's code computed (tests/distill/public_code/README.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import mtt_fast
from mtt_fast import FlatModule, InputError, matching_loss, unroll
from mtt_fast.engine.students.protocol import Loss
from mtt_fast.testing import assert_close

RECORD = load_file(Path(__file__).parents[1] / "distill" / "public_code" / "lors.safetensors")
SIZE, PIXELS, RANK, ALPHA, TEMPERATURE = (3, 6, 6), 108, 2, 3.0, 0.07
RATES = {"images": 0.2, "texts": 0.2, "lr_img": 1e-5, "lr_txt": 1e-5}
"""Learning rates of all that is learned; that of the similarities is 0.1."""


class Projection(nn.Module):
    """The projection of a text's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(5, 6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, texts: Tensor) -> Tensor:
        projected = self.first(texts)
        return self.norm(projected + self.second(F.gelu(projected)))  # type: ignore[no-any-return]


class Towers(nn.Module):
    """Return the features (b, 2 · 6) of images and texts, which are the parts of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Unflatten(1, SIZE), nn.Conv2d(3, 3, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 6)
        )
        self.text = Projection()

    def forward(self, rows: Tensor) -> Tensor:
        image, text = self.image(rows[:, :PIXELS]), self.text(rows[:, PIXELS:])
        return torch.cat([F.normalize(image), F.normalize(text)], 1)


def low_rank(labels: Tensor) -> Tensor:
    """Return the similarities of a batch from its diagonal and its two factors."""
    diagonal, left, right = labels.split([1, RANK, RANK], 1)
    return diagonal.flatten().diag() + left @ right.T * (ALPHA / RANK)  # type: ignore[no-any-return]


def of_matrix(labels: Tensor) -> Tensor:
    """Select the columns of a batch by its indices, the last column."""
    return labels[:, labels[:, -1].long()]


def weighted_bce(logits: Tensor, similarities: Tensor) -> Tensor:
    chance, positive = logits.sigmoid(), (similarities.detach() > 0.5).to(logits.dtype)
    losses = -similarities * (chance + 1e-6).log() - (1 - similarities) * (1 - chance + 1e-6).log()
    return sum((losses * mask).sum() / (mask.sum() + 1e-6) for mask in (positive, 1 - positive)) / 2  # type: ignore[return-value]


def info_nce(logits: Tensor, similarities: Tensor) -> Tensor:
    return -(similarities * (logits.log_softmax(0) + logits.log_softmax(1))).sum(1).mean() / 2


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Loss]] = {
    "wbce": (low_rank, weighted_bce),
    "infonce": (low_rank, info_nce),
    "full": (of_matrix, F.binary_cross_entropy_with_logits),
}


def first_values(name: str) -> dict[str, Tensor]:
    """Return all that is learned in a case, before the first iteration."""
    count = len(RECORD["images"])
    lr_img, lr_txt = torch.tensor([0.02, 0.03], dtype=torch.float64)
    if name == "full":
        similarities = {"matrix": torch.eye(count).double()}
    else:
        similarities = {"diagonal": torch.ones(count).double(), "left": RECORD["left"], "right": RECORD["right"]}
    values = {"images": RECORD["images"], "texts": RECORD["texts"], "lr_img": lr_img, "lr_txt": lr_txt, **similarities}
    return {key: value.clone().requires_grad_() for key, value in values.items()}


def grand_loss(
    name: str, values: dict[str, Tensor], iteration: int, gradient: Literal["exact", "truncated"], *, merged: bool
) -> Tensor:
    """Return the matching loss of an iteration: of both towers together (`merged`), or the sum of one loss for each."""
    net, (similarities, criterion) = FlatModule(Towers().double()), CASES[name]
    batches, epoch = RECORD["batches"][iteration], int(RECORD["starts"][iteration])
    start, target = (torch.cat([RECORD["image_rows"][row], RECORD["text_rows"][row]]) for row in (epoch, epoch + 1))
    split = RECORD["image_rows"].shape[1]

    rows = torch.cat([values["images"].flatten(1), values["texts"]], 1)
    if name == "full":
        labels = torch.cat([values["matrix"], torch.arange(len(rows))[:, None]], 1)
    else:
        labels = torch.cat([values["diagonal"][:, None], values["left"], values["right"]], 1)
    lr = torch.cat([values["lr_img"].expand(split), values["lr_txt"].expand(net.num_parameters - split)])

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        image, text = features.chunk(2, 1)
        return criterion(image @ text.T / TEMPERATURE, similarities(labels))

    end = unroll(net, start, rows, labels, lr.expand(len(batches), -1), batches, loss=loss, gradient=gradient)[-1]
    if merged:
        return matching_loss(end, start, target)
    parts = zip(*(vector.tensor_split([split]) for vector in (end, start, target)), strict=True)
    return torch.stack([matching_loss(*part) for part in parts]).sum()


@pytest.mark.parametrize("name", CASES)
def test_the_exact_gradient_is_that_of_the_code_without_truncation(name: str) -> None:
    values = first_values(name)
    loss = grand_loss(name, values, 0, "exact", merged=name == "infonce")
    loss.backward()
    assert_close("loss", loss, RECORD[f"{name}.exact_loss"], 1e-10)
    for key, value in values.items():
        assert value.grad is not None
        assert_close(key, value.grad, RECORD[f"{name}.exact.{key}"], 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_iterations_are_those_of_the_code(name: str) -> None:
    """Take the code's gradients, which are truncated; with `--merge_loss_branches` those of the rates are not merged."""
    values = first_values(name)
    optimizer = torch.optim.SGD(
        [{"params": [value], "lr": RATES.get(key, 0.1)} for key, value in values.items()], momentum=0.5
    )
    rates = [values["lr_img"], values["lr_txt"]]
    for iteration, expected in enumerate(RECORD[f"{name}.losses"]):
        optimizer.zero_grad()
        loss = grand_loss(name, values, iteration, "truncated", merged=False)
        if name == "infonce":
            of_rates = torch.autograd.grad(loss, rates)
            grand_loss(name, values, iteration, "truncated", merged=True).backward()
            rates[0].grad, rates[1].grad = of_rates
        else:
            loss.backward()
        assert_close("loss", loss, expected, 1e-10)
        optimizer.step()
    for key, first in first_values(name).items():
        assert_close(f"change of {key}", values[key] - first, RECORD[f"{name}.{key}"] - first, 1e-10)


def test_the_block_on_the_page_computes_the_exact_gradient() -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    (block,) = re.findall(r"^```python\n(class Encoders.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    values, towers, epoch = first_values("wbce"), Towers().double(), int(RECORD["starts"][0])
    image_rows, text_rows = RECORD["image_rows"], RECORD["text_rows"]
    start, target = (torch.cat([image_rows[row], text_rows[row]]) for row in (epoch, epoch + 1))
    space: dict[str, Any] = {
        "torch": torch, "F": F, "mtt_fast": mtt_fast, "image_encoder": towers.image[1:], "text_projection": towers.text,
        "size": SIZE, "pixels": PIXELS, "rank": RANK, "alpha": ALPHA, "temperature": TEMPERATURE,
        "contrastive_criterion": weighted_bce, "image_syn": values["images"], "text_syn": values["texts"],
        "diag_weight": values["diagonal"], "left": values["left"], "right": values["right"],
        "syn_lr_img": values["lr_img"], "syn_lr_txt": values["lr_txt"], "order": RECORD["batches"][0],
        "start": start, "target": target, "split": image_rows.shape[1],
    }  # fmt: skip
    exec(block, space)
    for key, value in values.items():
        assert value.grad is not None
        assert_close(key, value.grad, RECORD[f"wbce.exact.{key}"], 1e-10)


def test_similarities_that_the_loss_reads_from_elsewhere_are_refused() -> None:
    """Check the first try of a user of the code: its similarities and its temperature are parameters of modules."""
    net, rows = FlatModule(Towers()), torch.randn(4, PIXELS + 5, requires_grad=True)
    matrix = nn.Parameter(torch.eye(4))

    def loss(features: Tensor, _: Tensor) -> Tensor:
        image, text = features.chunk(2, 1)
        return info_nce(image @ text.T, matrix[: len(image), : len(image)])

    with pytest.raises(InputError, match="`loss`: expected no tensor that requires a gradient besides its arguments"):
        unroll(net, net.init(), rows, torch.arange(4), 0.1, [torch.arange(4)], loss=loss)
