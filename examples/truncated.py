"""Distil by the loss on real images, through a random window of training. `python examples/truncated.py --help`.

There are no experts: a network trained on the images has to be right about real ones. As in RaT-BPTT
(Y. Feng, R. Vedantam & J. Kempe, ICLR 2024) training is long, by SGD with momentum, and gradients go through a window of its
last steps, which ends anywhere. The steps before the window are made without gradients: it starts from their last row and
their velocity.
"""

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import mtt_fast


def steps_on(images: Tensor, steps: int) -> Tensor:
    """Return the batches of `steps` steps that see all of `images`."""
    return torch.arange(len(images)).expand(steps, -1)


def main(
    iterations: int = 150, window: int = 20, longest: int = 80, ipc: int = 1, width: int = 32, momentum: float = 0.9
) -> None:
    """Distil scikit-learn's digits.

    Args:
        iterations: updates of the images.
        window: steps that gradients go through.
        longest: steps of the longest training.
        ipc: images per class.
        width: channels of the network.
        momentum: of the training.
    """
    random, digits = torch.Generator().manual_seed(0), load_digits()
    pixels, targets = torch.tensor(digits.images).float()[:, None] / 6 - 0.8, torch.tensor(digits.target)
    train, test = torch.arange(1400), torch.arange(1400, len(targets))
    net = mtt_fast.ConvNet(in_channels=1, num_classes=10, image_size=8, width=width, depth=2)

    labels = torch.arange(10).repeat_interleave(ipc)
    chosen = torch.cat([(targets == label).nonzero()[:ipc, 0] for label in range(10)])
    images = pixels[chosen].requires_grad_()
    log_lr = torch.tensor(0.05).log().requires_grad_()  # so that the rate stays positive
    optimiser = torch.optim.Adam([images, log_lr], lr=0.01)
    for iteration in range(iterations):
        lr, before = log_lr.exp(), int(torch.randint(longest - window + 1, (), generator=random))
        start, velocity = net.init(random), None
        if before:
            with torch.no_grad():
                before_window, velocity = mtt_fast.unroll(
                    net, start, images, labels, lr, steps_on(images, before), momentum=momentum, return_velocity=True
                )
                start = before_window[-1]
        path = mtt_fast.unroll(
            net, start, images, labels, lr, steps_on(images, window), momentum=momentum, velocity=velocity
        )

        real = train[torch.randint(len(train), (256,), generator=random)]
        loss = F.cross_entropy(net(path[-1], pixels[real]), targets[real])  # any function of the path will do
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if iteration % 15 == 0:
            print(f"{iteration}: loss {loss.item():.3f} after {before} + {window} steps at {lr.item():.4f}")

    for name, few in (("real", pixels[chosen]), ("distilled", images.detach())):
        with torch.no_grad():
            path = mtt_fast.unroll(
                net, net.init(random), few, labels, log_lr.exp(), steps_on(few, longest), momentum=momentum
            )
            right = net(path[-1], pixels[test]).argmax(1) == targets[test]
        print(f"trained on {len(few)} {name} images: {100 * right.double().mean():.1f} % right")


if __name__ == "__main__":
    tyro.cli(main)
