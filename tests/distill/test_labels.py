"""Test labels that are learned, or that experts give: values against plain torch, and runs that are resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mtt_fast import ConvNet, SyntheticDataset, TrajectoryStore
from mtt_fast.commands import cli
from mtt_fast.distill.command import main
from mtt_fast.distill.evaluation import log_recognised
from mtt_fast.distill.labels import class_logits, expert_logits, experts_at, mean_teacher_labels, teacher_labels
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.updates import update
from mtt_fast.runtime.interrupts import Stopped, StopRequest
from mtt_fast.storage.checkpoint import State, load_checkpoint
from mtt_fast.storage.tensor_files import load_tensors
from mtt_fast.testing import assert_close, module_function, reference_convnet
from mtt_fast.training.evaluation import Accuracy, training_job
from mtt_fast.training.images import as_training_images
from mtt_fast.training.protocols import EvaluationProtocol
from tests.training.jobs import finished

CPU = torch.device("cpu")
TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 "
    "--syn_steps 3 --Iteration 1 --eval_it 9 --num_eval 1 --epoch_eval_train 1 --batch_real 64 --expert_lr 0.05 --lr_img 10"
).split()


def state_of(labels: torch.Tensor) -> State:
    images, lr = torch.randn(len(labels), 1, 4, 4), torch.tensor(0.02)
    return State(0, 2, images, labels, lr, torch.zeros_like(images), torch.zeros_like(lr))


def test_fixed_labels_stay_what_they_are() -> None:
    state = state_of(torch.arange(3))
    update(DistillOptions(), state, torch.ones_like(state.images), torch.zeros(()))
    assert state.labels.tolist() == [0, 1, 2]


def test_class_logits_give_the_class_nine_tenths() -> None:
    probabilities = class_logits(torch.tensor([2, 0]), 4).softmax(dim=1)
    expected = torch.tensor([[1, 1, 27, 1], [27, 1, 1, 1]]) / 30
    torch.testing.assert_close(probabilities, expected)


MODULE = module_function(reference_convnet(1, 10, 8, 4, 1))


def store_of(experts: list[str]) -> TrajectoryStore:
    return TrajectoryStore(Path(experts[-1]) / "digits" / "ConvNetD1W4")


def one_iteration(experts: list[str], folder: Path, *flags: str) -> tuple[State, State, dict[str, int]]:
    """Return the state before and after the first iteration, and what it matched."""
    states = []
    for iterations in ("0", "1"):
        assert cli.run(main, [*TOY, *experts, "--out", str(folder), "--no_aug", *flags, "--Iteration", iterations]) == 0
        state = load_checkpoint(folder, CPU)
        assert state is not None
        states.append(state)
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return states[0], states[1], next(record for record in records if record["kind"] == "step")


def test_labels_begin_as_the_mean_of_the_experts_that_are_right(experts: list[str], tmp_path: Path) -> None:
    """Compare with DATM's code: all experts' last snapshots, their logits where they are right, summed and divided by their number."""
    before, _, _ = one_iteration(experts, tmp_path, "--ipc", "3", "--lr_y", "2", "--label_init", "experts")
    classes, store = torch.arange(10).repeat_interleave(3), store_of(experts)
    logits = torch.stack([MODULE(store.read(expert, 3), before.images) for expert in range(2)]).detach()
    right = logits.argmax(dim=2) == classes
    assert 0 < int(right.any(dim=0).sum()) < 30  # some are right, and some images nobody gets right
    for image, own in enumerate(classes.tolist()):
        answers = [logits[expert, image] for expert in range(2) if right[expert, image]]
        expected = sum(answers) / len(answers) if answers else class_logits(torch.tensor([own]), 10)[0]
        torch.testing.assert_close(before.labels[image], expected, rtol=1e-4, atol=1e-5)


def test_expert_logits_leave_out_those_that_are_wrong(caplog: pytest.LogCaptureFixture) -> None:
    begin = class_logits(torch.tensor([0, 1, 2]), 3)
    first, second = torch.tensor([[3.0, 1, 0], [2, 0, 1], [5, 1, 1]]), torch.tensor([[5.0, 0, 2], [0, 7, 1], [0, 9, 1]])

    def network(theta: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return theta[images.flatten().long()]

    logits = expert_logits(network, iter([first, second]), torch.arange(3.0).view(3, 1, 1, 1), begin)  # type: ignore[arg-type]
    torch.testing.assert_close(logits, torch.stack([(first[0] + second[0]) / 2, second[1], begin[2]]))
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "--label_init experts: no expert gets 1 of the 3 images right"
    ]
    caplog.clear()
    expert_logits(network, iter([first, second]), torch.arange(2.0).view(2, 1, 1, 1), begin[:2])  # type: ignore[arg-type]
    assert not caplog.records


def test_saved_teacher_labels_are_the_mean_of_all_experts_at_the_last_start_epoch(
    experts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    _, after, _ = one_iteration(experts, tmp_path, "--teacher_label")
    distilled = SyntheticDataset.load(tmp_path / "synthetic.safetensors")
    store = store_of(experts)
    expected = torch.stack([MODULE(store.read(expert, 2), after.images).softmax(dim=1) for expert in range(2)]).mean(
        dim=0
    )
    assert distilled.label_kind == "probabilities"
    torch.testing.assert_close(distilled.labels, expected.detach())
    right = int((expected.argmax(dim=1) == torch.arange(10)).sum())
    assert f"iteration 1: the experts give {right} of the 10 images its own class" in caplog.text
    distilled.export("mtt", tmp_path / "exported")
    written = torch.load(tmp_path / "exported" / "labels_best.pt", weights_only=True)
    torch.testing.assert_close(written.sum(dim=1), torch.ones(10))


def test_the_first_network_is_trained_on_random_images_with_labels_of_the_experts_last_epochs(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, Any] = {}

    def evaluated(network: Any, train: Any, *_: Any, name: str, **__: Any) -> Accuracy:
        trained[name] = network, train(torch.Generator())
        return Accuracy((0.5,))

    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", evaluated)
    flags = f"--teacher_label --eval_mode C --ipc 2 --out {tmp_path}".split()
    assert cli.run(main, [*TOY, *experts, *flags]) == 0
    store = store_of(experts)
    (network, images), (of_soft, soft) = (trained[name] for name in ("random real images", "labelled by experts"))
    assert network.num_parameters == of_soft.num_parameters == store.read(0, 0).numel()
    assert images.labels.tolist() == torch.arange(10).repeat_interleave(2).tolist()
    assert torch.equal(soft.pixels, images.pixels)
    expected = [MODULE(store.read(expert, 3), images.pixels).softmax(dim=1).detach() for expert in range(2)]
    torch.testing.assert_close(soft.labels, torch.stack(expected).mean(dim=0))


def test_a_resumed_run_asks_the_experts_for_labels_only_to_evaluate(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return mean_teacher_labels(*arguments)

    monkeypatch.setattr("mtt_fast.distill.evaluation.mean_teacher_labels", counted)
    line = [*TOY, *experts, "--out", str(tmp_path), "--no_aug", "--teacher_label", "--ema_decay", "0.5"]
    assert cli.run(main, [*line, "--Iteration", "0"]) == 0
    picture = (tmp_path / "images.png").read_bytes()
    (tmp_path / "images.png").unlink()
    assert len(calls) == 3  # for the images, their moving average, and random ones of one network
    (tmp_path / "summary.json").unlink()
    assert cli.run(main, [*line, "--Iteration", "0"]) == 0
    assert len(calls) == 3
    assert (tmp_path / "images.png").read_bytes() == picture


def test_a_stop_request_is_noticed_between_two_experts_that_label(experts: list[str]) -> None:
    store, stop = store_of(experts), StopRequest()
    thetas = iter(experts_at(store, None, CPU, stop))
    next(thetas)
    stop.signum = signal.SIGTERM
    with pytest.raises(Stopped, match="while experts label"):
        next(thetas)


def test_teacher_labels_are_made_for_the_images_that_are_seen() -> None:
    network = ConvNet(in_channels=1, num_classes=3, image_size=6, width=4, depth=1)
    thetas = [network.init(torch.Generator().manual_seed(seed)) for seed in range(3)]
    images = torch.randn(5, 1, 6, 6)
    every = [network(theta, images).softmax(dim=1) for theta in thetas]
    some = teacher_labels(network, thetas[0], images, index=torch.tensor([4, 1, 4]), batch=1)
    torch.testing.assert_close(some[[1, 4]], every[0][[1, 4]])
    assert not some[[0, 2, 3]].any()
    steps = teacher_labels(network, thetas[0], images, index=torch.tensor([4, 1, 0, 2, 3, 1]), batch=2)
    torch.testing.assert_close(steps, every[0])
    torch.testing.assert_close(mean_teacher_labels(network, iter(thetas), images), (every[0] + every[1] + every[2]) / 3)


def test_a_set_to_whose_images_the_experts_give_one_class_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    state = state_of(torch.tensor([0, 1, 2]))
    log_recognised(state, torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.2, 0.3], [0.1, 0.3, 0.6]]))
    log_recognised(state, torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.2, 0.3], [0.9, 0.1, 0.0]]))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert caplog.messages[0] == "iteration 0: the experts give 2 of the 3 images its own class"
    assert caplog.messages[1] == "iteration 0: the experts give 1 of the 3 images its own class"
    assert "the experts give all images one class" in caplog.messages[2]


def test_networks_are_trained_on_logits_with_datms_soft_cross_entropy() -> None:
    network = ConvNet(in_channels=1, num_classes=3, image_size=6, width=4, depth=1)
    pixels, logits = torch.randn(12, 1, 6, 6), 3 * torch.randn(12, 3)
    theta = network.init(torch.Generator().manual_seed(0))
    synthetic = SyntheticDataset(
        pixels, logits, torch.tensor(0.1), ("a", "b", "c"), (0.0,), (1.0,), label_kind="logits"
    )
    images, protocol = as_training_images(synthetic, CPU), EvaluationProtocol(epochs=4, augment="none")
    end = finished(training_job(network, theta, images, 0.1, protocol, torch.Generator()))
    function = module_function(reference_convnet(1, 3, 6, 4, 1))
    flat = theta.clone().requires_grad_()
    for rates in ([0.1] * 4, [0.01]):
        optimizer = torch.optim.SGD([flat], rates[0], momentum=0.9, weight_decay=5e-4)
        for _ in rates:
            loss = -(F.log_softmax(function(flat, pixels), dim=1) * F.softmax(logits, dim=1)).sum() / len(pixels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_close("parameters", end - theta, (flat - theta).detach(), 1e-4)


def test_learned_labels_are_saved_as_logits_and_exported_as_datm_writes_them(
    experts: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert cli.run(main, [*TOY, *experts, "--out", str(out), "--lr_y", "100"]) == 0
    distilled = SyntheticDataset.load(out / "synthetic.safetensors")
    start = class_logits(torch.arange(10), 10)
    assert distilled.label_kind == "logits"
    assert float((distilled.labels - start).abs().max()) > 1e-3
    assert distilled.classes.tolist() == list(range(10))
    distilled.export("mtt", tmp_path / "exported")
    written = torch.load(tmp_path / "exported" / "labels_best.pt", weights_only=True)
    assert torch.equal(written, distilled.labels)
    assert not written.requires_grad
    tensors, _ = load_tensors(out / "checkpoint.safetensors")
    assert torch.equal(tensors["labels"], distilled.labels)
