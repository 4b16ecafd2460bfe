"""Learn how much each training image counts, by the loss on trusted images. `python examples/sample_weights.py --help`.

As in learning to reweight (M. Ren, W. Zeng, B. Yang & R. Urtasun, ICML 2018), but with the gradient through a whole training instead of
one step. Seven in ten labels are wrong. A one-hot label times a weight is a label whose sample counts that much, and gradients reach
the labels. So the weights can be learned like the images of a distilled set.
"""

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import mtt_fast


def main(
    iterations: int = 120, steps: int = 20, batch: int = 50, trusted: int = 100, wrong: float = 0.7, width: int = 16
) -> None:
    """Train on scikit-learn's digits with wrong labels.

    Args:
        iterations: updates of the weights.
        steps: of a training.
        batch: images of a step.
        trusted: images with labels that are known to be right.
        wrong: share of wrong labels among the 1,000 training images.
        width: channels of the network.
    """
    random, digits = torch.Generator().manual_seed(0), load_digits()
    pixels, targets = torch.tensor(digits.images).float()[:, None] / 6 - 0.8, torch.tensor(digits.target)
    training, known, test = torch.arange(len(targets)).split([1000, trusted, len(targets) - 1000 - trusted])
    is_wrong = torch.rand(len(training), generator=random) < wrong
    shift = torch.randint(1, 10, (len(training),), generator=random)
    given = torch.where(is_wrong, (targets[training] + shift) % 10, targets[training])
    net = mtt_fast.ConvNet(in_channels=1, num_classes=10, image_size=8, width=width, depth=2)

    def train(weights: Tensor, steps: int) -> Tensor:
        """Return the parameters after `steps` steps from a random start."""
        labels = weights[:, None] * F.one_hot(given, 10)
        order = torch.randint(len(training), (steps, batch), generator=random)
        return mtt_fast.unroll(net, net.init(random), pixels[training], labels, 0.05, order, momentum=0.9)[-1]

    scores = torch.zeros(len(training), requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for iteration in range(iterations):
        loss = F.cross_entropy(net(train(scores.sigmoid(), steps), pixels[known]), targets[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 15 == 0:
            print(f"{iteration}: loss {loss.item():.3f} on the trusted images")

    for name, weights in (("equal", torch.full_like(scores, 0.5)), ("learned", scores.sigmoid())):
        random.manual_seed(1)  # the same start and batches for both
        with torch.no_grad():
            right = net(train(weights, 200), pixels[test]).argmax(1) == targets[test]
        print(f"trained with {name} weights: {100 * right.double().mean():.1f} % right")


if __name__ == "__main__":
    tyro.cli(main)
