"""Check the images and gradients of a parametrisation against autograd, and what is refused before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mtt_fast
from mtt_fast.errors import InputError
from mtt_fast.parametrisations.by_name import make_parametrisation, try_parametrisation
from mtt_fast.parametrisations.parametrisation import gradients_at, images_at, learned_values
from mtt_fast.parametrisations.speed import Speed
from mtt_fast.testing import assert_close

SPEED = "num_saet=5 dim_saet=6 num_head=2 decoder_depth=2 top_k=3 l1_weight=1e-2 patch_size=2"

OWN = """
import torch
import mtt_fast


class Pixels(mtt_fast.Parametrisation):
    def __init__(self, images, num_classes, scale=1.0, offset=0.0):
        super().__init__()
        self.pixels = torch.nn.Parameter(images.clone() * scale + offset * torch.rand(()))

    def forward(self, index):
        return self.pixels[index]
"""


def images_of(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 4, 8, generator=torch.Generator().manual_seed(3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own_file(folder: Path, text: str = OWN) -> str:
    (folder / "own.py").write_text(text)
    return f"{folder}/own.py:Pixels"


@pytest.mark.parametrize("block", [1, 100, 200, 1 << 20])
def test_gradients_are_those_of_autograd(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.parametrisations.parametrisation._BLOCK", block)
    module = make_parametrisation("speed", SPEED, images_of(), 3, seeded()).double()
    values = {name: 1.1 * each for name, each in learned_values(module).items()}
    weights = torch.randn(6, 3, 4, 8, generator=seeded(1), dtype=torch.float64)
    gradients = gradients_at(module, values, weights)
    images = images_at(module, values, torch.empty_like(weights))

    leaves = {name: each.clone().requires_grad_() for name, each in values.items()}
    whole = torch.func.functional_call(module.train(), leaves, (torch.arange(6),))
    loss = (whole * weights).sum() + 1e-2 * leaves["scm"].abs().sum()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    assert_close("images", images, whole.detach(), 1e-12)
    for name, one in zip(leaves, expected, strict=True):
        assert_close(name, gradients[name], one, 1e-12)


def test_a_parameter_without_a_part_in_the_images_has_the_gradient_zero() -> None:
    class Idle(mtt_fast.Parametrisation):
        def __init__(self, images: Tensor) -> None:
            super().__init__()
            self.pixels, self.idle = nn.Parameter(images), nn.Parameter(torch.ones(2))
            self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, index: Tensor) -> Tensor:
            return self.fixed[0] * self.pixels[index]

    module = Idle(images_of())
    gradients = gradients_at(module, learned_values(module), torch.ones(6, 3, 4, 8))
    assert set(gradients) == {"pixels", "idle"}
    assert gradients["idle"].tolist() == [0, 0]
    assert gradients["pixels"].eq(1).all()


def test_speed_evaluates_the_largest_coefficients() -> None:
    module = make_parametrisation("speed", SPEED, images_of(), 3, seeded())
    assert isinstance(module, Speed)
    values = learned_values(module)
    evaluated = images_at(module, values, torch.empty(6, 3, 4, 8), evaluated=True)
    kept = torch.zeros_like(values["scm"]).flatten(2)
    for image in range(6):
        for head in range(2):
            flat = values["scm"][image, head].flatten()
            for place in sorted(range(len(flat)), key=lambda each: -abs(float(flat[each])))[:3]:
                kept[image, head, place] = flat[place]
    values["scm"] = kept.view_as(values["scm"])
    assert_close("images", evaluated, images_at(module, values, torch.empty(6, 3, 4, 8)), 1e-6)


def test_speed_stores_as_many_numbers_as_its_paper_allows() -> None:
    """Take its setting for CIFAR-10 with the storage of 10 images per class, 307,200 numbers."""
    setting = "num_saet=64 dim_saet=96 num_head=3 decoder_depth=1 top_k=48 l1_weight=3e-7"
    module = make_parametrisation("speed", setting, torch.zeros(1240, 3, 32, 32), 10, seeded())
    assert module.stored_numbers() == 306_960


@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (2, 1, 3, 5)], ids=str)
def test_the_fields_of_ddif_are_networks_of_sines(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=seeded(3))
    module = make_parametrisation("ddif", "num_layers=2 layer_size=5 w0_initial=3 w0=2", images, 2, seeded())
    computed = images_at(module, learned_values(module), torch.empty(shape))
    values = learned_values(module)
    for image in range(shape[0]):
        layers = [(values[f"weights.{place}"][image], values[f"biases.{place}"][image]) for place in range(3)]
        for row in range(shape[2]):
            for column in range(shape[3]):
                x = torch.tensor([2 * row / (shape[2] - 1) - 1, 2 * column / (shape[3] - 1) - 1])
                x = torch.sin(3 * (layers[0][0] @ x + layers[0][1]))
                x = torch.sin(2 * (layers[1][0] @ x + layers[1][1]))
                torch.testing.assert_close(computed[image, :, row, column], layers[2][0] @ x + layers[2][1])


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_each_field_is_fitted_alone(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.parametrisations.parametrisation._BLOCK", block)
    options = "num_layers=2 layer_size=5 epochs_init=200 lr_nf_init=1e-2"
    images = torch.randn(4, 3, 4, 4, generator=seeded(3))
    together = make_parametrisation("ddif", options, images, 2, seeded())
    before = learned_values(together)
    together.fit(images)
    for image in range(4):
        alone = make_parametrisation("ddif", options, images[:1], 1, seeded())
        images_at(alone, {name: each[image : image + 1] for name, each in before.items()}, torch.empty(1, 3, 4, 4))
        alone.fit(images[image : image + 1])
        for name, values in learned_values(alone).items():
            torch.testing.assert_close(learned_values(together)[name][image], values[0])
    first, fitted = (images_at(together, each, torch.empty(4, 3, 4, 4)) for each in (before, learned_values(together)))
    assert (fitted - images).square().mean() < 0.5 * (first - images).square().mean()


def test_the_generator_decides_the_parameters_and_the_default_generator_stays() -> None:
    before = torch.get_rng_state()
    first, again, other = (
        learned_values(make_parametrisation("speed", SPEED, images_of(), 3, seeded(seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["saet"], other["saet"])


@pytest.mark.parametrize("as_module", [False, True])
def test_a_class_of_the_users_is_found(as_module: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = own_file(tmp_path)
    if as_module:
        monkeypatch.syspath_prepend(str(tmp_path))
        name = "own:Pixels"
    module = make_parametrisation(name, "scale=2", images_of(), 3, seeded())
    try_parametrisation(name, module, 6, (3, 4, 8))
    assert torch.equal(learned_values(module)["pixels"], 2 * images_of())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sped", "", r"`parametrisation` sped: expected ddif, speed, FILE.py:CLASS or MODULE:CLASS \(did you mean speed\?\)"),
        ("missing.py:Pixels", "", "expected a Python file missing.py, found none; check the path"),
        ("no_such_module:Pixels", "", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("OWN:Others", "", "expected a class Others that inherits mtt_fast.Parametrisation, found none"),
        ("OWN:torch", "", "expected a class torch that inherits mtt_fast.Parametrisation, found module"),
        ("OWN:Pixels", "scalle=2", r"`parametrisation_options` scalle: expected an argument of .* \(scale, offset\) \(did you mean scale\?\)"),
        ("OWN:Pixels", "scale", "`parametrisation_options` scale: expected NAME=VALUE, separated by spaces"),
        ("OWN:Pixels", "scale='a'", r"TypeError: .*\(.*own.py, line 9\)"),
        ("speed", "num_saet=5", "`parametrisation_options`: expected dim_saet, num_head, decoder_depth, top_k, l1_weight of speed"),
        ("speed", f"{SPEED[:-1]}3", "patch_size 3: expected a divisor of height and width, 4 and 8"),
        ("speed", SPEED.replace("num_head=2", "num_head=4"), "dim_saet 6: expected a multiple of num_head 4"),
        ("speed", SPEED.replace("top_k=3", "top_k=41"), "top_k 41: expected 1 to 40"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(name: str, options: str, message: str, tmp_path: Path) -> None:
    place = own_file(tmp_path).removesuffix(":Pixels")
    with pytest.raises(InputError, match=message):
        make_parametrisation(name.replace("OWN", place), options, images_of(), 3, seeded())


FORWARD = {
    "return self.pixels[index][:, :1]": r"expected images torch.float32 \(2, 3, 4, 8\), found torch.float32 \(2, 1, 4, 8\)",
    "return self.pixels[index].double()": "expected images torch.float32",
    "return self.pixels[index] / 0": "expected finite images, found others",
    "return self.pixels[index] + torch.randn(())": "expected the same images at a second call, found others",
    "x = self.pixels[index]; return x - x.mean(0)": "expected each image to be independent of those that are computed with it",
    "return self.pixels[index].detach()": "expected images that depend on its parameters",
    "return self.nothing": "AttributeError: 'Pixels' object has no attribute 'nothing'",
}


@pytest.mark.parametrize("forward", FORWARD)
def test_what_cannot_be_learned_is_refused(forward: str, tmp_path: Path) -> None:
    name = own_file(tmp_path, OWN.replace("return self.pixels[index]", forward))
    module = make_parametrisation(name, "", images_of(), 3, seeded())
    with pytest.raises(InputError, match=FORWARD[forward]):
        try_parametrisation(name, module, 6, (3, 4, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (".clone()", "expected a parameter that requires a gradient, found none"),
        (".clone().double()", "pixels: expected float32, found torch.float64"),
    ],
)
def test_parameters_of_another_kind_are_refused(change: str, message: str, tmp_path: Path) -> None:
    text = OWN.replace(".clone()", change)
    if "requires a gradient" in message:
        text = text.replace("torch.rand(()))", "torch.rand(()), requires_grad=False)")
    name = own_file(tmp_path, text)
    module = make_parametrisation(name, "", images_of(), 3, seeded())
    with pytest.raises(InputError, match=message):
        try_parametrisation(name, module, 6, (3, 4, 8))
