"""Distil what is no picture with a class (pairs, graphs, sequences, maps of labels), against whole-graph autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtt_fast import Adam, Augmentation, FlatModule, GraphedMatchingLoss, InputError, matching_loss, plan, unroll
from mtt_fast.engine.students.live_bytes import CountLiveBytes
from mtt_fast.testing import assert_close, module_function

Loss = Callable[[Tensor, Tensor], Tensor]
BATCHES = [torch.tensor([0, 1, 2]), torch.tensor([3, 1, 4]), torch.tensor([2, 0, 4])]
CLASSES = torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1)


def check(
    module: nn.Module, rows: Tensor, labels: Tensor, loss: Loss | None, batches: list[Tensor] = BATCHES, **options: Any
) -> None:
    """Compare the gradients of `unroll` with those of recorded steps."""
    module.double()
    net, lr = FlatModule(module), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    start = net.init().requires_grad_()
    target = start.detach() + 0.05 * torch.randn_like(start)
    leaves = {"start": start, "lr": lr, "rows": rows, "labels": labels}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf.is_floating_point()}
    path = unroll(net, start, rows, labels, lr, batches, loss=loss, **options)
    found = torch.autograd.grad(matching_loss(path[-1], start, target), list(leaves.values()))

    theta: Tensor = start
    with sdpa_kernel(SDPBackend.MATH):  # torch's other attentions have no second derivative
        for index in batches:
            value = (loss or F.cross_entropy)(module_function(module)(theta, rows[index]), labels[index])
            theta = theta - lr * torch.autograd.grad(value, theta, create_graph=True)[0]
        distance = (theta - target).square().sum() / (start.detach() - target).square().sum()
        expected = torch.autograd.grad(distance, list(leaves.values()))
    for name, one, other in zip(leaves, found, expected, strict=True):
        assert_close(name, one, other, 1e-9)


def rows_of(*shape: int) -> Tensor:
    return torch.randn(5, *shape, dtype=torch.float64)


# ------------------------------------------------------------------ inputs of other shapes


class Sequences(nn.Module):
    """Classify sequences (b, length, width) by a layer whose first result is a sequence."""

    def __init__(self, layer: nn.Module, attends: bool = False) -> None:
        super().__init__()
        self.layer, self.attends, self.head = layer, attends, nn.Linear(8, 3)

    def forward(self, rows: Tensor) -> Tensor:
        output, *_ = self.layer(rows, rows, rows) if self.attends else self.layer(rows)
        return self.head(output.mean(1))  # type: ignore[no-any-return]


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "video": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), (2, 3, 6, 6)),
    "signal": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(28, 3)), (2, 9)),
    "LSTM": (lambda: Sequences(nn.LSTM(4, 4, bidirectional=True, batch_first=True)), (5, 4)),
    "GRU": (lambda: Sequences(nn.GRU(4, 8, batch_first=True)), (5, 4)),
    "attention": (lambda: Sequences(nn.MultiheadAttention(8, 2, batch_first=True), attends=True), (5, 8)),
    "attention, evaluated": (lambda: Sequences(nn.MultiheadAttention(8, 2, batch_first=True), attends=True).eval(), (5, 8)),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "64MiB"}], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_inputs_may_have_any_shape(name: str, options: dict[str, Any]) -> None:
    module, shape = MODULES[name]
    check(module(), rows_of(*shape), CLASSES, None, **options)


def test_a_plan_is_made_for_inputs_of_any_shape() -> None:
    net = FlatModule(nn.Sequential(nn.Linear(80, 16), nn.Tanh(), nn.Linear(16, 3)))
    steps = plan(net, images=(5, 80), steps=3, batch=3, memory_budget="50MiB")
    rows, start = torch.randn(5, 80), net.init()
    paths = [
        unroll(net, start, rows, CLASSES, 0.1, BATCHES, **options)
        for options in ({"plan": steps}, {"memory_budget": "50MiB"})
    ]
    assert (steps.saved_steps, steps.cut) == (3, False)
    assert torch.equal(*paths)
    with pytest.raises(InputError, match=r"^`images`: expected a tensor or a shape \(n, …\), found \(5,\)$"):
        plan(net, images=(5,), steps=3)


@pytest.mark.parametrize("padding", [None, 0])
def test_inputs_may_be_tokens(padding: int | None) -> None:
    """Learn the labels of fixed tokens. The engine gives a network floating-point numbers, which hold the tokens exactly.

    The vector of a padding token is not trained.
    """

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(11, 4, padding), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.words(tokens.long()).mean(1))  # type: ignore[no-any-return]

    net, tokens = FlatModule(Words().double()), torch.randint(11, (5, 6))
    tokens[:, 0] = 0
    labels = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    end = unroll(net, net.init(), tokens.double(), labels, 0.2, BATCHES, label_kind="logits")[-1]
    theta = net.init().requires_grad_()
    for index in BATCHES:
        loss = F.cross_entropy(net(theta, tokens[index]), labels[index].softmax(1))
        theta = theta - 0.2 * torch.autograd.grad(loss, theta, create_graph=True)[0]
    found, expected = (torch.autograd.grad(row.square().sum(), labels)[0] for row in (end, theta))
    assert_close("labels", found, expected, 1e-9)
    assert torch.equal(end[:4], net.init()[:4]) == (padding == 0)
    with pytest.raises(InputError, match=r"floating-point images.*found torch.int64.*again in a module of tokens"):
        unroll(net, net.init(), tokens, labels, 0.2, BATCHES)


# ------------------------------------------------------------------ labels of other shapes


def of_each_token(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels)


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


MAP = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 3, 1))
TASKS: dict[str, tuple[nn.Module, tuple[int, ...], Tensor, Loss]] = {
    "a class for each pixel": (MAP, (1, 6, 6), torch.randint(3, (5, 6, 6)), F.cross_entropy),
    "a distribution for each pixel": (MAP, (1, 6, 6), torch.rand(5, 3, 6, 6).double(), F.cross_entropy),
    "a class for each token": (mlp(7), (5, 4), torch.randint(7, (5, 5)), of_each_token),
    "a number": (nn.Sequential(mlp(1), nn.Flatten(0)), (4,), torch.randn(5).double(), F.mse_loss),
    "features of a teacher": (mlp(8), (5, 4), torch.randn(5, 5, 8).double(), F.mse_loss),
    "several classes": (mlp(3), (4,), torch.rand(5, 3).double(), F.binary_cross_entropy_with_logits),
}


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "64MiB"}], ids=str)
@pytest.mark.parametrize("name", TASKS)
def test_labels_of_a_loss_of_ones_own_may_have_any_shape(name: str, options: dict[str, Any]) -> None:
    module, shape, labels, loss = TASKS[name]
    check(module, rows_of(*shape), labels.clone(), loss, **options)


OTHER_DTYPES: dict[str, tuple[Tensor, Loss]] = {
    "a mask": (torch.rand(5, 3) < 0.5, lambda logits, mask: (logits.sigmoid() * ~mask).mean()),
    "bytes": (torch.arange(15, dtype=torch.uint8).view(5, 3), lambda logits, step: (logits + (step - 8) / 255).square().mean()),
    "complex": (torch.randn(5, 3, dtype=torch.complex128), lambda logits, wave: (logits - wave).abs().mean()),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "64MiB"}], ids=str)
@pytest.mark.parametrize("name", OTHER_DTYPES)
def test_a_loss_gets_labels_in_their_own_dtype(name: str, options: dict[str, Any]) -> None:
    labels, loss = OTHER_DTYPES[name]
    check(mlp(3), rows_of(4), labels, loss, **options)


class Prototypes(nn.Module):
    """Return learned vectors, the same for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.vectors.expand(len(images), 3)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "64MiB"}], ids=str)
def test_the_gradient_of_a_step_may_be_a_constant(options: dict[str, Any]) -> None:
    """Check a loss that is linear in the parameters and does not read the images, so that its gradient has no graph."""
    net, lr = FlatModule(Prototypes().double()), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    start = net.init().requires_grad_()
    path = unroll(net, start, rows_of(2), CLASSES, lr, BATCHES, loss=lambda logits, _: logits.mean(), **options)
    to_start, to_lr = torch.autograd.grad(path[-1].square().sum(), (start, lr))
    end = start.detach() - 3 * 0.2 / 3  # three steps of rate 0.2, each by a third
    assert_close("end", path[-1], end, 1e-12)
    assert_close("start", to_start, 2 * end, 1e-12)
    assert_close("lr", to_lr, -2 * end.sum(), 1e-12)


def test_complex_labels_are_constants_of_a_loss() -> None:
    net, labels = FlatModule(mlp(3).double()), torch.randn(5, 3, dtype=torch.complex128)
    with pytest.raises(InputError, match=r"`labels`: expected indices .* found torch.complex128"):
        unroll(net, net.init(), rows_of(4), labels[:, 0], 0.1, BATCHES)
    with pytest.raises(InputError, match=r"`labels`: expected real numbers where they require a gradient"):
        unroll(net, net.init(), rows_of(4), labels.requires_grad_(), 0.1, BATCHES, loss=OTHER_DTYPES["complex"][1])


@pytest.mark.parametrize("ignored", [-100, 255])
def test_a_loss_may_leave_out_pixels_of_a_later_batch(ignored: int) -> None:
    """Check that all labels are looked at: pieces of such a batch are means over other numbers of pixels."""
    labels = torch.randint(3, (5, 6, 6))
    labels[4, :3] = ignored  # in the second batch and the third
    for options in cast("list[dict[str, Any]]", [{}, {"microbatch": 2}]):
        check(MAP, rows_of(1, 6, 6), labels, nn.CrossEntropyLoss(ignore_index=ignored), **options)


def test_labels_of_another_shape_need_a_loss() -> None:
    net = FlatModule(MAP)
    for labels in (torch.zeros(5, 6, 6, dtype=torch.long), torch.zeros(5)):
        with pytest.raises(InputError, match=r"`labels`: expected indices .* give a `loss` that takes these"):
            unroll(net, net.init(), rows_of(1, 6, 6), labels, 0.1, BATCHES)
    with pytest.raises(InputError, match="and as many labels"):
        unroll(net, net.init(), rows_of(1, 6, 6), torch.tensor(1.0), 0.1, BATCHES, loss=F.mse_loss)


# ------------------------------------------------------------------ samples that need each other


class Pairs(nn.Module):
    """The features (b, 2 · 5) of images and texts, which are the parts of one row, scaled by CLIP's learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)
        )
        self.text, self.scale = nn.Linear(7, 5), nn.Parameter(torch.tensor(0.5))

    def forward(self, rows: Tensor) -> Tensor:
        image, text = self.image(rows[:, :36]), self.text(rows[:, 36:])
        return torch.cat([self.scale.exp() * F.normalize(image), F.normalize(text)], 1)


def info_nce(features: Tensor, similarities: Tensor) -> Tensor:
    image, text = features.chunk(2, 1)
    rows, columns = (image @ text.T).log_softmax(1), (text @ image.T).log_softmax(1)
    return -((similarities * rows).sum(1).mean() + (similarities.T * columns).sum(1).mean()) / 2


def of_classes(features: Tensor, labels: Tensor) -> Tensor:
    return info_nce(features, (labels[:, None] == labels).to(features.dtype))


def of_factors(features: Tensor, labels: Tensor) -> Tensor:
    """Compute the similarities of the batch from LoRS's diagonal and its two factors of low rank."""
    diagonal, left, right = labels.split([1, 2, 2], 1)
    return info_nce(features, diagonal.flatten().diag() + left @ right.T)


def of_matrix(features: Tensor, labels: Tensor) -> Tensor:
    """Select the columns of the batch by its indices, the last column."""
    return info_nce(features, labels[:, labels[:, -1].long()])


@pytest.mark.parametrize("options", [{}, {"memory_budget": "64MiB"}, {"microbatch": 1}, {"microbatch": 2}], ids=str)
@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (of_classes, CLASSES),
        (of_factors, torch.rand(5, 5).double()),
        (of_matrix, torch.cat([torch.rand(5, 5), torch.arange(5)[:, None]], 1).double()),
    ],
)
def test_pairs_of_images_and_texts(loss: Loss, labels: Tensor, options: dict[str, Any]) -> None:
    check(Pairs(), rows_of(36 + 7), labels.clone(), loss, **options)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.8}, {"augment": Augmentation(lambda *_: 2, torch.mul)}], ids=["momentum", "augmented"]
)
def test_pairs_may_be_cut_with_other_options(options: dict[str, Any]) -> None:
    whole, cut = (gradient_of_pairs(**options, **size) for size in ({}, {"microbatch": 2}))
    assert_close("rows", cut, whole, 1e-12)


def gradient_of_pairs(**options: Any) -> Tensor:
    torch.manual_seed(1)
    net = FlatModule(Pairs().double())
    rows = rows_of(36 + 7).requires_grad_()
    path = unroll(net, net.init(), rows, CLASSES, 0.2, BATCHES, loss=of_classes, **options)
    (gradient,) = torch.autograd.grad(path[-1].square().sum(), rows)
    return gradient


@pytest.mark.parametrize("size", [None, 2])
def test_pairs_of_a_graphed_loss(size: int | None) -> None:
    net = FlatModule(Pairs().double())
    start, rows = net.init(), rows_of(36 + 7)
    target, batches = start + 0.05 * torch.randn_like(start), torch.stack(BATCHES)

    def gradient(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = rows.clone().requires_grad_()
        (found,) = torch.autograd.grad(loss_of(leaf), leaf)
        return found

    graphed = GraphedMatchingLoss(net, loss=of_classes, microbatch=size)
    found = gradient(lambda rows: graphed(start, target, rows, CLASSES, 0.2, batches))
    expected = gradient(
        lambda rows: matching_loss(unroll(net, start, rows, CLASSES, 0.2, batches, loss=of_classes)[-1], start, target)
    )
    assert_close("rows", found, expected, 1e-12)


def test_the_first_batch_may_have_one_pair() -> None:
    """Check that the loss of one sample, which is the mean of itself, proves nothing for larger batches."""
    batches = [torch.tensor([2]), torch.tensor([0, 1, 2]), torch.tensor([3, 1, 4])]
    check(Pairs(), rows_of(36 + 7), CLASSES, of_classes, batches, microbatch=2)


def of_all_three(features: Tensor, labels: Tensor) -> Tensor:
    """Compute a loss that takes batches of three pairs only."""
    image, text = features.chunk(2, 1)
    return F.cross_entropy(image @ text.T, torch.arange(3))


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
def test_a_loss_may_take_whole_batches_only(options: dict[str, Any]) -> None:
    check(Pairs(), rows_of(36 + 7), CLASSES, of_all_three, **options)


def test_a_network_that_compares_its_samples_is_not_cut() -> None:
    def centred(features: Tensor, labels: Tensor) -> Tensor:
        return of_classes(features, labels)

    class Centred(Pairs):
        def forward(self, rows: Tensor) -> Tensor:
            features = super().forward(rows)
            return features - features.mean(0)

    for loss in (centred, of_all_three):
        with pytest.raises(InputError, match="`net`: expected samples that do not depend on each other"):
            check(Centred(), rows_of(36 + 7), CLASSES, loss, microbatch=2)


def test_a_batch_of_many_pairs_takes_the_memory_of_a_piece() -> None:
    """Check the peak of the tensors that torch allocates. The outputs of the batch and their similarities are small beside a piece."""
    net = FlatModule(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(14 * 14 * 8, 4)))
    rows, batches = torch.randn(32, 1, 16, 16, requires_grad=True), torch.arange(32).expand(2, 32)

    def peak(size: int) -> int:
        with CountLiveBytes() as counted:
            path = unroll(net, net.init(), rows, torch.arange(32), 0.1, batches, loss=of_classes, microbatch=size)
            path[-1].square().sum().backward()
        return int(counted.peak)

    whole, quarter, pair = map(peak, (32, 8, 2))
    assert quarter < 0.5 * whole
    assert pair < 0.25 * whole


def test_dropout_whose_masks_an_augmentation_draws() -> None:
    class Masked(nn.Module):
        """Multiply the features by the masks, the last part of a row."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, rows: Tensor) -> Tensor:
            return self.last(rows[:, 4:] * self.first(rows[:, :4]).tanh())  # type: ignore[no-any-return]

    def draw(rows: Tensor, generator: torch.Generator | None) -> Tensor:
        return (torch.rand(len(rows), 6, generator=generator) < 0.9) / 0.9

    augment = Augmentation(draw, lambda rows, masks: torch.cat([rows, masks.to(rows)], 1))
    net, rows, random = FlatModule(Masked().double()), rows_of(4).requires_grad_(), torch.Generator().manual_seed(1)
    draws = [draw(rows[batch], random) for batch in BATCHES]
    path = unroll(net, net.init(), rows, CLASSES, 0.2, BATCHES, augment, generator=random.manual_seed(1))
    theta = net.init().requires_grad_()
    for batch, masks in zip(BATCHES, draws, strict=True):
        loss = F.cross_entropy(net(theta, torch.cat([rows[batch], masks.double()], 1)), CLASSES[batch])
        theta = theta - 0.2 * torch.autograd.grad(loss, theta, create_graph=True)[0]
    expected, found = (torch.autograd.grad(end.square().sum(), rows)[0] for end in (theta, path[-1]))
    assert_close("rows", found, expected, 1e-10)


def test_the_gradient_of_labels_may_have_any_strides() -> None:
    def transposed(logits: Tensor, labels: Tensor) -> Tensor:
        return -(labels * logits.log_softmax(1)).mean() - (labels.T * logits.T.log_softmax(1)).mean()

    check(mlp(3), rows_of(4), torch.rand(5, 3).double(), transposed)


class Graph(nn.Module):
    """A graph convolution over fixed edges."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.rand(5, 5))
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, nodes: Tensor) -> Tensor:
        return self.edges @ self.second(torch.tanh(self.edges @ self.first(nodes)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("augment", [None, Augmentation(lambda *_: None, lambda rows, _: rows.roll(1, 1))])
def test_nodes_of_a_graph(augment: Any) -> None:
    module, nodes = Graph(), rows_of(4)
    if augment is None:
        check(module, nodes, CLASSES, None, 3 * [torch.arange(5)])
    else:  # a batch that is tried as a whole is augmented, too
        net = FlatModule(module.double())
        path = unroll(net, net.init(), nodes, CLASSES, 0.2, 3 * [torch.arange(5)], augment)
        other = unroll(net, net.init(), nodes.roll(1, 1), CLASSES, 0.2, 3 * [torch.arange(5)])
        assert torch.equal(path, other)


def test_a_graph_that_is_one_sample() -> None:
    def of_nodes(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    class Learned(Graph):
        """Take nodes and edges from the sample."""

        def forward(self, sample: Tensor) -> Tensor:
            nodes, edges = sample.split([4, 5], 2)
            return edges @ self.second(torch.tanh(edges @ self.first(nodes)))  # type: ignore[no-any-return]

    one = 3 * [torch.tensor([0])]
    check(Graph(), rows_of(4)[None], CLASSES[None], of_nodes, one, memory_budget="64MiB")
    check(Learned(), rows_of(4 + 5)[None], CLASSES[None], of_nodes, one)


def test_a_whole_batch_is_tried_as_strictly() -> None:
    """Read a learned tensor in a loss that takes five samples only."""
    scale = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(InputError, match="`loss`: expected no tensor that requires a gradient"):
        check(mlp(3), rows_of(4), CLASSES, lambda z, y: F.cross_entropy(scale * z, y), [torch.arange(5)])


class Forces(nn.Module):
    """An energy, and the forces, its gradient with respect to the positions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.energy = inner

    def forward(self, positions: Tensor) -> Tensor:
        with torch.enable_grad():
            energy = self.energy(positions.requires_grad_())
            (forces,) = torch.autograd.grad(-energy.sum(), positions, create_graph=True)
        return torch.cat([energy, forces], 1)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "64MiB"}], ids=str)
def test_a_network_may_differentiate_by_its_images(options: dict[str, Any]) -> None:
    check(Forces(mlp(1)), rows_of(4), torch.randn(5, 5).double(), F.mse_loss, **options)


def test_a_learned_number_is_found_in_a_network_that_differentiates_by_its_images() -> None:
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Scaled(Forces):
        def forward(self, positions: Tensor) -> Tensor:
            return scale * super().forward(positions)

    with pytest.raises(InputError, match="`net`: expected no tensor that requires a gradient besides its arguments"):
        check(Scaled(mlp(1)), rows_of(4), torch.randn(5, 5).double(), F.mse_loss)


class Penalised(nn.Module):
    """Logits, and in one more column a penalty on the parameters, as those of FedProx and EWC."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(3)

    def forward(self, rows: Tensor) -> Tensor:
        penalty = torch.stack([value.sin().square().sum() for value in self.parameters()]).sum()
        return torch.cat([self.inner(rows), penalty.expand(len(rows), 1)], 1)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "64MiB"}], ids=str)
def test_a_penalty_on_the_parameters(options: dict[str, Any]) -> None:
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, :3], labels) + 0.1 * outputs[:, 3].mean()

    check(Penalised(), rows_of(4), CLASSES, loss, **options)


class Judged(nn.Module):
    """Return the loss of each sample, by a judge that reads the outputs and the targets, the last part of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.judge = nn.Linear(4, 3), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, rows: Tensor) -> Tensor:
        return self.judge(torch.cat([self.student(rows[:, :4]), rows[:, 4:]], 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "options", [{}, {"microbatch": 2}, {"momentum": 0.8, "weight_decay": 0.05}, {"optimizer": Adam(eps=0.1)}], ids=str
)
def test_learned_numbers_that_the_network_reads_are_parameters_at_a_rate_of_zero(options: dict[str, Any]) -> None:
    """Compare the judge's gradient with that of steps in which only the student moves."""
    module = Judged().double()
    net, rows = FlatModule(module), rows_of(7)
    start, judge = (torch.nn.utils.parameters_to_vector(part.parameters()).detach() for part in module.children())
    rates = torch.cat([start.new_full(start.shape, 0.2), judge.new_zeros(judge.shape)]).expand(len(BATCHES), -1)

    def of_samples(losses: Tensor, _: Tensor) -> Tensor:
        return losses.mean()

    theta = torch.cat([start, judge.requires_grad_()])
    end = unroll(net, theta, rows, CLASSES, rates, BATCHES, loss=of_samples, **options)[-1]
    (found,) = torch.autograd.grad(end[: len(start)].square().sum(), judge)
    assert torch.equal(end[len(start) :], judge)

    moving, state, sgd = start.requires_grad_(), [torch.zeros_like(start)] * 2, "optimizer" not in options
    for n, batch in enumerate(BATCHES, 1):
        loss = net(torch.cat([moving, judge]), rows[batch]).mean()
        (gradient,) = torch.autograd.grad(loss, moving, create_graph=True)
        if sgd:
            gradient = gradient + options.get("weight_decay", 0) * moving
            state = [options.get("momentum", 0) * state[0] + gradient] * 2
            moving = moving - 0.2 * state[0]
        else:
            state = [0.9 * state[0] + 0.1 * gradient, 0.999 * state[1] + 0.001 * gradient**2]
            mean, square = state[0] / (1 - 0.9**n), state[1] / (1 - 0.999**n)
            moving = moving - 0.2 * mean / (square.sqrt() + 0.1)
    (expected,) = torch.autograd.grad(moving.square().sum(), judge)
    assert_close("judge", found, expected, 1e-9)


class Tangents(nn.Module):
    """The outputs of a network, and beside them their derivative in the direction v of its parameters."""

    def __init__(self, inner: FlatModule) -> None:
        super().__init__()
        self.inner, self.theta, self.v = inner, nn.Parameter(inner.init()), nn.Parameter(inner.init())

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat(torch.func.jvp(lambda theta: self.inner(theta, rows), (self.theta,), (self.v,)), 1)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "64MiB"}], ids=str)
def test_a_hessian_vector_product_can_be_differentiated(options: dict[str, Any]) -> None:
    def derivative(outputs: Tensor, labels: Tensor) -> Tensor:
        logits, tangents = outputs.chunk(2, 1)
        found: Tensor = torch.func.jvp(lambda logits: F.cross_entropy(logits, labels), (logits,), (tangents,))[1]
        return found

    inner = FlatModule(mlp(3).double())
    theta, v, rows = inner.init().requires_grad_(), torch.randn_like(inner.init()), rows_of(4).requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(inner(theta, rows), CLASSES), theta, create_graph=True)[0]
    hessian_v = torch.autograd.grad(gradient, theta, v, create_graph=True)[0]
    step = torch.cat([theta, v]), rows, CLASSES, 0.0, [torch.arange(5)]
    _, both = unroll(FlatModule(Tangents(inner)), *step, loss=derivative, return_velocity=True, **options)
    assert_close("H v and g", both, torch.cat([hessian_v, gradient]), 1e-9)
    found, expected = (
        torch.autograd.grad(result.sin().sum(), [theta, rows]) for result in (both, torch.cat([hessian_v, gradient]))
    )
    for name, one, other in zip(("theta", "rows"), found, expected, strict=True):
        assert_close(name, one, other, 1e-9)

    path = unroll(inner, theta, rows.detach(), CLASSES, 1.0, step[4], **options)
    (product,) = torch.autograd.grad(path[-1], theta, v)  # v − H v
    assert_close("v − H v", product, v - hessian_v.detach(), 1e-9)


def test_losses_after_each_step_may_be_differentiated_one_after_the_other() -> None:
    net, rows, real = FlatModule(mlp(3).double()), rows_of(4).requires_grad_(), rows_of(4)
    path = unroll(net, net.init(), rows, CLASSES, 0.2, BATCHES)
    losses = [F.cross_entropy(net(row, real), CLASSES) for row in path]
    (expected,) = torch.autograd.grad(torch.stack(losses).sum(), rows, retain_graph=True)
    leaves = [row.requires_grad_() for row in path.detach()]
    gradients = [torch.autograd.grad(F.cross_entropy(net(leaf, real), CLASSES), leaf)[0] for leaf in leaves]
    path.backward(torch.stack(gradients))
    assert rows.grad is not None
    assert_close("rows", rows.grad, expected, 1e-12)


class Through(nn.Module):
    """Logits of the first four columns, and the other columns as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(3)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([self.inner(rows[:, :4]), rows[:, 4:]], 1)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "64MiB"}], ids=str)
def test_an_augmentation_may_change_labels_too(options: dict[str, Any]) -> None:
    """Mix pairs of samples with their labels, which are columns of the rows."""

    def mixed(rows: Tensor, shares: Tensor) -> Tensor:
        return shares * rows + (1 - shares) * rows.roll(1, 0)

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, :3], outputs[:, 3:])

    net, rows = FlatModule(Through().double()), rows_of(4).requires_grad_()
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    shares, pairs = torch.rand(3, 3, 1, dtype=torch.float64), torch.cat([rows, logits.softmax(1)], 1)
    mixing = Augmentation(lambda *_: None, mixed)
    end = unroll(net, net.init(), pairs, CLASSES, 0.2, BATCHES, mixing, loss=loss, draws=list(shares), **options)[-1]
    theta = net.init().requires_grad_()
    for batch, share in zip(BATCHES, shares, strict=True):
        value = loss(net(theta, mixed(pairs[batch], share)), CLASSES)
        theta = theta - 0.2 * torch.autograd.grad(value, theta, create_graph=True)[0]
    found, expected = (
        torch.autograd.grad(last.square().sum(), (rows, logits), retain_graph=True) for last in (end, theta)
    )
    for name, one, other in zip(("rows", "labels"), found, expected, strict=True):
        assert_close(name, one, other, 1e-9)


def test_an_error_of_the_module_is_raised_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        check(mlp(3), rows_of(5), CLASSES, None)


def test_results_of_two_towers_have_to_be_one_tensor() -> None:
    class Towers(Pairs):
        def forward(self, rows: Tensor) -> Any:
            return super().forward(rows).chunk(2, 1)

    with pytest.raises(InputError, match=r"found tuple; return one tensor \(b, …\)"):
        check(Towers(), rows_of(36 + 7), CLASSES, of_classes)
