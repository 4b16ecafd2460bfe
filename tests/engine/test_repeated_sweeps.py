"""Check that what changed before the backward pass, which computes each step again, is refused, and that rounding is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtt_fast import Augmentation, ConvNet, FlatModule, InputError, matching_loss, unroll
from mtt_fast.engine.backward_checks import check_repeated
from tests.engine.trial_cases import BATCHES, LABELS, with_layer


def test_a_student_that_has_diverged_is_not_taken_for_one_that_changes() -> None:
    net = FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    start = torch.full((net.num_parameters,), torch.nan)
    path = unroll(net, start, torch.randn(6, 3, 2, 2), LABELS, 0.1, BATCHES, microbatch=2)
    assert path.isnan().all()


class Changing:
    """A network, a loss and an augmentation that read an attribute, which may change after the call."""

    mixes_samples = False

    def __init__(self) -> None:
        self.net, self.factor = FlatModule(with_layer(nn.Identity())), 1.0
        self.num_parameters = self.net.num_parameters

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        return self.net(theta, images) * self.factor


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
@pytest.mark.parametrize("part", ["net", "loss", "augment"])
def test_what_changes_before_the_backward_pass_is_refused(part: str, options: dict[str, Any]) -> None:
    """Sum the losses of several calls, one for each factor, as of several experts: each call's steps are computed again at the last one."""
    changing, images = Changing(), torch.randn(6, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    loss = (lambda logits, labels: F.cross_entropy(logits * changing.factor, labels)) if part == "loss" else None
    augment = Augmentation(lambda *_: None, lambda rows, _: rows * changing.factor) if part == "augment" else None
    net: Any = changing if part == "net" else ConvNet(2, 3, 6, 4, 1)
    start = changing.net.init() if part == "net" else net.init(torch.Generator().manual_seed(0)).double()

    def end(factor: float) -> Tensor:
        changing.factor = factor
        path: Tensor = unroll(net, start, images, LABELS, 0.3, BATCHES, loss=loss, augment=augment, **options)
        return path[-1].sum()

    end(1.0).backward()
    (end(1.0) + end(1.0)).backward()
    with pytest.raises(InputError, match="expected the same network, loss, augmentation and path in the backward pass"):
        (end(1.0) + end(1.5)).backward()


def test_attention_in_half_precision_is_not_taken_for_a_change() -> None:
    """Take other kernels in the two sweeps: a second derivative has only that of attention by its definition."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pieces, self.scores, self.logits = nn.Conv2d(2, 8, 1), nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                query, key, value = self.scores(self.pieces(images).flatten(2).mT)[:, None].chunk(3, -1)
                logits: Tensor = self.logits(F.scaled_dot_product_attention(8 * query, key, value)[:, 0].mean(1))
                return logits

    torch.manual_seed(0)
    net, images = FlatModule(Attention()), (4 * torch.randn(6, 2, 6, 6)).requires_grad_()
    path = unroll(net, 2 * net.init(), images, LABELS, 0.1, BATCHES)
    matching_loss(path[-1], net.init(), 1.1 * net.init()).backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_a_row_that_is_trained_further_before_the_backward_pass_is_noticed() -> None:
    """Write into a row by the parameters of a module, which torch does not notice."""
    module = with_layer(nn.Identity())
    net, images = FlatModule(module), torch.randn(6, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    path = unroll(net, net.init(), images, LABELS, 0.3, BATCHES)
    nn.utils.vector_to_parameters(path[1], module.parameters())
    with torch.no_grad():
        next(module.parameters()).mul_(3)
    with pytest.raises(InputError, match="in the backward pass"):
        path[-1].sum().backward()


def test_sweeps_differ_by_no_more_than_rounding() -> None:
    first = torch.tensor([[0.0], [100.0], [torch.nan], [1.0], [torch.inf]], dtype=torch.float64)
    again = torch.tensor([[0.0009], [100.09], [3.0], [torch.nan], [5.0]], dtype=torch.float64)
    check_repeated(first, again, lambda n: pytest.fail(f"step {n} is repeated"))  # what is not finite is told elsewhere
    for step, now, told in (
        (0, 0.002, "0.002 in place of 0 in step 0;"),
        (1, 100.2, "100.2 in place of 100 in step 1;"),
    ):
        other = again.clone()
        other[step] = now
        with pytest.raises(InputError, match=f"as in the call, found {told}"):
            check_repeated(first, other, other.__getitem__)
        one, another = (torch.cat([torch.ones_like(each), each], dim=1) for each in (first, other))
        with pytest.raises(InputError, match=f"as in the call, found {told}"):
            check_repeated(one, another, another.__getitem__)  # beside a number that is the same
        check_repeated(first, other, first.__getitem__)  # the forward sweep's operations find the same again
