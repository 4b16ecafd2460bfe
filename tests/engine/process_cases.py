"""Calls of `unroll` that processes share, in float64, and calls that they refuse; as a program, the processes that make them.

python -m tests.engine.process_cases PROCESSES FOLDER
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mtt_fast
from mtt_fast import Adam, Augmentation, ConvNet, FlatModule, InputError, SiameseAugment, matching_loss, unroll
from mtt_fast.engine.students.live_bytes import CountLiveBytes
from mtt_fast.testing import reference_convnet

Group = dist.ProcessGroup | None

NET = ConvNet(image_size=8, width=6, depth=2, num_classes=4)
DSA = SiameseAugment()
# unequal shares, a short batch, shares without samples, an index twice
BATCHES = [torch.tensor(rows) for rows in ([0, 1, 2, 3, 4, 5, 6], [8, 7, 6, 5, 4, 3, 2, 1, 0], [4, 4], [7], [1, 0, 8])]
CLASSES = torch.arange(9) % 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES, SOFT = drawn(9, 3, 8, 8), drawn(9, 4, seed=1)


def module(*middle: nn.Module) -> FlatModule:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), *middle, nn.Softplus(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(24, 4)
    return FlatModule(nn.Sequential(*layers).double())


def gradients(
    group: Group,
    net: Any = NET,
    labels: Tensor = CLASSES,
    lr: float | Tensor = 0.1,
    velocity: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """Return the path, and the gradients of a loss of several of its rows with respect to all that is learned."""
    start, images, rate = net.init(torch.Generator().manual_seed(2)).double(), IMAGES.clone(), torch.as_tensor(lr)
    learned = [start, images, rate.double().clone(), *([labels.clone()] if labels.is_floating_point() else [])]
    start, images, rate, *soft = (tensor.requires_grad_() for tensor in learned)
    results: Any = unroll(  # type: ignore[call-overload]
        net, start, images, soft[0] if soft else labels, rate, BATCHES, velocity=velocity,
        return_velocity=velocity is not None, group=group, **options,
    )  # fmt: skip
    path, *after = [results] if velocity is None else results
    loss = loss_of(path) + sum(each.square().sum() for each in after)
    return [path.detach(), *torch.autograd.grad(loss, [tensor for tensor in learned if tensor.requires_grad])]


def loss_of(path: Sequence[Tensor] | Tensor) -> Tensor:
    return matching_loss(path[-1], path[0], path[0].detach() + 0.02) + path[1].square().sum() + path[2].sum()


def rank_in(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def draws() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [DSA.draw(IMAGES[index], generator) for index in BATCHES]


def mirror() -> Augmentation:
    """Return an augmentation that is no warp and mixes samples, which the whole batch goes through in each process."""
    return Augmentation(
        draw=lambda images, generator: {"flip": torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5},
        apply=lambda images, draws: torch.where(draws["flip"], images.flip(3), images) + 0.1 * images.roll(1, 0),
    )


def saving(net: Any, microbatch: int) -> mtt_fast.Plan:
    whole = mtt_fast.plan(net, images=IMAGES, steps=len(BATCHES), dtype=torch.float64, memory_budget=None)
    return replace(whole, saved_steps=3, microbatch=microbatch)


def squares(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - labels).square().mean()


def of_pairs(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def hard_examples(outputs: Tensor, labels: Tensor) -> Tensor:
    """Leave out the samples that are learned, of which there is none at first."""
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return losses[losses > 1].mean() if (losses > 1).any() else 0 * losses.sum()


def hardest(outputs: Tensor, labels: Tensor) -> Tensor:
    """Leave out none of a process's share of 24 samples."""
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return losses.topk(min(12, len(losses))).values.mean()


class Centred(nn.Module):
    """Subtract the mean of the batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - 0.5 * inputs.mean(0)


SHARED: dict[str, Callable[[Group], list[Tensor]]] = {
    "convnet": lambda group: gradients(group),
    "DSA, momentum, a rate for each step": lambda group: gradients(
        group, augment=DSA, draws=draws(), momentum=0.5, weight_decay=0.01, lr=torch.linspace(0.1, 0.2, len(BATCHES))
    ),
    "DSA in pieces": lambda group: gradients(group, augment=DSA, draws=draws(), microbatch=2),
    "learned logits, saved activations": lambda group: gradients(
        group, labels=SOFT, label_kind="logits", plan=saving(NET, 2)
    ),
    "module": lambda group: gradients(group, module()),
    "module, learned probabilities, saved graphs": lambda group: gradients(
        group, module(nn.GroupNorm(2, 6)), labels=SOFT.softmax(1), plan=saving(module(nn.GroupNorm(2, 6)), 9)
    ),
    "module, a memory budget": lambda group: gradients(group, module(), memory_budget="1GiB"),
    "module, an augmentation, Adam": lambda group: gradients(
        group, module(), augment=mirror(), generator=torch.Generator().manual_seed(4), optimizer=Adam()
    ),
    "a velocity": lambda group: gradients(group, velocity=0.1 * drawn(NET.num_parameters), momentum=0.9),
    "a rate for each parameter": lambda group: gradients(
        group, module(), lr=0.1 + 0.01 * drawn(len(BATCHES), module().num_parameters).abs()
    ),
    "truncated": lambda group: gradients(group, gradient="truncated", weight_decay=0.01),
    "a loss of one's own": lambda group: gradients(group, labels=SOFT, loss=squares),
    "module, a loss of one's own": lambda group: gradients(group, module(), labels=SOFT, loss=squares, microbatch=1),
    "other pieces in each process": lambda group: gradients(
        group, module(), plan=replace(saving(module(), 1 + rank_in(group)), saved_steps=rank_in(group))
    ),
    "path in host memory": lambda group: gradients(
        group, plan=replace(saving(NET, 9), saved_steps=0, path_on_host=True), momentum=0.5
    ),
}  # fmt: skip


def call(group: Group, net: Any = NET, loss: Any = None, **changes: Any) -> Tensor:
    arguments = {
        "theta": net.init(torch.Generator().manual_seed(2)).double(),
        "images": IMAGES,
        "labels": CLASSES,
        "lr": 0.5,
    }
    return unroll(net, **arguments | {"batches": BATCHES} | changes, loss=loss, group=group)  # type: ignore[no-any-return]


def changed_later(group: Group, net: Any) -> None:
    """Change what the loss or the augmentation of one process reads, between the call and its backward pass."""
    factor = torch.ones(())
    augment = Augmentation(lambda images, _: len(images), lambda images, _: factor * images)
    loss = {"loss": lambda outputs, labels: factor * F.cross_entropy(outputs, labels)}
    images = IMAGES.clone().requires_grad_()
    path = call(group, net, images=images, **loss if isinstance(net, FlatModule) else {"augment": augment})
    factor += 0.5 * (dist.get_rank() == 1)
    path[-1].sum().backward()


def of_another_loss(group: Group, row: int, *, factor: float = 1.0) -> None:
    images = IMAGES.clone().requires_grad_()
    (factor * call(group, images=images)[row].square().sum()).backward()


def without_gradient(group: Group) -> Tensor:
    with torch.set_grad_enabled(dist.get_rank() != 1):
        return call(group, images=IMAGES.clone().requires_grad_())


def of_drawn_numbers(group: Group, *draws: Any) -> Tensor:
    """Call with the draws of this process, one of two, which are no tensors."""
    augment = Augmentation(lambda images, _: draws[dist.get_rank() == 1], lambda images, drawn: 0.1 * images)
    return call(group, augment=augment)


def of_this_process(tensor: Tensor) -> Tensor:
    """Return a tensor that is another one in one process."""
    tensor = tensor.clone()
    tensor.view(-1)[-1] += dist.get_rank() == 1
    return tensor


REFUSED: dict[str, Callable[[Group], object]] = {
    "theta": lambda group: call(group, theta=of_this_process(NET.init().double() * 0)),
    "images": lambda group: call(group, images=of_this_process(IMAGES)),
    "labels": lambda group: call(group, labels=of_this_process(CLASSES)),
    "lr": lambda group: call(group, lr=0.1 * (1 + dist.get_rank())),
    "batches": lambda group: call(group, batches=[*BATCHES[:-1], of_this_process(torch.tensor([1, 0, 7]))]),
    "order": lambda group: call(group, batches=[torch.arange(9).roll(dist.get_rank())] * 3),
    "draws": lambda group: call(group, augment=DSA, generator=torch.Generator().manual_seed(dist.get_rank())),
    "draws of numpy": lambda group: of_drawn_numbers(group, np.int64(1), np.int64(2)),
    "draws of the same digits": lambda group: of_drawn_numbers(group, (1, 12), (11, 2)),
    "grad mode": without_gradient,
    "return_velocity": lambda group: call(group, return_velocity=dist.get_rank() == 1),
    "another loss": lambda group: of_another_loss(group, -1, factor=1.0 + 0.01 * (dist.get_rank() == 1)),
    "a loss of another row": lambda group: of_another_loss(group, 3 + (dist.get_rank() == 1)),
    "meta": lambda group: call(group, theta=NET.init().to("meta"), images=IMAGES.to("meta"), labels=CLASSES.to("meta")),
    "momentum, velocity": lambda group: call(
        group, momentum=0.5 + 0.1 * dist.get_rank(), velocity=of_this_process(drawn(NET.num_parameters))
    ),
    "batch norm": lambda group: call(group, module(nn.BatchNorm2d(6))),
    "samples that mix": lambda group: call(group, module(Centred())),
    "pairs": lambda group: call(group, loss=of_pairs),
    "hardest": lambda group: call(group, loss=hardest, batches=[torch.arange(24) % 9]),
    "a changed loss": lambda group: changed_later(group, module()),
    "a changed augmentation": lambda group: changed_later(group, NET),
    # four equal images of four classes are never learned, so that not all of three processes see samples that are
    "a mean at first": lambda group: call(
        group,
        loss=hard_examples,
        lr=0.2,
        images=torch.cat([IMAGES[:1].expand(4, -1, -1, -1), IMAGES[4:]]),
        batches=[torch.arange(8)] * 10,
    ),
}


def outcomes(group: Group) -> dict[str, Any]:
    """Return the results of `SHARED`, the messages of `REFUSED`, and the peak of live bytes in a call."""
    results: dict[str, Any] = {name: case(group) for name, case in SHARED.items()}
    for name, refused in REFUSED.items():
        try:
            results[name] = refused(group)
        except InputError as error:
            results[name] = str(error)
    results["bytes"] = live_bytes(group)
    return results


def live_bytes(group: Group) -> int:
    """Return the peak of a step on a batch of 24 samples, the whole of which each process has."""
    net, images = wide(), torch.zeros(24, 3, 16, 16, requires_grad=True)
    theta, batch = torch.zeros(net.num_parameters), torch.arange(24)
    with CountLiveBytes() as counter:
        unroll(net, theta, images, batch % 10, 0.1, [batch], group=group)[-1].sum().backward()
    return int(counter.peak)


def wide() -> FlatModule:
    """Return a network whose samples take most of the memory of a step."""
    return FlatModule(reference_convnet(3, 10, 16, 24, 2))


def work(rank: int, processes: int, folder: str) -> None:
    """Write the outcomes in a group of two processes and in one of all."""
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), rank=rank, world_size=processes)
    for group in (dist.new_group([0, 1]), dist.group.WORLD):
        if isinstance(group, dist.ProcessGroup):
            torch.save(outcomes(group), f"{folder}/{group.size()}-{rank}.pt")
            continue
        try:
            call(group)
        except InputError as error:
            torch.save(str(error), f"{folder}/outside.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked process has no others
    gradients(None, module())  # so that each finds all modules loaded
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    count, place = int(sys.argv[1]), sys.argv[2]
    started = [context.Process(target=work, args=(rank, count, place)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    sys.exit(any(process.exitcode for process in started))
