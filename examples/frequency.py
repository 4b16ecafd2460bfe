"""Distil frequencies instead of pixels (FreD): two images of half as many numbers each. `python examples/frequency.py --help`.

D. Shin, S. Shin, I.-C. Moon, NeurIPS 2023. It learns those frequencies of the cosine transform that differ most between real
images. The images are computed from them, and autograd passes the exact gradient on to them.
"""

import math

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor

import mtt_fast

AUGMENT = mtt_fast.SiameseAugment("color_crop_cutout_scale_rotate")  # no flip: digits have a left and a right
K = torch.arange(8)[:, None]
DCT = torch.cos(math.pi / 8 * (K.T + 0.5) * K) / torch.where(K == 0, 8, 4).sqrt()


@torch.no_grad()
def trained(
    net: mtt_fast.ConvNet, images: Tensor, labels: Tensor, lr: float, epochs: int, random: torch.Generator
) -> Tensor:
    """Train a network in batches of 64; return its parameters after every epoch, (epochs + 1, P)."""
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images), generator=random).split(64)]
    path = mtt_fast.unroll(net, net.init(random), images, labels, lr, batches, AUGMENT, generator=random)
    return path[:: len(batches) // epochs].clone()


def images_of(frequencies: Tensor, kept: Tensor) -> Tensor:
    """Return the images (n, 1, 8, 8) with the `frequencies` (n, F) at the places `kept` (F,), and zero elsewhere."""
    return DCT.T @ torch.zeros(len(frequencies), 64).index_copy(1, kept, frequencies).view(-1, 1, 8, 8) @ DCT


def main(
    iterations: int = 100, steps: int = 20, experts: int = 4, epochs: int = 10, width: int = 32, ipc: int = 2
) -> None:
    """Distil scikit-learn's digits into as many numbers per class as one image has pixels.

    Args:
        iterations: updates of the frequencies.
        steps: of the student, in each iteration.
        experts: networks trained on the real images.
        epochs: of each; a student starts at one of them and has to come to the next but one.
        width: channels of the network.
        ipc: images per class, each of 64/ipc frequencies.
    """
    random, digits = torch.Generator().manual_seed(0), load_digits()
    pixels, targets = torch.tensor(digits.images).float()[:, None] / 6 - 0.8, torch.tensor(digits.target)
    net = mtt_fast.ConvNet(in_channels=1, num_classes=10, image_size=8, width=width, depth=2)
    trajectories = [trained(net, pixels[:1400], targets[:1400], 0.02, epochs, random) for _ in range(experts)]

    spectra = (DCT @ pixels[:1400] @ DCT.T).flatten(1)
    kept = spectra.var(0).topk(64 // ipc).indices
    labels = torch.arange(10).repeat_interleave(ipc)
    chosen = torch.cat([(targets[:1400] == label).nonzero()[:ipc, 0] for label in range(10)])
    frequencies, lr = spectra[chosen][:, kept].requires_grad_(), torch.tensor(0.02, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [frequencies], "lr": 20.0}, {"params": [lr], "lr": 1e-5}], momentum=0.5)
    batches = torch.arange(len(labels)).expand(steps, -1)
    for iteration in range(iterations):
        epoch = int(torch.randint(epochs - 1, (), generator=random))
        start, target = trajectories[iteration % experts][[epoch, epoch + 2]]
        images = images_of(frequencies, kept)
        path = mtt_fast.unroll(net, start, images, labels, lr, batches, AUGMENT, generator=random)
        loss = mtt_fast.matching_loss(path[-1], start, target)
        optimizer.zero_grad()
        loss.backward()  # to the images, and on to the frequencies
        optimizer.step()
        if iteration % 10 == 0:
            print(f"{iteration}: matching loss {loss.item():.3f}, learning rate {lr.item():.4f}")
    for name, seen in (("real images", pixels[chosen]), ("frequencies", images_of(frequencies.detach(), kept))):
        theta = trained(net, seen, labels, 10 * lr.item(), 200, random)[-1]
        right = net(theta, pixels[1400:]).argmax(1) == targets[1400:]
        print(f"trained on {len(labels)} {name}: {100 * right.double().mean():.1f} % right")


if __name__ == "__main__":
    tyro.cli(main)
