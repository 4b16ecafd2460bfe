"""Check the images and gradients of a parametrisation against autograd, and what is refused before a run begins."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mtt_fast
from mtt_fast.errors import InputError
from mtt_fast.parametrisations.by_name import make_parametrisation
from mtt_fast.parametrisations.parametrisation import gradients_at, images_at, learned_values
from mtt_fast.parametrisations.speed import Speed
from mtt_fast.parametrisations.trial import try_parametrisation
from mtt_fast.testing import assert_close

SPEED = "num_saet=5 dim_saet=6 num_head=2 decoder_depth=2 top_k=3 l1_weight=1e-2 patch_size=2"

OWN = """
import torch
import mtt_fast
from torch import nn


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


def try_own(name: str) -> None:
    """Try the class `name` on six images."""
    try_parametrisation(name, lambda: make_parametrisation(name, "", images_of(), 3, seeded()), 6, (3, 4, 8))


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


def test_parameters_begin_within_the_bounds_of_the_codes() -> None:
    options = {
        "speed": "num_saet=30 dim_saet=24 num_head=2 decoder_depth=1 top_k=3 l1_weight=0 patch_size=2",
        "ddif": "num_layers=2 layer_size=8 w0_initial=5 w0=4",
    }
    begin: dict[str, Tensor] = {}
    for name, text in options.items():
        begin |= learned_values(make_parametrisation(name, text, torch.zeros(40, 3, 4, 4), 2, seeded()))
    sines = [1 / 2, math.sqrt(6 / 8) / 4, math.sqrt(6 / 8) / 4]
    bounds = {f"{kind}.{layer}": bound for kind in ("weights", "biases") for layer, bound in enumerate(sines)}
    for name, outputs in (("blocks.0.projection", 24), ("blocks.0.mlp.0", 24), ("to_pixels", 12)):
        bounds[f"{name}.weight"] = math.sqrt(6 / (24 + outputs))
        assert not begin[f"{name}.bias"].any()
    for name, bound in bounds.items():
        assert 0.9 * bound < float(begin[name].abs().max()) <= bound * (1 + 1e-6)
    assert [float(begin[name].std()) for name in ("saet", "scm")] == pytest.approx([0.2, 0.2], rel=0.1)


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_each_field_is_fitted_alone(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.parametrisations.parametrisation._BLOCK", block)
    options = "num_layers=2 layer_size=5 epochs_init=100 lr_nf_init=1e-2"
    # in float64: Adam's steps amplify rounding, which depends on the processor, by a million
    images = torch.randn(4, 3, 4, 4, generator=seeded(3)).double()
    together = make_parametrisation("ddif", options, images, 2, seeded()).double()
    before = learned_values(together)
    together.fit(images)
    for image in range(4):
        alone = make_parametrisation("ddif", options, images[:1], 1, seeded()).double()
        images_at(alone, {name: each[image : image + 1] for name, each in before.items()}, torch.empty_like(images[:1]))
        alone.fit(images[image : image + 1])
        for name, values in learned_values(alone).items():
            torch.testing.assert_close(learned_values(together)[name][image], values[0])
    first, fitted = (images_at(together, each, torch.empty_like(images)) for each in (before, learned_values(together)))
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
    try_own(name)
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
        ("OWN:Pixels", "scale=1 2", r"`parametrisation_options` 2: expected NAME=VALUE, .*; quote a value with spaces, as in NAME='A B'"),
        ("OWN:Pixels", "scale={[]}", r"TypeError: .*\(.*own.py, line 10\)"),
        ("OWN:Pixels", "scale='a'", r"TypeError: .*\(.*own.py, line 10\)"),
        ("speed", "num_saet=5", "`parametrisation_options`: expected dim_saet, num_head, decoder_depth, top_k, l1_weight of speed"),
        ("speed", SPEED.replace("depth=2", "depth=0"), "decoder_depth 0: expected a whole number from 1 on"),
        ("speed", SPEED.replace("num_head=2", "num_head=1.5"), "num_head 1.5: expected a whole number from 1 on"),
        ("speed", f"{SPEED[:-1]}3", "patch_size 3: expected a divisor of height and width, 4 and 8"),
        ("speed", SPEED.replace("num_head=2", "num_head=4"), "dim_saet 6: expected a multiple of num_head 4"),
        ("speed", SPEED.replace("top_k=3", "top_k=41"), "top_k 41: expected 1 to 40"),
        ("speed", SPEED.replace("top_k=3", "top_k=1.5"), "top_k 1.5: expected a whole number from 1 on"),
        ("ddif", "num_layers=0 layer_size=4", "`parametrisation` ddif: num_layers 0: expected a whole number from 1 on"),
        ("ddif", "num_layers=2 layer_size=-1", "layer_size -1: expected a whole number from 1 on"),
        ("ddif", "num_layers=2 layer_size=4 epochs_init=5e3", "epochs_init 5000.0: expected a whole number from 0 on"),
        ("ddif", "num_layers=2 layer_size=4 lr_nf_init=0", "lr_nf_init 0: expected a finite number above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(name: str, options: str, message: str, tmp_path: Path) -> None:
    place = own_file(tmp_path).removesuffix(":Pixels")
    with pytest.raises(InputError, match=message):
        make_parametrisation(name.replace("OWN", place), options, images_of(), 3, seeded())


def test_values_of_options_are_python_or_texts_with_spaces_in_quotes(tmp_path: Path) -> None:
    text = "import mtt_fast\n\nclass Given(mtt_fast.Parametrisation):\n    def __init__(self, images, num_classes, **given):\n"
    (tmp_path / "own.py").write_text(f"{text}        super().__init__()\n        self.given = given\n")
    options = """a=1 b=[1,'x'] c='my net.pt' d="it's  x=3" e=don't f='7' g= h='' """
    module = make_parametrisation(f"{tmp_path / 'own.py'}:Given", options, images_of(), 3, seeded())
    expected = {"a": 1, "b": [1, "x"], "c": "my net.pt", "d": "it's  x=3", "e": "don't", "f": "7", "g": "", "h": ""}
    assert module.given == expected


FORWARD = {
    "return self.pixels[index][:, :1]": r"expected images torch.float32 \(2, 3, 4, 8\), found torch.float32 \(2, 1, 4, 8\)",
    "return self.pixels[index].double()": "expected images torch.float32",
    "return self.pixels[index] / 0": "expected finite images, found others",
    "return self.pixels[index] + torch.randn(())": "expected the same images at a second call, found others",
    "x = self.pixels[index]; return x - x.mean(0)": "expected each image to be independent of those that are computed with it",
    "return self.pixels[index].detach()": "expected images that depend on its parameters",
    "return nn.functional.interpolate(self.pixels[index], (1, 2, 3))": "ValueError: .*own.py, line",
    "x = self.pixels.exp(); y = x[index]; x += 1; return y * x[index]": "RuntimeError: one of the variables needed for gradient",
    "self.pixels.data.clamp_(-1, 1); return self.pixels[index]": "pixels: expected the values that it was given, found others",
    "return self.nothing": "AttributeError: 'Pixels' object has no attribute 'nothing'",
}


@pytest.mark.parametrize("forward", FORWARD)
def test_what_cannot_be_learned_is_refused(forward: str, tmp_path: Path) -> None:
    name = own_file(tmp_path, OWN.replace("return self.pixels[index]", forward))
    with pytest.raises(InputError, match=FORWARD[forward]):
        try_own(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (".clone()", "expected a parameter that requires a gradient, found none"),
        (".clone() + 0j", "pixels: expected float32, found torch.complex64"),
        (".clone().double()", "pixels: expected float32, found torch.float64"),
    ],
)
def test_parameters_of_another_kind_are_refused(change: str, message: str, tmp_path: Path) -> None:
    text = OWN.replace(".clone()", change)
    if "requires a gradient" in message:
        text = text.replace("torch.rand(()))", "torch.rand(()), requires_grad=False)")
    name = own_file(tmp_path, text)
    with pytest.raises(InputError, match=message):
        try_own(name)


INIT = {
    "self.mirrored = self.pixels.flip(3)": ("self.mirrored[index]", "expected other images at other parameters, found the same"),
    "self.twice = None": (
        "self.twice if self.twice is not None else self.keep(); return self.pixels[index] + self.twice[index]",
        "expected the images of a new object with the same parameters, found others",
    ),
    "self.number = float(np.random.rand())": (
        "self.pixels[index] + self.number", "expected the images of a new object with the same parameters, found others"
    ),
    "self.layer = nn.LazyLinear(8)": ("self.layer(self.pixels[index])", "layer.weight: expected a known shape, found a lazy"),
    "self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))": (
        "self.layer(self.pixels[index])", "_u: expected the values that it was given, found others; forward must leave"
    ),
    "self.first = nn.Parameter(self.pixels.data[:1])": (
        "self.pixels[index] + self.first", "pixels: expected the values that it was given, found others"
    ),
    "self.rates = nn.Parameter(torch.ones(1).expand(8))": (
        "self.pixels[index] * self.rates", "RuntimeError: unsupported operation: more than one element"
    ),
}  # fmt: skip


@pytest.mark.parametrize("init", INIT)
def test_images_that_are_not_computed_from_the_parameters_alone_are_refused(init: str, tmp_path: Path) -> None:
    forward, message = INIT[init]
    forward = forward if "; return" in forward else f"return {forward}"
    text = OWN.replace("    def forward", f"        {init}\n\n    def forward").replace(
        "return self.pixels[index]", forward
    )
    text = f"import numpy as np\n{text}\n    def keep(self):\n        self.twice = 2 * self.pixels.detach()\n"
    with pytest.raises(InputError, match=message):
        try_own(own_file(tmp_path, text))


OTHER_METHODS = {
    "def penalty(self): return self.pixels.abs()": r"penalty: expected None, or a tensor \(\) that .*, found \(6, 3, 4, 8\)",
    "def penalty(self): return 0.0": "penalty: expected None, or a tensor .*, found float",
    "def penalty(self): return torch.zeros(())": "penalty: expected None, or a tensor .* that depends on the parameters",
    "def relative_rate(self, name): return 'a'": "relative_rate of pixels: expected a number, found 'a'",
    "def stored_numbers(self): return 'many'": "stored_numbers: expected a number, found 'many'",
    "def stored_numbers(self): return self.nothing": "AttributeError: .*own.py, line",
    "optimizer = 'Adam'": "optimizer: expected sgd or adam, found 'Adam'",
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_are_tried(method: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=OTHER_METHODS[method]):
        try_own(own_file(tmp_path, f"{OWN}\n    {method}\n"))


@pytest.mark.parametrize("arguments", ["images, num_classes, **more", "*all, **more", "images, num_classes, *, scale"])
def test_a_class_passes_arguments_on(arguments: str, tmp_path: Path) -> None:
    passed = arguments.replace("*, scale", "scale=scale")
    text = f"{OWN}\nclass Own(Pixels):\n    def __init__(self, {arguments}):\n        super().__init__({passed})\n"
    name = own_file(tmp_path, text).replace(":Pixels", ":Own")
    module = make_parametrisation(name, "scale=2", images_of(), 3, seeded())
    assert torch.equal(learned_values(module)["pixels"], 2 * images_of())


def test_a_class_that_takes_other_arguments_is_refused(tmp_path: Path) -> None:
    name = own_file(tmp_path, OWN.replace("self, images, num_classes, scale=1.0, offset=0.0", "self, images"))
    with pytest.raises(InputError, match=r"TypeError: .* takes 2 positional arguments but 3 were given"):
        make_parametrisation(name, "", images_of(), 3, seeded())


def test_a_file_that_ends_the_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SystemExit: 0"):
        make_parametrisation(own_file(tmp_path, "raise SystemExit(0)"), "", images_of(), 3, seeded())


def test_a_file_imports_those_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "beside_own.py").write_text("SCALE = 3")
    text = OWN.replace("import torch\n", "import torch\nfrom beside_own import SCALE\n").replace("* scale", "* SCALE")
    module = make_parametrisation(own_file(tmp_path, text), "", images_of(), 3, seeded())
    assert torch.equal(learned_values(module)["pixels"], 3 * images_of())


def test_tied_and_empty_parameters_are_learned(tmp_path: Path) -> None:
    init = (
        "self.more = nn.Parameter(images.clone()); self.tied = self.more; self.none = nn.Parameter(torch.zeros(0, 2))"
    )
    text = OWN.replace("    def forward", f"        {init}\n\n    def forward")
    text = text.replace("[index]", "[index] + self.more[index] * self.tied[index].flip(3) + self.none.sum()")
    name = own_file(tmp_path, text)
    try_own(name)
    module = make_parametrisation(name, "", images_of(), 3, seeded())
    values, weights = learned_values(module), torch.randn(6, 3, 4, 8, generator=seeded(1))
    gradients = gradients_at(module, values, weights)
    more = values["more"].clone().requires_grad_()
    (more * more.flip(3) * weights).sum().backward()
    assert more.grad is not None
    assert_close("more", gradients["more"], more.grad, 1e-6)
    assert list(gradients) == ["pixels", "more", "none"]
