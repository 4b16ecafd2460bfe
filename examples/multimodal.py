"""Distil pairs of an image and a text, and how similar each is to each (LoRS). `python examples/multimodal.py --help`.

Y. Xu et al., ICML 2024. The upper half of a digit is the image, the lower half its text; one module encodes both.
"""

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import mtt_fast


class Encoders(nn.Module):
    """An encoder of images and one of texts."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.AvgPool2d(2)]
        self.image = nn.Sequential(nn.Unflatten(1, (1, 4, 8)), *block, nn.Flatten(), nn.Linear(128, 32))
        self.text = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, pairs: Tensor) -> Tensor:
        """Return the features (n, 2 · 32) of both."""
        image, text = pairs.chunk(2, 1)
        return torch.cat([F.normalize(self.image(image)), F.normalize(self.text(text))], 1)


def contrastive(features: Tensor, labels: Tensor) -> Tensor:
    """Return InfoNCE. A pair's labels are its rows of the similarities' diagonal and of their two factors of low rank."""
    (image, text), (left, right) = features.chunk(2, 1), labels[:, 1:].chunk(2, 1)
    similarities, logits = labels[:, 0].diag() + left @ right.T, image @ text.T / 0.2
    return -(similarities * (logits.log_softmax(0) + logits.log_softmax(1))).sum(1).mean() / 2


def main(iterations: int = 200, pairs: int = 30) -> None:
    """Distil halves of scikit-learn's digits.

    Args:
        iterations: updates of the pairs.
        pairs: number of them.
    """
    torch.manual_seed(0)
    digits, alone = torch.tensor(load_digits().images).float().flatten(1) / 6 - 0.8, torch.eye(1, 9)
    train, test, net = digits[:1400], digits[1400:], mtt_fast.FlatModule(Encoders())
    split = sum(each.numel() for each in Encoders().image.parameters())

    def path_of(rows: Tensor, labels: Tensor, rates: Tensor, batches: Tensor, start: Tensor | None = None) -> Tensor:
        start = mtt_fast.FlatModule(Encoders()).init() if start is None else start  # of a fresh network
        lr = torch.cat([rates[0].expand(split), rates[1].expand(net.num_parameters - split)])
        return mtt_fast.unroll(net, start, rows, labels, lr.expand(len(batches), -1), batches, loss=contrastive)

    shuffled = torch.stack([torch.randperm(1400) for _ in range(16)]).view(2, -1, 100)  # eight epochs of each expert
    own, first = alone.expand(1400, -1), torch.tensor([0.1, 0.1])
    experts = [path_of(train, own, first, batches)[::14].clone() for batches in shuffled]
    real, all_pairs = train[torch.randperm(1400)[:pairs]], torch.arange(pairs)
    rows, rates = real.clone().requires_grad_(), (first / 2).requires_grad_()
    labels = torch.cat([torch.ones(pairs, 1), torch.randn(pairs, 4), torch.zeros(pairs, 4)], 1).requires_grad_()
    optimizer = torch.optim.Adam([{"params": [rows], "lr": 0.03}, {"params": [labels, rates], "lr": 0.001}])
    for iteration in range(iterations):
        start, target = experts[iteration % 2][torch.randint(6, ()) + torch.tensor([0, 2])]  # two epochs
        end = path_of(rows, labels, rates, all_pairs.expand(15, -1), start)[-1]
        encoders = [part.tensor_split([split]) for part in (end, start, target)]
        loss = torch.stack([mtt_fast.matching_loss(*each) for each in zip(*encoders, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()  # exact, through all steps
        optimizer.step()
        if iteration % 20 == 0:
            print(f"{iteration}: matching loss {loss.item():.3f}, learning rates {rates.tolist()}")
    for name, few, theirs in (("real", real, alone.expand(pairs, -1)), ("distilled", rows, labels)):
        image, text = net(path_of(few, theirs, rates, all_pairs.expand(100, -1))[-1], test).chunk(2, 1)
        scores = image @ text.T
        share = torch.stack([(each > each.diag()[:, None]).sum(1) < 10 for each in (scores, scores.T)]).double().mean()
        print(f"trained on {pairs} {name} pairs: {100 * share:.1f} % right, within the ten nearest of {len(test)}")


if __name__ == "__main__":
    tyro.cli(main)
