"""Distil by the loss on real images, through a random window of training. `python examples/truncated.py --help`.

There are no experts: a network trained on the images has to classify real ones. As in RaT-BPTT
(Y. Feng, R. Vedantam & J. Kempe, ICLR 2024) the optimizer is Adam, training is long, and gradients go through only a window of
steps, which ends at a random step. The steps before the window have no gradients: it starts from their last row and moments.
"""

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import mtt_fast


def main(
    iterations: int = 150, window: int = 20, longest: int = 80, ipc: int = 1, width: int = 32, lr: float = 0.001
) -> None:
    """Distil scikit-learn's digits.

    Args:
        iterations: updates of the images.
        window: steps that gradients go through.
        longest: steps of the longest training.
        ipc: images per class.
        width: channels of the network.
        lr: learning rate of the training.
    """
    random, digits = torch.Generator().manual_seed(0), load_digits()
    pixels, targets = torch.tensor(digits.images).float()[:, None] / 6 - 0.8, torch.tensor(digits.target)
    training, test = torch.arange(1400), torch.arange(1400, len(targets))
    net = mtt_fast.ConvNet(in_channels=1, num_classes=10, image_size=8, width=width, depth=2)

    labels = torch.arange(10).repeat_interleave(ipc)
    chosen = torch.cat([(targets == label).nonzero()[:ipc, 0] for label in range(10)])
    images = pixels[chosen].requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.01)

    def train(
        start: Tensor, images: Tensor, steps: int, before: int = 0, moments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the path, and the moments of Adam, of `steps` steps on all `images`, after `before` steps that left `moments`."""
        batches, adam = torch.arange(len(images)).expand(steps, -1), mtt_fast.Adam(steps=before)
        return mtt_fast.unroll(
            net, start, images, labels, lr, batches, optimizer=adam, velocity=moments, return_velocity=True
        )

    for iteration in range(iterations):
        start, moments = net.init(random), None
        before = int(torch.randint(longest - window + 1, (), generator=random))
        if before:
            with torch.no_grad():
                path, moments = train(start, images, before)
                start = path[-1]
        path, _ = train(start, images, window, before, moments)

        real = training[torch.randint(len(training), (256,), generator=random)]
        loss = F.cross_entropy(net(path[-1], pixels[real]), targets[real])  # any function of the path will do
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 15 == 0:
            print(f"{iteration}: loss {loss.item():.3f} after {before} + {window} steps")

    for name, few in (("real", pixels[chosen]), ("distilled", images.detach())):
        with torch.no_grad():
            path, _ = train(net.init(random), few, longest)
            right = net(path[-1], pixels[test]).argmax(1) == targets[test]
        print(f"trained on {len(few)} {name} images: {100 * right.double().mean():.1f} % right")


if __name__ == "__main__":
    tyro.cli(main)
