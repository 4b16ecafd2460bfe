"""Matching training trajectories (MTT): ten images that train a network as 1,400 do. `python examples/mtt.py --help`."""

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor

import mtt_fast

AUGMENT = mtt_fast.SiameseAugment("color_crop_cutout_scale_rotate")  # no flip: digits have a left and a right


@torch.no_grad()
def expert(net: mtt_fast.ConvNet, images: Tensor, labels: Tensor, epochs: int, random: torch.Generator) -> Tensor:
    """Train a network on real images; return its parameters after every epoch, (epochs + 1, P).

    Without gradients `unroll` is a training loop like any other, and its path is an expert's trajectory.
    """
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images), generator=random).split(64)]
    path = mtt_fast.unroll(net, net.init(random), images, labels, 0.02, batches, AUGMENT, generator=random)
    return path[:: len(batches) // epochs].clone()


@torch.no_grad()
def accuracy(net: mtt_fast.ConvNet, images: Tensor, labels: Tensor, lr: float, test: tuple[Tensor, Tensor]) -> float:
    """Train a fresh network on only `images`; return the share of the `test` images that it gets right."""
    random = torch.Generator().manual_seed(1)
    batches = torch.arange(len(images)).expand(200, -1)
    path = mtt_fast.unroll(net, net.init(random), images, labels, lr, batches, AUGMENT, momentum=0.9, generator=random)
    return float((net(path[-1], test[0]).argmax(1) == test[1]).double().mean())


def main(iterations: int = 100, steps: int = 20, experts: int = 4, epochs: int = 10, width: int = 32) -> None:
    """Distil scikit-learn's digits, one image per class.

    Args:
        iterations: updates of the images.
        steps: of the student, in each iteration.
        experts: networks trained on the real images.
        epochs: of each; a student starts at one of them and has to come to the next but one.
        width: channels of the network.
    """
    random, digits = torch.Generator().manual_seed(0), load_digits()
    pixels, targets = torch.tensor(digits.images).float()[:, None] / 6 - 0.8, torch.tensor(digits.target)
    train, test = (pixels[:1400], targets[:1400]), (pixels[1400:], targets[1400:])
    net = mtt_fast.ConvNet(in_channels=1, num_classes=10, image_size=8, width=width, depth=2)
    trajectories = [expert(net, *train, epochs, random) for _ in range(experts)]

    labels = torch.arange(10)
    real = train[0][[int((train[1] == label).nonzero()[0]) for label in labels]]  # the first of each class
    images, lr = real.clone().requires_grad_(), torch.tensor(0.02, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [images], "lr": 20.0}, {"params": [lr], "lr": 1e-5}], momentum=0.5)
    batches = torch.arange(10).expand(steps, -1)  # every step sees all ten
    for iteration in range(iterations):
        trajectory = trajectories[iteration % experts]
        epoch = int(torch.randint(epochs - 1, (), generator=random))
        start, target = trajectory[epoch], trajectory[epoch + 2]

        path = mtt_fast.unroll(net, start, images, labels, lr, batches, AUGMENT, generator=random)
        loss = mtt_fast.matching_loss(path[-1], start, target)
        optimizer.zero_grad()
        loss.backward()  # exact, through all steps
        optimizer.step()
        if iteration % 10 == 0:
            print(f"{iteration}: matching loss {loss.item():.3f}, learning rate {lr.item():.4f}")

    for name, ten in (("real", real), ("distilled", images.detach())):
        print(f"trained on ten {name} images: {100 * accuracy(net, ten, labels, lr.item(), test):.1f} % right")


if __name__ == "__main__":
    tyro.cli(main)
