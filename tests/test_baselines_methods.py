"""Test the other methods' formulas against plain torch and naive loops, in float64, on toy networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import ConvNet, InputError
from mtt_fast.augmentation.siamese import SiameseAugment, augment_with
from mtt_fast.baselines import gradient_matching
from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.baselines.dd import DdOptions, dd, step_batches
from mtt_fast.baselines.dm import DmOptions, dm, embedding_distance
from mtt_fast.baselines.forgetting import forgetting_events, most_forgotten, right_at_each_epoch
from mtt_fast.baselines.gradient_distance import DISTANCES, Metric
from mtt_fast.baselines.gradient_matching import dc, dsa, matching_gradient
from mtt_fast.baselines.gradient_matching_options import DcOptions, DsaOptions
from mtt_fast.baselines.herding import herd
from mtt_fast.baselines.kmeans import cluster_centres, nearest_rows
from mtt_fast.baselines.ld import LdOptions, ld, patience, stagnates
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.real_data import class_members, random_batch, starting_images
from mtt_fast.baselines.real_loss import logits_after_steps
from mtt_fast.baselines.siamese import siamese_augmentation
from mtt_fast.data import load
from mtt_fast.engine.student import GenericStudent
from mtt_fast.engine.student_choice import student_for
from mtt_fast.experts import ExpertTraining, train_missing_experts
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.testing import assert_close, module_function, reference_convnet
from mtt_fast.training.images import RealImages, real_images

SHAPE = (1, 10, 8, 4, 1)  # channels, classes, size, width, depth
NET = ConvNet(*SHAPE)
F64 = torch.float64


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealImages:
    data = load("digits", data_path=tmp_path_factory.mktemp("data"))
    return real_images(data, torch.device("cpu"), zca=False)


def plain() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the network as f(theta, images), built of torch.nn."""
    return module_function(reference_convnet(*SHAPE).double())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_theta(seed: int = 0) -> Tensor:
    return NET.init(seeded(seed)).double()


# ------------------------------------------------------------------ distribution matching


def test_the_distance_of_mean_embeddings_is_that_of_the_module() -> None:
    module = reference_convnet(*SHAPE).double()
    theta = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    images, seen = torch.randn(3, 1, 8, 8, dtype=F64, requires_grad=True), torch.randn(7, 1, 8, 8, dtype=F64)
    features = torch.nn.Sequential(*list(module.children())[:-1])
    expected = ((features(seen).sum(0) / 7 - features(images).sum(0) / 3) ** 2).sum()
    found = embedding_distance(NET, theta, images, seen)
    assert_close("distance", found, expected, 1e-12)
    assert_close("gradient", torch.autograd.grad(found, images)[0], torch.autograd.grad(expected, images)[0], 1e-12)


def test_dm_moves_the_images_by_sgd_with_momentum(real: RealImages) -> None:
    options = DmOptions(dataset="digits", ipc=2, batch_real=11, lr_img=0.3, dsa=False)
    learning = dm(options, real, NET)
    images, velocity, losses = learning.images.clone(), torch.zeros_like(learning.images), []
    for iteration in range(3):
        generator = generator_for(0, "dm", iteration)
        theta = NET.init(generator)
        pixels = images.clone().requires_grad_()
        total = torch.zeros(())
        for label, members in enumerate(class_members(real, 2)):
            seen, labels = random_batch(real.train, members, 11, generator)
            assert set(labels.tolist()) == {label}
            own = pixels[2 * label : 2 * label + 2]
            total = total + ((NET.embed(theta, own).mean(0) - NET.embed(theta, seen).mean(0)) ** 2).sum()
        total.backward()
        assert pixels.grad is not None
        velocity = 0.5 * velocity + pixels.grad
        images -= 0.3 * velocity
        losses.append(float(total.detach()) / 10)
    assert [learning.step(iteration) for iteration in range(3)] == pytest.approx(losses, rel=1e-4)
    assert_close("images", learning.images, images, 1e-5)


def test_dm_lowers_its_loss(real: RealImages) -> None:
    learning = dm(DmOptions(dataset="digits", ipc=2, pix_init="noise", dsa=False), real, NET)
    members = class_members(real, 2)

    def loss() -> float:
        """Return the loss on all images, with a network that no iteration used."""
        theta, total = NET.init(seeded(12345)), 0.0
        for label, indices in enumerate(members):
            own = learning.images[2 * label : 2 * label + 2]
            total += float(embedding_distance(NET, theta, own, real.train.batch(indices)[0]))
        return total

    before = loss()
    for iteration in range(60):
        learning.step(iteration)
    assert loss() < 0.5 * before


# ------------------------------------------------------------------ gradient matching


def written_out(metric: Metric, found: Tensor, wanted: Tensor) -> Tensor:
    """Return the distance as the papers define it, one row after the other."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() / ((a**2).sum().sqrt() * (b**2).sum().sqrt() + 1e-6)

    if metric == "mse":
        return ((found - wanted) ** 2).sum()
    if metric == "cos":
        return 1 - cosine(found, wanted)
    total, begin = torch.zeros((), dtype=found.dtype), 0
    for parameter in reference_convnet(*SHAPE).parameters():
        end = begin + parameter.numel()
        if parameter.dim() > 1:
            rows = parameter.shape[0]
            for own, target in zip(found[begin:end].view(rows, -1), wanted[begin:end].view(rows, -1), strict=True):
                total = total + 1 - cosine(own, target)
        begin = end
    return total


METRICS: list[Metric] = ["ours", "mse", "cos"]


@pytest.mark.parametrize("metric", METRICS)
def test_the_distance_of_gradients_is_the_papers(metric: Metric) -> None:
    found, wanted = torch.randn(2, NET.num_parameters, dtype=F64)
    assert_close(metric, DISTANCES[metric](found, wanted, NET.layout), written_out(metric, found, wanted), 1e-12)
    assert float(DISTANCES[metric](found, found, NET.layout)) == pytest.approx(0, abs=1e-4)  # but for the 1e-6


@pytest.mark.parametrize("strategy", ["none", "color", "crop", "cutout", "flip", "scale", "rotate"])
@pytest.mark.parametrize("metric", METRICS)
def test_gradient_matching_is_the_double_backward(metric: Metric, strategy: str) -> None:
    theta, function = random_theta(), plain()
    images, labels = torch.randn(5, 1, 8, 8, dtype=F64), torch.tensor([3, 3, 3, 3, 3])
    wanted = torch.randn(NET.num_parameters, dtype=F64)
    augment = siamese_augmentation(strategy, images, seeded(1))

    pixels, leaf = images.clone().requires_grad_(), theta.clone().requires_grad_()
    loss = F.cross_entropy(function(leaf, augment(pixels)), labels)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    expected = written_out(metric, gradient, wanted)
    (to_images,) = torch.autograd.grad(expected, pixels)

    for student in (student_for(NET, torch.device("cpu")), GenericStudent(NET)):
        distance, found = matching_gradient(
            student, theta, images, labels, augment, lambda own: DISTANCES[metric](own, wanted, NET.layout)
        )
        assert_close("distance", distance, expected, 1e-10)
        assert_close("gradient", found, to_images, 1e-9)


def test_siamese_augmentation_does_the_same_to_every_image() -> None:
    one = torch.rand(1, 3, 9, 9)
    augment = SiameseAugment("color_crop_cutout_flip_scale_rotate")
    for seed in range(12):
        same = siamese_augmentation(augment.strategy, one.expand(4, -1, -1, -1), seeded(seed))
        expected = augment_with(one, augment.draw_parameters([one], seeded(seed)))
        for batch in (1, 6):
            torch.testing.assert_close(same(one.expand(batch, -1, -1, -1)), expected.expand(batch, -1, -1, -1))
    identity = siamese_augmentation("none", one, seeded())
    assert identity(one) is one


def test_dc_updates_images_and_network_by_turns(real: RealImages) -> None:
    options = DcOptions(dataset="digits", ipc=1, batch_real=9, outer_loop=3, inner_loop=2, lr_net=0.1, lr_img=0.2)
    learning, function = dc(options, real, NET), plain()
    images, velocity, labels = learning.images.double(), torch.zeros(()), torch.arange(10)
    members, generator = class_members(real, 1), generator_for(0, "gradient matching", 0)
    theta, total = NET.init(generator).double(), 0.0
    for _ in range(3):
        pixels, distance = images.clone().requires_grad_(), torch.zeros((), dtype=F64)
        for label, indices in enumerate(members):
            seen, of_seen = random_batch(real.train, indices, 9, generator)
            leaf = theta.clone().requires_grad_()
            (wanted,) = torch.autograd.grad(F.cross_entropy(function(leaf, seen.double()), of_seen), leaf)
            own = F.cross_entropy(function(leaf, pixels[label : label + 1]), labels[label : label + 1])
            (found,) = torch.autograd.grad(own, leaf, create_graph=True)
            distance = distance + written_out("ours", found, wanted)
        (gradient,) = torch.autograd.grad(distance, pixels)
        velocity = 0.5 * velocity + gradient
        images, total = images - 0.2 * velocity, total + float(distance.detach())
        for _ in range(2):
            torch.randperm(10, generator=generator)  # the order in the one batch of an epoch
            leaf = theta.clone().requires_grad_()
            theta = theta - 0.1 * torch.autograd.grad(F.cross_entropy(function(leaf, images), labels), leaf)[0]
    assert learning.step(0) == pytest.approx(total / 30, rel=1e-4)
    assert_close("images", learning.images.double(), images, 1e-3)


@pytest.mark.parametrize(("method", "strategy"), [(dc, None), (dsa, "color_crop")])
def test_the_network_sees_what_the_method_augments(
    method: Callable[..., LearnedSet], strategy: str | None, real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(gradient_matching, "epoch_on", lambda student, images, sgd, augment: seen.append(augment))
    method(DsaOptions(dataset="digits", dsa_strategy="color_crop"), real, NET)
    assert seen == [None if strategy is None else SiameseAugment(strategy)]


def test_loops_are_the_papers_or_the_users() -> None:
    assert DcOptions(ipc=1).loops() == (1, 1)
    assert DcOptions(ipc=10).loops() == (10, 50)
    assert DcOptions(ipc=50, inner_loop=3).loops() == (50, 3)
    with pytest.raises(InputError, match="--ipc 7: the papers name loops for 1, 10, 20, 30, 40, 50"):
        DcOptions(ipc=7, outer_loop=3).check()
    with pytest.raises(InputError, match="run dc instead"):
        DsaOptions(dsa=False).check()


# ------------------------------------------------------------------ chosen images


@pytest.mark.parametrize("count", [1, 4, 12])
def test_herding_is_greedy(count: int) -> None:
    points = torch.randn(12, 5, dtype=F64)
    chosen: list[int] = []
    for _ in range(count):
        distances = {
            index: float((points.mean(0) - points[[*chosen, index]].mean(0)).norm())
            for index in range(len(points))
            if index not in chosen
        }
        chosen.append(min(distances, key=lambda index: distances[index]))
    assert herd(points, count).tolist() == chosen


def test_forgetting_events_are_counted_one_by_one() -> None:
    right = torch.rand(9, 40) < 0.5
    expected = [
        sum(bool(right[epoch, image]) and not right[epoch + 1, image] for epoch in range(8)) for image in range(40)
    ]
    events = forgetting_events(right)
    assert events.tolist() == expected
    members = torch.arange(1, 40, 3)
    chosen = most_forgotten(members, events, 5, seeded())
    assert len(set(chosen.tolist())) == 5
    assert set(chosen.tolist()) <= set(members.tolist())
    left = [expected[index] for index in members.tolist() if index not in chosen]
    assert min(expected[index] for index in chosen.tolist()) >= max(left)


def test_among_equals_chance_decides() -> None:
    members, events = torch.arange(50), torch.zeros(50, dtype=torch.long)
    picks = [tuple(most_forgotten(members, events, 3, seeded(seed)).tolist()) for seed in range(5)]
    assert len(set(picks)) > 1
    assert picks[0] == tuple(most_forgotten(members, events, 3, seeded(0)).tolist())


def test_what_an_expert_gets_right_after_each_epoch(real: RealImages, tmp_path: Path) -> None:
    store = train_missing_experts(tmp_path / "experts", 1, real, NET, ExpertTraining(3, 0.1), seed=0)
    right = right_at_each_epoch(store, real.train, NET)
    function = module_function(reference_convnet(*SHAPE))
    seen, labels = real.train.batch(slice(None))
    for epoch in range(3):
        logits = function(store.read(0, epoch + 1), seen)
        top = logits.topk(2, dim=1).values
        sure = top[:, 0] - top[:, 1] > 1e-4  # where rounding cannot decide
        assert int(sure.sum()) > 1000
        assert torch.equal(right[epoch][sure], (logits.argmax(1) == labels)[sure])


def test_clusters_are_a_fixed_point_and_find_what_is_apart() -> None:
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (middles.repeat_interleave(20, dim=0) + torch.randn(60, 2)).float()
    centres = cluster_centres(points, 3, seeded())
    assert torch.equal(centres, cluster_centres(points, 3, seeded()))
    nearest = torch.stack([(points - centre).norm(dim=1) for centre in centres]).argmin(0)
    for cluster, centre in enumerate(centres):
        torch.testing.assert_close(points[nearest == cluster].mean(0), centre, rtol=1e-5, atol=1e-5)
    assert sorted(torch.bincount(nearest).tolist()) == [20, 20, 20]


def test_the_nearest_image_to_each_centre_is_taken_once() -> None:
    points, centres = torch.randn(30, 4), torch.randn(6, 4)
    chosen: list[int] = []
    for centre in centres:
        left = [index for index in range(30) if index not in chosen]
        chosen.append(min(left, key=lambda index: float((points[index] - centre).norm())))
    assert nearest_rows(points, centres).tolist() == chosen
    assert nearest_rows(points[:3], points[:1].repeat(3, 1)).sort().values.tolist() == [0, 1, 2]


# ------------------------------------------------------------------ through the steps to a real loss


def whole_graph_logits(
    theta: Tensor, images: Tensor, labels: Tensor, rates: Tensor, batches: list[Tensor], seen: Tensor
) -> Tensor:
    """Return the logits with all steps recorded by autograd."""
    function = plain()
    theta = theta.clone().requires_grad_()
    for n, index in enumerate(batches):
        log_p = F.log_softmax(function(theta, images[index]), dim=1)
        wanted = labels[index]
        hard = not wanted.is_floating_point()
        loss = -(F.one_hot(wanted, 10) * log_p if hard else wanted * log_p).sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - rates[n] * gradient
    return function(theta, seen)


def test_dd_has_the_whole_graphs_gradients() -> None:
    images = torch.randn(20, 1, 8, 8, dtype=F64, requires_grad=True)
    labels, rates = torch.arange(10).repeat_interleave(2), torch.rand(6, dtype=F64, requires_grad=True)
    batches = step_batches(DdOptions(ipc=2), 10)
    seen, wanted = torch.randn(7, 1, 8, 8, dtype=F64), torch.randint(10, (7,))
    results = []
    for logits in (
        logits_after_steps(NET, random_theta(), images, labels, rates, batches, seen),
        whole_graph_logits(random_theta(), images, labels, rates, batches, seen),
    ):
        loss = F.cross_entropy(logits, wanted)
        results.append((loss, *torch.autograd.grad(loss, (images, rates))))
    for name, found, expected in zip(("loss", "images", "rates"), *results, strict=True):
        assert_close(name, found, expected, 1e-10)


def test_ld_has_the_whole_graphs_gradients() -> None:
    images, soft = torch.randn(20, 1, 8, 8, dtype=F64), torch.rand(20, 10, dtype=F64).softmax(1).requires_grad_()
    index, rate = torch.randperm(20)[:13], torch.tensor(0.3, dtype=F64)
    seen, wanted = torch.randn(7, 1, 8, 8, dtype=F64), torch.randint(10, (7,))
    found, expected = (
        torch.autograd.grad(F.cross_entropy(logits, wanted), soft)[0]
        for logits in (
            logits_after_steps(NET, random_theta(), images, soft, rate, [index], seen),
            whole_graph_logits(random_theta(), images, soft, rate[None], [index], seen),
        )
    )
    assert_close("labels", found, expected, 1e-10)
    untouched = [row for row in range(20) if row not in index]
    assert not found[untouched].any()


def test_the_steps_of_dd_share_the_images_out() -> None:
    batches = step_batches(DdOptions(ipc=6, distilled_images_per_class_per_step=2, distill_epochs=2), 3)
    assert [batch.tolist() for batch in batches[:3]] == [
        [0, 1, 6, 7, 12, 13],
        [2, 3, 8, 9, 14, 15],
        [4, 5, 10, 11, 16, 17],
    ]
    assert len(batches) == 6
    assert torch.equal(torch.stack(batches[:3]), torch.stack(batches[3:]))
    with pytest.raises(InputError, match="expected a divisor of --ipc 5"):
        DdOptions(ipc=5, distilled_images_per_class_per_step=2).check()


def test_dd_lowers_its_loss_and_learns_its_rates(real: RealImages) -> None:
    options = DdOptions(dataset="digits", batch_real=256, lr_img=0.05, train_nets_type="known_init")
    learning = dd(options, real, NET)
    assert float(learning.lr()) == pytest.approx(0.02)
    losses = [learning.step(iteration) for iteration in range(80)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert float(learning.lr()) != pytest.approx(0.02)
    assert learning.own_training is not None
    trained = learning.own_training(seeded(5))
    assert torch.equal(trained, learning.own_training(seeded(6)))  # of one initialisation
    seen, labels = real.test.batch(slice(None))
    assert float((NET(trained, seen).argmax(1) == labels).float().mean()) > 0.3


def test_several_networks_of_dd_are_averaged(real: RealImages) -> None:
    options = {"dataset": "digits", "batch_real": 64, "train_nets_type": "known_init"}
    one, three = (dd(DdOptions(**options, n_nets=n), real, NET) for n in (1, 3))  # type: ignore[arg-type]
    assert one.step(0) == pytest.approx(three.step(0), rel=1e-6)
    assert_close("images", three.images, one.images, 1e-4)


def test_dd_decays_its_rate(real: RealImages) -> None:
    learning = dd(DdOptions(dataset="digits", batch_real=16, decay_it=2, decay_factor=0.1), real, NET)
    assert learning.optimiser.defaults["betas"] == (0.5, 0.999)  # the public code's
    rates = []
    for iteration in (0, 1, 2, 5):
        learning.step(iteration)
        rates.append(learning.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.0001])


def test_ld_keeps_probabilities_and_moves_its_network(real: RealImages) -> None:
    learning = ld(LdOptions(dataset="digits", ipc=2, batch_real=64, lr_y=0.05), real, NET)
    images, theta = learning.images.clone(), learning.carried["theta"].clone()
    assert learning.labels.unique().tolist() == pytest.approx([0.1])
    for iteration in range(3):
        learning.step(iteration)
    torch.testing.assert_close(learning.labels.sum(1), torch.ones(20))
    assert float(learning.labels.min()) >= 0
    assert float(learning.labels.max()) > 0.11
    assert torch.equal(images, learning.images)
    moved = (learning.carried["theta"] - theta).abs()
    assert 0 < float(moved.max()) < 3.1e-3  # three steps of Adam at 1e-3
    assert len(learning.carried["errors"]) == 3


def test_ld_gives_the_label_of_its_class_to_most_images(real: RealImages) -> None:
    learning = ld(LdOptions(dataset="digits", ipc=2, batch_real=256, lr_y=0.03, inner_lr=0.1), real, NET)
    for iteration in range(80):
        learning.step(iteration)
    own = torch.arange(10).repeat_interleave(2)
    assert float((learning.labels.argmax(1) == own).float().mean()) > 0.6


def restarts(errors: list[float], window: int) -> list[int]:
    """Return the steps after which the public code takes a fresh network: its counters, kept one step after the other."""
    found: list[int] = []
    last: list[float] = []
    lowest, since = float("inf"), 0
    for step, error in enumerate(errors):
        full = len(last) == window
        last = [*last[1:], error] if full else [*last, error]
        if len(last) < window:
            continue
        if not full or sum(last) < lowest:
            lowest, since = sum(last), 0
        elif since < window:
            since += 1
        else:
            found.append(step)
            last, lowest, since = [], float("inf"), 0
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_network_is_replaced_when_the_public_code_would(seed: int) -> None:
    errors = [
        float(step % 90 < 20) + float(torch.randint(8, (), generator=seeded(seed * 1000 + step))) for step in range(300)
    ]
    found, so_far = [], torch.empty(0)
    for step, error in enumerate(errors):
        so_far = torch.cat([so_far, torch.tensor([error])])
        if stagnates(so_far, 7):
            found.append(step)
            so_far = torch.empty(0)
    assert found == restarts(errors, 7)
    assert len(found) > 3
    assert [patience(100, 10), patience(101, 10), patience(100, 100)] == [50, 200, 100]


def test_ld_begins_a_fresh_network_with_a_fresh_optimiser(real: RealImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.baselines.ld.patience", lambda images, classes: 2)
    learning = ld(LdOptions(dataset="digits", batch_real=16, inner_batch_size=4), real, NET)
    theta, lengths = learning.carried["theta"], []
    for iteration in range(40):
        learning.step(iteration)
        lengths.append(len(learning.carried["errors"]))
        if lengths[-1] == 0:
            assert theta not in learning.optimiser.state
            assert float(theta[-10:].abs().max()) <= 1 / 8  # as initialised: ±1/√64
    assert lengths.count(0) > 1


# ------------------------------------------------------------------ what all share


def test_starting_images_are_real_or_noise(real: RealImages) -> None:
    start, noise = (starting_images(real, 3, kind, 0) for kind in ("real", "noise"))
    assert start.labels.tolist() == noise.labels.tolist() == [label for label in range(10) for _ in range(3)]
    everything, labels = real.train.batch(slice(None))
    for image, label in zip(start.pixels, start.labels, strict=True):
        assert (everything[labels == label] == image).all(dim=(1, 2, 3)).any()
    assert abs(float(noise.pixels.mean())) < 0.1
    assert float(noise.pixels.std()) == pytest.approx(1, abs=0.1)
    with pytest.raises(InputError, match="--ipc 5000: class 0 has only"):
        class_members(real, 5000)


def test_a_batch_has_every_image_once(real: RealImages) -> None:
    members = class_members(real, 1)[4]
    seen, labels = random_batch(real.train, members, 10**6, seeded())
    assert len(seen) == len(members)
    assert set(labels.tolist()) == {4}
    assert torch.equal(
        seen.flatten(1).sum(1).sort().values, real.train.batch(members)[0].flatten(1).sum(1).sort().values
    )


@pytest.mark.parametrize("name", ["dm", "dc", "dsa", "dd", "ld"])
def test_an_iteration_depends_on_its_number_alone(name: str, real: RealImages) -> None:
    method = METHODS[name]
    learnings = [method.make(method.options(dataset="digits"), real, NET) for _ in range(2)]
    losses, sets = [], []
    for learning in learnings:
        assert isinstance(learning, LearnedSet)
        losses.append([learning.step(7), learning.step(8)])
        sets.append(torch.cat([learning.images.flatten(), learning.labels.flatten()]))
    assert losses[0] == losses[1]
    assert torch.equal(*sets)
