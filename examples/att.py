"""Automatic training trajectories (ATT): match the step of the student that comes closest. `python examples/att.py --help`.

Z. Liu et al., ECCV 2024. The loss of `examples/mtt.py` fixes how many steps a student needs for two epochs of an expert;
here it may need fewer. The loss is a function of the nearest row of the path instead of its last. Each step has its own
learning rate, unlike in ATT.
"""

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor

import mtt_fast


@torch.no_grad()
def expert(net: mtt_fast.ConvNet, images: Tensor, labels: Tensor, epochs: int, random: torch.Generator) -> Tensor:
    """Train a network on real images; return its parameters after every epoch, (epochs + 1, P)."""
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images), generator=random).split(64)]
    path = mtt_fast.unroll(net, net.init(random), images, labels, 0.02, batches)
    return path[:: len(batches) // epochs].clone()


def main(iterations: int = 100, steps: int = 30, experts: int = 4, epochs: int = 10, width: int = 32) -> None:
    """Distil scikit-learn's digits, one image per class, with a learning rate for every step.

    Args:
        iterations: updates of the images.
        steps: of the student at most, in each iteration.
        experts: networks trained on the real images.
        epochs: of each; a student starts at one of them and has to come to the next but one.
        width: channels of the network.
    """
    random, digits = torch.Generator().manual_seed(0), load_digits()
    pixels, targets = torch.tensor(digits.images).float()[:, None] / 6 - 0.8, torch.tensor(digits.target)
    net = mtt_fast.ConvNet(in_channels=1, num_classes=10, image_size=8, width=width, depth=2)
    trajectories = [expert(net, pixels[:1400], targets[:1400], epochs, random) for _ in range(experts)]

    labels = torch.arange(10)
    real = pixels[[int((targets == label).nonzero()[0]) for label in labels]]  # the first of each class
    images = real.clone().requires_grad_()
    lrs = torch.full((steps,), 0.02, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [images], "lr": 20.0}, {"params": [lrs], "lr": 1e-5}], momentum=0.5)
    batches = torch.arange(10).expand(steps, -1)
    for iteration in range(iterations):
        trajectory = trajectories[iteration % experts]
        epoch = int(torch.randint(epochs - 1, (), generator=random))
        start, target = trajectory[epoch], trajectory[epoch + 2]

        path = mtt_fast.unroll(net, start, images, labels, lrs, batches)
        nearest = int(mtt_fast.nearest_step(path, target))
        loss = mtt_fast.matching_loss(path[nearest], start, target)  # later steps have no part in it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 10 == 0:
            print(f"{iteration}: matching loss {loss.item():.3f} at step {nearest} of {steps}")

    test = torch.arange(1400, len(targets))
    for name, ten in (("real", real), ("distilled", images.detach())):
        with torch.no_grad():
            often = torch.arange(10).expand(200, -1)
            path = mtt_fast.unroll(net, net.init(random), ten, labels, lrs.mean(), often, momentum=0.9)
            right = net(path[-1], pixels[test]).argmax(1) == targets[test]
        print(f"trained on ten {name} images: {100 * right.double().mean():.1f} % right")


if __name__ == "__main__":
    tyro.cli(main)
