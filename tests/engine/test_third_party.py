"""Test students of other people's modules and losses, against whole-graph autograd in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kornia.feature as KF
import pytest
import torch
from kornia.models.tiny_vit import TinyViT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtt_fast import ConvNet, FlatModule, matching_loss, plan, unroll
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.testing import assert_close, module_function, reference_convnet, whole_graph


class Residual(nn.Module):
    """A residual block as most code bases have one."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.other_norm = norm(4), norm(4)

    def forward(self, images: Tensor) -> Tensor:
        inside = self.other_norm(self.second(F.silu(self.norm(self.first(images)))))
        return F.leaky_relu(images + inside)


class Attention(nn.Module):
    """A network of torch's own transformer layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images.mean(1)).mean(1))  # type: ignore[no-any-return]


class MaskedEncoder(nn.Module):
    """A transformer in evaluation mode that leaves out the last rows of an image."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 12, batch_first=True), 1)
        self.head = nn.Linear(16, 3)
        self.register_buffer("mask", torch.arange(16) > 10)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        mask = self.mask.expand(len(images), -1)
        return self.head(self.encoder(images.mean(1), src_key_padding_mask=mask).mean(1))  # type: ignore[no-any-return]


def residual(norm: Callable[[int], nn.Module]) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), Residual(norm), Residual(norm), nn.MaxPool2d(2), *head)


def batch_norm_that_has_seen_data() -> nn.Module:
    module = residual(nn.BatchNorm2d)
    module(torch.randn(8, 1, 16, 16))
    return module.eval()


def mlp(*layers: nn.Linear) -> nn.Module:
    first, second = layers
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), nn.Linear(16, 3))


def tied() -> nn.Module:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    return mlp(first, second)


def tiny_vit() -> nn.Module:
    return TinyViT(
        32, 1, 3, embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_sizes=(4, 4, 2, 1),
        mlp_ratio=2.0,
    ).eval()  # fmt: skip


MODULES: dict[str, Callable[[], nn.Module]] = {
    "residuals and group norm": lambda: residual(lambda width: nn.GroupNorm(2, width)),
    "residuals and instance norm": lambda: residual(lambda width: nn.InstanceNorm2d(width, affine=True)),
    "batch norm in evaluation mode": batch_norm_that_has_seen_data,
    "tied weights": tied,
    "a layer in two places": lambda: mlp(*[nn.Linear(16, 16)] * 2),
    "attention": Attention,
    "a masked encoder": MaskedEncoder,
    "kornia's TinyViT": tiny_vit,
    "kornia's TFeat": lambda: nn.Sequential(KF.TFeat(pretrained=False), nn.Linear(128, 3)),
}
SIDES = {"kornia's TFeat": 32, "kornia's TinyViT": 32}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("microbatch", [None, 2])
def test_module(name: str, microbatch: int | None) -> None:
    torch.manual_seed(2)
    module = MODULES[name]().double()
    net = FlatModule(module)
    start = net.init()
    target = start + 0.05 * torch.randn_like(start)
    images = torch.randn(4, 1, *2 * [SIDES.get(name, 16)], dtype=torch.float64, requires_grad=True)
    labels, lr = torch.tensor([0, 1, 2, 0]), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches = [torch.tensor([0, 1, 2]), torch.tensor([1, 3])]
    path = unroll(net, start, images, labels, lr, batches, microbatch=microbatch)
    to_images, to_lr = torch.autograd.grad(matching_loss(path[-1], start, target), (images, lr))
    with sdpa_kernel(SDPBackend.MATH):  # torch's other attentions have no second derivative
        expected = whole_graph(module_function(module), start, target, images, labels, lr, batches)
    assert_close("images", to_images, expected.images, 1e-9)
    assert_close("lr", to_lr, expected.lr, 1e-9)


def test_a_masked_encoder_has_the_same_outputs_without_a_gradient() -> None:
    module = MaskedEncoder()
    net, images = FlatModule(module), torch.randn(2, 1, 16, 16)
    expected = module(images)
    with torch.no_grad():
        torch.testing.assert_close(net(net.init(), images), expected)


@pytest.mark.parametrize("name", ["attention", "a masked encoder", "kornia's TinyViT"])
def test_memory_is_planned_for_it(name: str) -> None:
    side = SIDES.get(name, 16)
    made = plan(FlatModule(MODULES[name]()), images=(8, 1, side, side), steps=2, memory_budget="8MiB")
    assert 1 <= made.microbatch <= 8


def test_the_choice_of_attention_outlives_no_thread() -> None:
    """Check the process-wide setting: of two threads the first to come is the first to leave."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def of_first(logits: Tensor, labels: Tensor) -> Tensor:
        first_in.set()
        assert second_in.wait(10)
        return logits.square().mean()

    def of_second(logits: Tensor, labels: Tensor) -> Tensor:
        second_in.set()
        assert first_out.wait(10)
        assert not torch.backends.cuda.flash_sdp_enabled()
        return logits.square().mean()

    net, images, labels = ConvNet(1, 3, 4, 2, 1), torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    theta = net.init()
    assert torch.backends.cuda.flash_sdp_enabled()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(GenericStudent(net, of_first).gradient_jvp, theta, images, labels, theta)
        assert first_in.wait(10)
        second = pool.submit(GenericStudent(net, of_second).gradient_jvp, theta, images, labels, theta)
        first.result(10)
        first_out.set()
        second.result(10)
    assert torch.backends.cuda.flash_sdp_enabled()


# ------------------------------------------------------------------ losses


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the focal loss (Lin et al., 2017) for class indices and for distributions."""
    log_p = logits.log_softmax(1)
    targets = labels if labels.is_floating_point() else F.one_hot(labels, logits.shape[1])
    return -((1 - log_p.exp()) ** 2 * targets * log_p).sum(1).mean()


def divergence_of_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of knowledge distillation from learned logits."""
    return F.kl_div((logits / 4).log_softmax(1), (labels / 4).log_softmax(1), reduction="batchmean", log_target=True)


def huber(logits: Tensor, labels: Tensor) -> Tensor:
    """Return a loss that has no forward mode in torch."""
    return F.huber_loss(logits, labels, delta=0.5)


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits, labels)


LOSSES: list[tuple[Any, bool]] = [
    (smoothed, False),
    (smoothed, True),
    (nn.CrossEntropyLoss(label_smoothing=0.2), False),
    (focal, False),
    (focal, True),
    (divergence_of_temperature, True),
    (squared, True),
    (huber, True),
]


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize(("loss", "soft"), LOSSES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_loss(loss: Any, soft: bool, microbatch: int | None) -> None:
    net, network = ConvNet(2, 4, 8, 5, 1), module_function(reference_convnet(2, 4, 8, 5, 1))
    start = 0.5 * torch.randn(net.num_parameters, dtype=torch.float64)
    images = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    labels = torch.rand(5, 4, dtype=torch.float64).softmax(1) if soft else torch.tensor([0, 1, 2, 3, 0])
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 0, 1]), torch.tensor([2, 2, 4])]
    leaves = [start.requires_grad_(), images.requires_grad_(), torch.tensor(0.3, dtype=torch.float64).requires_grad_()]
    leaves += [labels.requires_grad_()] if soft else []
    cotangent = torch.randn(len(start), dtype=torch.float64)

    path = unroll(net, start, images, labels, leaves[2], batches, loss=loss, microbatch=microbatch)
    actual = torch.autograd.grad(cotangent @ path[-1], leaves)

    theta: Tensor = start
    for index in batches:
        value = loss(network(theta, images[index]), labels[index])
        theta = theta - leaves[2] * torch.autograd.grad(value, theta, create_graph=True)[0]
    for gradient, expected in zip(actual, torch.autograd.grad(cotangent @ theta, leaves), strict=True):
        assert_close("leaf", gradient, expected, 1e-9)
