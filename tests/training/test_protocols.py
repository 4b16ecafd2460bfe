"""Test protocols against plain loops of torch.nn and torch.optim, with batch norm's running statistics; pools of networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtt_fast import ConvNet, FlatModule, InputError, SiameseAugment, SyntheticDataset, evaluate
from mtt_fast.commands import cli
from mtt_fast.commands.accuracies import (
    accuracy_by_network,
    accuracy_fields,
    accuracy_record,
    format_accuracy,
    remarks_on,
)
from mtt_fast.commands.options import EvaluationOptions
from mtt_fast.cross import command as cross
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.distill import command as distill
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.kernels import Precision
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.flat_module import in_evaluation, statistics_of, track_of
from mtt_fast.networks.pools import POOLS
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.testing import assert_close
from mtt_fast.training.accuracy import count_correct
from mtt_fast.training.epochs import Epochs
from mtt_fast.training.evaluation import Accuracy, training_job
from mtt_fast.training.evaluation import evaluate as measure
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import Sgd
from mtt_fast.training.protocols import PROTOCOLS, EvaluationProtocol, protocol_by_name
from tests.training.jobs import finished

pytestmark = pytest.mark.usefixtures("no_curves")


def with_batch_norm(momentum: float | None = 0.1) -> nn.Sequential:
    """Return a network with two norms, of which one has an affine part; float64."""
    layers = [
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3, affine=False, momentum=momentum), nn.Flatten(), nn.Linear(3, 3),
    ]  # fmt: skip
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_statistics_are_those_of_a_plain_training_loop(momentum: float | None) -> None:
    module = with_batch_norm(momentum)
    net = FlatModule(module)
    images = Images(torch.randn(8, 2, 6, 6, dtype=torch.float64), torch.arange(8) % 3)
    sgd = Sgd(0.05, momentum=0.9, weight_decay=5e-4, batch_size=3)
    epoch = Epochs(GenericStudent(net), images, sgd, None, track_of(net))
    theta, statistics = net.init(), list(statistics_of(net))
    velocity = torch.zeros_like(theta)
    orders, generator = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    unseen = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    for _ in range(3):
        theta, velocity, _, *statistics = epoch(theta, velocity, generator, *statistics)
        module.train()
        for index in torch.randperm(8, generator=orders).split(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(images.pixels[index]), images.labels[index]).backward()
            optimizer.step()
        plain = nn.utils.parameters_to_vector(module.parameters()).detach()
        assert_close("parameters", theta - net.init(), plain - net.init(), 1e-10)
        running = [buffer.double().reshape(-1) for buffer in module.buffers()]
        assert_close("statistics", statistics[0], torch.cat(running), 1e-12)
        tested = in_evaluation(net, *statistics)
        assert not tested.mixes_samples
        assert_close("logits", tested(theta, unseen), module.eval()(unseen), 1e-10)
        in_float32 = in_evaluation(net, *(each.float() for each in statistics))  # which follow the parameters
        assert_close("logits", in_float32(theta, unseen), module.eval()(unseen), 1e-5)


def test_a_network_without_batch_norm_keeps_no_statistics() -> None:
    for net in (ConvNet(width=4), FlatModule(nn.Linear(2, 2)), FlatModule(with_batch_norm().eval())):
        assert statistics_of(net) == ()
        assert track_of(net) is None
        assert in_evaluation(net) is net


def test_a_frozen_batch_norm_keeps_its_statistics_beside_one_in_training() -> None:
    module = with_batch_norm()
    module(torch.randn(4, 2, 6, 6, dtype=torch.float64))
    module[1].eval()
    net, images = FlatModule(module), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    assert net.mixes_samples
    assert statistics_of(net)[0].numel() == 3 + 3 + 1
    assert_close("logits", net(net.init(), images), module(images), 1e-12)


@pytest.mark.parametrize("name", ["mtt", "ddranking", "selmatch"])
@pytest.mark.parametrize("model", ["ConvNetD1W4BN", "ConvNetD1W4"])
def test_a_protocol_is_that_written_out(name: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one batch, whose order does not matter. The best of every second epoch stands for every tenth."""
    monkeypatch.setattr("mtt_fast.training.protocols._TEST_INTERVAL", 2)
    net = network_by_name(model, (1, 6, 6), 3)
    train = Images(torch.randn(12, 1, 6, 6), torch.arange(12) % 3)
    test = Images(torch.randn(60, 1, 6, 6), torch.arange(60) % 3)
    protocol = protocol_by_name(name, epochs=7, batch_size=None, augment="none", best_epoch=False)
    start = net.init(generator_for(0, "evaluation", 0))
    in_double = Images(train.pixels.double(), train.labels)
    end = finished(training_job(net, start.double(), in_double, 0.05, protocol, torch.Generator()))

    norm: nn.Module = nn.BatchNorm2d(4) if "BN" in model else nn.GroupNorm(4, 4)
    layers = (nn.Conv2d(1, 4, 3, padding=3), norm, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(100, 3))
    module = nn.Sequential(*layers).double()
    nn.utils.vector_to_parameters(start.double(), module.parameters())
    lr, accuracies = 0.05, []
    optimizer = torch.optim.SGD(module.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    schedule: torch.optim.lr_scheduler.LRScheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=lr * 0.01)
        if name == "selmatch"
        else torch.optim.lr_scheduler.MultiStepLR(optimizer, [7 // 2], gamma=0.1)
    )
    for epoch in range(7 if name == "ddranking" else 8):
        module.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(in_double.pixels), train.labels).backward()
        optimizer.step()
        with torch.no_grad():
            predictions = module.eval()(test.pixels.double()).argmax(1)
        accuracies.append(float((predictions == test.labels).double().mean()))
        if name != "mtt":
            schedule.step()
        elif epoch == 7 // 2 + 1:
            lr *= 0.1
            optimizer = torch.optim.SGD(module.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    plain = nn.utils.parameters_to_vector(module.parameters()).detach()
    assert_close("parameters", end - start, plain - start, 1e-10)

    result = measure(net, lambda _: train, test, 0.05, protocol, num_networks=1, seed=0)
    tested = [accuracies[1], accuracies[3], accuracies[5], accuracies[6]] if name == "ddranking" else accuracies[-1:]
    assert result.values[0] == pytest.approx(max(tested), abs=0.5 / 60)
    assert result.record().get("epoch") == ("best" if name == "ddranking" else None)


@pytest.mark.native
def test_all_epochs_are_augmented_and_in_the_protocols_batches() -> None:
    net = ConvNet(1, 3, 6, width=4, depth=1)
    images, start = Images(torch.randn(12, 1, 6, 6), torch.arange(12) % 3), net.init(torch.Generator().manual_seed(0))
    protocol = EvaluationProtocol(epochs=3, batch_size=5, augment="color_flip")
    theta, generator = start, torch.Generator().manual_seed(1)
    for lr, epochs in ((0.05, 3), (0.05 * 0.1, 1)):
        epoch = Epochs(FusedConvNetStudent(net), images, Sgd(lr, 0.9, 5e-4, 5), SiameseAugment("color_flip"))
        velocity = torch.zeros_like(start)
        for _ in range(epochs):
            theta, velocity, _ = epoch(theta, velocity, generator)
    assert torch.equal(
        finished(training_job(net, start, images, 0.05, protocol, torch.Generator().manual_seed(1))), theta
    )


@pytest.mark.native
def test_a_network_is_trained_in_the_precision_that_is_asked_for() -> None:
    net = network_by_name("ConvNetD1W4", (1, 6, 6), 3)
    images, start = Images(torch.randn(12, 1, 6, 6), torch.arange(12) % 3), net.init(torch.Generator().manual_seed(0))
    protocol = EvaluationProtocol(epochs=2, augment="none")
    both: tuple[Precision, Precision] = ("fp32", "bf16")  # which a CPU emulates
    exact, rounded = (
        finished(training_job(net, start, images, 0.1, protocol, torch.Generator().manual_seed(1), precision=precision))
        for precision in both
    )
    assert 0 < float((rounded - exact).norm()) < 0.1 * float((exact - start).norm())


def test_protocols_say_what_they_do() -> None:
    assert PROTOCOLS["mtt"] == EvaluationProtocol()
    said = {name: protocol.describe() for name, protocol in PROTOCOLS.items()}
    assert "1001 epochs in batches of 256" in said["mtt"]
    assert "a tenth of it after 502 epochs in a new optimizer" in said["mtt"]
    assert "1001 epochs in batches of 128" in said["datm"]
    assert "1000 epochs in batches of 256" in said["ddranking"]
    assert "a tenth of it after 500 epochs in the same optimizer" in said["ddranking"]
    assert (
        "the BEST of every 10th epoch (20th with soft labels) and the last is reported, chosen on the test images"
        in said["ddranking"]
    )
    assert (
        "2000 epochs in batches of 128, AdamW with weight decay 0.01, learning rate 0.001, half of it after each fifth"
        in said["ncfm"]
    )
    assert (
        "rotate (flip and colors of all images, one of the others in each step, no cutout), CutMix in half the steps;"
        in said["ncfm"]
    )
    assert "the BEST after every 100 epochs (2 with 50 and more images per class) and the last" in said["ncfm"]
    without = dataclasses.replace(PROTOCOLS["ncfm"], augment="none").describe()
    assert "augmentation none, CutMix in half the steps;" in without
    assert all("the last epoch is reported" in said[name] for name in ("mtt", "datm", "selmatch"))
    assert "1001 epochs in batches of 128" in said["selmatch"]
    assert "learning rate 0.1, which falls to 0.01 of it along a cosine" in said["selmatch"]
    assert (
        "an operation of its own for each image, for real images in a distilled set a crop and a flip"
        in said["selmatch"]
    )
    assert "augmentation none;" in dataclasses.replace(PROTOCOLS["selmatch"], augment="none").describe()
    tested = [
        [epoch for epoch in range(1, 1002) if protocol.is_tested(epoch, protocol.test_interval(soft=soft, ipc=50))]
        for protocol, soft in (
            (PROTOCOLS["mtt"], False),
            (PROTOCOLS["ddranking"], False),
            (PROTOCOLS["ddranking"], True),
        )
    ]
    assert tested == [[1001], list(range(10, 1001, 10)), list(range(20, 1001, 20))]


@pytest.mark.parametrize(
    ("epochs", "ipc", "every"), [(2000, 49, 100), (2000, 50, 2), (1000, 10, 100), (40, 50, 5), (3, 1, 1)]
)
def test_ncfm_tests_as_often_as_its_code(epochs: int, ipc: int, every: int) -> None:
    protocol = dataclasses.replace(PROTOCOLS["ncfm"], epochs=epochs)
    interval = protocol.test_interval(soft=True, ipc=ipc)
    tested = [epoch for epoch in range(1, epochs + 1) if protocol.is_tested(epoch, interval)]
    assert tested == list(range(every, epochs + 1, every))


def test_cutmix_mixes_soft_labels_too() -> None:
    """Train with labels that are classes and with the same as probabilities; a class without an image has its place."""
    net = ConvNet(1, 5, 6, width=4, depth=1)
    start, labels = net.init(torch.Generator().manual_seed(0)), torch.arange(12) % 3
    protocol = protocol_by_name("ncfm", epochs=2, batch_size=5, augment="none", best_epoch=False)
    pixels = torch.randn(12, 1, 6, 6)
    hard, soft = (
        finished(training_job(net, start, Images(pixels, each), 0.05, protocol, torch.Generator().manual_seed(1)))
        for each in (labels, nn.functional.one_hot(labels, 5).float())
    )
    assert torch.equal(hard, soft)
    assert not torch.equal(hard, start)


def test_options_choose_the_protocol() -> None:
    assert EvaluationOptions().evaluation_protocol() == EvaluationProtocol()
    datm = EvaluationOptions(protocol="datm", epoch_eval_train=30, best_epoch=True, dsa=False).evaluation_protocol()
    assert (datm.batch_size, datm.epochs, datm.best_epoch, datm.augment) == (128, 30, True, "none")
    assert EvaluationOptions(protocol="datm", batch_train=64).evaluation_protocol().batch_size == 64
    assert [EvaluationOptions(protocol=name).evaluation_protocol().epochs for name in ("datm", "ncfm")] == [1000, 2000]
    with pytest.raises(InputError, match="`protocol` kip: expected mtt, datm, ddranking, selmatch, ncfm"):
        EvaluationOptions(protocol="kip").evaluation_protocol()
    with pytest.raises(InputError, match="`epoch_eval_train` 0: expected at least 1 with `protocol` ddranking"):
        EvaluationOptions(protocol="ddranking", epoch_eval_train=0).evaluation_protocol()


@pytest.fixture
def a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    from mtt_fast.data import load

    data = load("digits", data_path="data", progress=False)
    recipe: dict[str, Any] = {"dataset": "digits", "model": "ConvNetD1W4", "num_eval": 2, "epoch_eval_train": 3}
    SyntheticDataset(
        torch.randn(10, 1, 8, 8),
        torch.arange(10),
        torch.tensor(0.02),
        data.class_names,
        data.mean,
        data.std,
        recipe=recipe,
    ).save("set.safetensors")
    return tmp_path / "set.safetensors"


ONE_EPOCH = "--model ConvNetD1W4 --num_eval 1 --epoch_eval_train 1".split()


def result_of(*arguments: str) -> dict[str, Any]:
    assert cli.run(evaluate.main, [*arguments, "--out", "result.json"]) == 0
    result: dict[str, Any] = json.loads(Path("result.json").read_text())
    return result


def test_a_set_is_evaluated_on_the_networks_of_a_pool(a_set: Path) -> None:
    result = result_of(str(a_set), "--eval_mode", "C", "--model", "ConvNetD1W4BN", "--protocol", "datm")
    assert list(result["accuracy_by_network"]) == ["ConvNetD1W4BN", "ConvNet"]
    assert result["accuracy"] == result["accuracy_by_network"]["ConvNetD1W4BN"]
    assert "epoch" not in result["accuracy"]
    assert result["protocol"]["name"] == "datm"
    assert result["protocol"]["batch_size"] == 128
    alone = result_of(str(a_set))
    assert (alone["model"], list(alone["accuracy_by_network"])) == ("ConvNetD1W4", ["ConvNetD1W4"])
    best = result_of(str(a_set), "--best_epoch")
    assert best["accuracy"]["epoch"] == "best"
    assert best["accuracy"]["values"] == alone["accuracy"]["values"]  # of three epochs only the last is tested


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--model ConvNetD1W4BN",
            ["--model ConvNetD1W4BN, --eval_mode S: networks are evaluated with instance norm as ConvNetD1W4,"],
        ),
        ("--model ConvNetD1W4BN --eval_mode SS", []),
        ("--model ConvNetD1W4", []),
        # true of any set, also of one whose distillation evaluated further networks, which this leaves out
        (
            "--model ConvNetD1W4 --eval_mode SS",
            ["--eval_mode SS is the same as S at --model ConvNetD1W4, which S does not change"],
        ),
    ],
)
def test_another_network_than_the_models_is_told(
    words: str, told: list[str], a_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    result_of(str(a_set), *words.split())
    assert [line.split(" as in")[0] for line in caplog.messages if "eval_mode" in line] == told


def test_the_protocols_rate_stands_in_for_that_of_the_set(a_set: Path) -> None:
    assert result_of(str(a_set))["lr"] == pytest.approx(0.02)
    assert result_of(str(a_set), "--protocol", "selmatch")["lr"] == 0.1
    assert result_of(str(a_set), "--protocol", "selmatch", "--lr_teacher", "0.3")["lr"] == 0.3
    assert result_of("random", "--dataset", "digits", *ONE_EPOCH, "--protocol", "selmatch")["lr"] == 0.1
    assert result_of(str(a_set), "--protocol", "selmatch", "--epoch_eval_train", "0")["protocol"]["epochs"] == 0


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("", "0.02"),
        ("--lr_teacher 0.3", "0.3"),
        ("--protocol selmatch", "0.1"),
        ("--protocol selmatch --lr_teacher 0.3", "0.3"),
    ],
)
def test_the_log_and_the_record_describe_the_rate_that_is_used(
    words: str, rate: str, a_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    text = result_of(str(a_set), *words.split())["protocol"]["text"]
    assert f", learning rate {rate}, " in text
    assert text in caplog.text
    caplog.clear()
    assert cli.run(cross.main, [a_set.name, *words.split(), *ONE_EPOCH, "--eval_mode", "S"]) == 0
    described = f"learning rate {rate}" if words else "the set's learning rate"
    for said in (caplog.text, Path("runs/cross/cross.md").read_text()):
        assert f", {described}, " in said


def test_a_set_is_evaluated_by_ncfms_protocol(a_set: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = result_of(str(a_set), "--protocol", "ncfm", "--epoch_eval_train", "2")
    assert (result["lr"], result["images"], result["accuracy"]["epoch"]) == (1e-3, 10, "best")
    caplog.set_level("INFO")
    assert result_of(str(a_set), "--protocol", "ncfm", *ONE_EPOCH, "--factor", "2")["images"] == 10  # the stored ones
    assert "each image is taken for 2 × 2 smaller ones" in caplog.text


def test_random_images_are_said_to_be_trained_on_at_their_rate(a_set: Path) -> None:
    assert ", learning rate 0.01, " in result_of("random", "--dataset", "digits", *ONE_EPOCH)["protocol"]["text"]


def test_evaluations_come_back_from_their_records() -> None:
    one, other = Accuracy((0.5, 0.7)), Accuracy((0.25,), best_epoch=True)
    record = {"mean": 0.6, "std": pytest.approx(0.02**0.5), "n": 2}
    line = accuracy_fields({"A": one})
    assert line == {"accuracy_mean": 0.6, "accuracy_std": record["std"], "networks": 2}
    assert accuracy_record(line) == record
    assert accuracy_by_network(line, "A") == {"A": record}
    both = accuracy_fields({"A": one, "B": other})
    assert accuracy_by_network(both, "A") == {"A": record, "B": record | {"mean": 0.25, "std": 0.0}}
    best = {"mean": 0.25, "std": 0.0, "n": 1, "epoch": "best"}
    assert accuracy_record(accuracy_fields({"B": other})) == best
    diverged = {"mean": 0.4, "std": pytest.approx(0.32**0.5), "n": 2, "diverged": 1}
    both = accuracy_fields({"A": one, "B": Accuracy((0.8, 0.0), diverged=1)})
    assert accuracy_by_network(both, "A") == {"A": record, "B": diverged}
    assert [remarks_on(each) for each in (record, best, diverged, best | {"diverged": 1})] == [
        "",
        " (best epoch)",
        " (1 of 2 diverged)",
        " (best epoch, 1 of 1 diverged)",
    ]
    assert format_accuracy(both) == format_accuracy(line) == "60.00 % ± 14.14"
    assert format_accuracy(accuracy_fields({"A": Accuracy((0.0,), diverged=1)})) == "0.00 % ± 0.00 (1 of 1 diverged)"


TOY = (
    "--dataset digits --model ConvNetD1W4BN --num_experts 1 --train_epochs 2 --max_start_epoch 1 --expert_epochs 1 "
    "--syn_steps 2 --Iteration 1 --eval_it 1 --num_eval 2 --epoch_eval_train 2 --batch_real 512 --lr_img 10"
).split()


def test_a_network_with_batch_norm_is_distilled_with_a_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(distill.main, [*TOY, "--eval_mode", "SS", "--out", "run", "--protocol", "ddranking"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert list(summary["accuracy_by_network"]["distilled"]) == ["ConvNetD1W4BN"]
    assert summary["accuracy"]["distilled"]["epoch"] == "best"
    assert "(best epoch)" in summary["text"]
    assert summary["protocol"]["name"] == "ddranking"
    flags = ["--eval_mode", "C", "--num_eval", "1", "--out", "other"]
    assert cli.run(distill.main, [*TOY, *flags]) == 0
    summary = json.loads(Path("other/summary.json").read_text())
    assert set(summary["accuracy_by_network"]["distilled"]) == {"ConvNetD1W4BN", "ConvNet"}
    lines = [json.loads(line) for line in Path("other/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "evaluation"][-1]
    assert last["accuracy_mean"] == last["accuracy_mean/ConvNetD1W4BN"]
    assert summary["accuracy_by_network"]["distilled"]["ConvNet"]["mean"] == last["accuracy_mean/ConvNet"]
    for flags, message in (
        (["--eval_mode", "M"], "VGG11: nothing is left"),
        (["--eval_mode", "Q"], "--eval_mode Q: expected one of"),
        (["--microbatch", "2"], "batch norm uses batch statistics"),
    ):
        assert cli.run(distill.main, [*TOY, *flags, "--out", "refused"]) == 2
        assert message in capsys.readouterr().err
        assert not Path("refused/synthetic.safetensors").exists()


def test_the_accuracy_of_an_expert_with_batch_norm_is_that_of_its_evaluation_mode() -> None:
    net = network_by_name("ConvNetD1W4BN", (1, 6, 6), 3)
    theta, (statistics,) = net.init(torch.Generator().manual_seed(0)), statistics_of(net)
    test = Images(3 + torch.randn(30, 1, 6, 6), torch.arange(30) % 3)

    def right(values: Tensor) -> int:
        module = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(100, 3),
        )
        nn.utils.vector_to_parameters(theta, module.parameters())
        module[1].running_mean, module[1].running_var = values[:4], values[4:8]
        with torch.no_grad():
            return int((module.eval()(test.pixels).argmax(1) == test.labels).sum())

    after = net.track(theta, test.pixels, statistics) if isinstance(net, FlatModule) else statistics
    assert not torch.equal(after, statistics)
    for values in (statistics, after):
        assert int(count_correct(in_evaluation(net, values), theta, test)) == right(values)


def test_the_model_comes_first_in_its_pool_by_whichever_name() -> None:
    """Check the first network, which decides which images are best and has the summary's one accuracy."""
    info = dataset_info("CIFAR10")
    for model, mode, first in (
        ("ConvNet", "W", "ConvNetW128"),
        ("ConvNetD3", "N", "ConvNetIN"),
        ("ResNet18", "M", "ResNet18"),
        ("MLP", "D", "ConvNetD1"),
    ):
        names = list(EvaluationOptions(model=model, eval_mode=mode).evaluated_networks(info))
        assert names[0] == first
        assert sorted(names) == sorted(POOLS[mode])
