"""Learn the initial parameters (MAML), from which a few steps on a few images are enough. `python examples/few_shot.py --help`.

C. Finn, P. Abbeel & S. Levine, ICML 2017. A task has five classes, labelled anew from 0 to 4, and a few images of each.
The start of the student's path is learned, with one learning rate per step: the exact gradient reaches both through all
steps. A rotated digit is a class of its own. Training uses the digits 0 to 6, the test 7, 8 and 9.
"""

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import mtt_fast

WAYS = 5


def network(width: int) -> nn.Module:
    """Return a small convolutional network; any module can take its place."""
    block = [nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *block, nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(16 * width, WAYS)
    )


def task(classes: list[Tensor], shots: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw five classes; return `shots` images of each, ten more of each, and the labels of the former."""
    five = [classes[int(number)] for number in torch.randperm(len(classes), generator=random)[:WAYS]]
    drawn = [images[torch.randperm(len(images), generator=random)[: shots + 10]] for images in five]
    support, query = torch.cat([images[:shots] for images in drawn]), torch.cat([images[shots:] for images in drawn])
    return support, query, torch.arange(WAYS).repeat_interleave(shots)


def main(iterations: int = 200, tasks: int = 4, shots: int = 1, steps: int = 3, width: int = 16) -> None:
    """Learn to learn scikit-learn's digits.

    Args:
        iterations: updates of the start.
        tasks: number in each iteration.
        shots: images of each class in a task.
        steps: of the student on a task.
        width: channels of the network, a multiple of four.
    """
    random, digits = torch.Generator().manual_seed(0), load_digits()
    torch.manual_seed(0)  # torch's own layers draw from it
    pixels = torch.tensor(digits.images).float()[:, None] / 6 - 0.8
    classes = [
        pixels[torch.tensor(digits.target) == label].rot90(turn, (2, 3)) for label in range(10) for turn in range(4)
    ]
    net, right = mtt_fast.FlatModule(network(width)), torch.arange(WAYS).repeat_interleave(10)
    untrained = net.init()
    start, lrs = untrained.clone().requires_grad_(), torch.full((steps,), 0.1, requires_grad=True)

    def answers_from(start: Tensor, classes: list[Tensor]) -> Tensor:
        support, query, labels = task(classes, shots, random)
        path = mtt_fast.unroll(net, start, support, labels, lrs, torch.arange(len(labels)).expand(steps, -1))
        return net(path[-1], query)

    optimizer = torch.optim.Adam([{"params": [start], "lr": 3e-3}, {"params": [lrs], "lr": 1e-3}])
    for iteration in range(iterations):
        losses = [F.cross_entropy(answers_from(start, classes[:28]), right) for _ in range(tasks)]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 15 == 0:
            print(f"{iteration}: loss {loss.item():.3f} after {steps} steps")

    for name, theta in (("a random start", untrained), ("the learned start", start.detach())):
        random.manual_seed(1)  # the same tasks for both
        with torch.no_grad():
            logits = [answers_from(theta, classes[28:]) for _ in range(30)]
        share = torch.stack([(each.argmax(1) == right).double().mean() for each in logits])
        print(f"from {name}: {100 * share.mean():.1f} % right about new classes, {shots} of each seen")


if __name__ == "__main__":
    tyro.cli(main)
