"""Distil by matching gradients (DC). `python examples/gradient_matching.py --help`.

B. Zhao, K. R. Mopuri & H. Bilen, ICLR 2021. There are no experts: the images learn to have the same gradient, class by class, as
real images. One step of `unroll` returns the gradient of a batch, as the velocity after this step. It can be differentiated.
"""

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import mtt_fast


def main(iterations: int = 40, updates: int = 10, width: int = 32, lr: float = 0.02) -> None:
    """Distil scikit-learn's digits, one image per class.

    Args:
        iterations: fresh networks.
        updates: of the images in each of them; between two of them the network takes a step on the images.
        width: channels of the network.
        lr: learning rate of the networks.
    """
    random, digits = torch.Generator().manual_seed(0), load_digits()
    pixels, targets = torch.tensor(digits.images).float()[:, None] / 6 - 0.8, torch.tensor(digits.target)
    training, test = torch.arange(1400), torch.arange(1400, len(targets))
    net = mtt_fast.ConvNet(in_channels=1, num_classes=10, image_size=8, width=width, depth=2)

    labels, every = torch.arange(10), [torch.arange(10)]
    real = pixels[[int((targets == label).nonzero()[0]) for label in labels]]  # the first of each class
    images = real.clone().requires_grad_()
    optimizer = torch.optim.SGD([images], lr=0.1, momentum=0.5)

    def gradient(theta: Tensor, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the gradient of the loss with respect to each tensor of parameters."""
        _, velocity = mtt_fast.unroll(
            net, theta, images, labels, 0.0, [torch.arange(len(images))], return_velocity=True
        )
        return net.layout.split(velocity)

    def distance(theta: Tensor, label: int) -> Tensor:
        """Return the sum over layers and their outputs of 1 − cos of the gradients of real and synthetic images of a class."""
        members = training[targets[training] == label]
        chosen = members[torch.randperm(len(members), generator=random)[:64]]
        with torch.no_grad():
            real_gradient = gradient(theta, pixels[chosen], targets[chosen])
        own_gradient = gradient(theta, images[label : label + 1], labels[label : label + 1])
        pairs = [(a.flatten(1), b.flatten(1)) for a, b in zip(own_gradient, real_gradient, strict=True) if a.dim() > 1]
        return torch.stack([(1 - F.cosine_similarity(a, b)).sum() for a, b in pairs]).sum()

    for iteration in range(iterations):
        theta = net.init(random)
        for _ in range(updates):
            loss = torch.stack([distance(theta, label) for label in range(10)]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                theta = mtt_fast.unroll(net, theta, images, labels, lr, every * 10)[-1]
        if iteration % 10 == 0:
            print(f"{iteration}: loss {loss.item():.3f}")

    for name, ten in (("real", real), ("distilled", images.detach())):
        with torch.no_grad():
            path = mtt_fast.unroll(net, net.init(random), ten, labels, lr, every * 200, momentum=0.9)
            right = net(path[-1], pixels[test]).argmax(1) == targets[test]
        print(f"trained on ten {name} images: {100 * right.double().mean():.1f} % right")


if __name__ == "__main__":
    tyro.cli(main)
