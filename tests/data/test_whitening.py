"""Check that ZCA whitening equals kornia's up to rounding, survives a file, and refuses what it cannot do."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtt_fast.data.whitening import LARGEST_IMAGE, Whitening, check_same_whitening
from mtt_fast.errors import InputError
from mtt_fast.storage.tensor_files import save_tensors


def pictures(n: int = 40, shape: tuple[int, int, int] = (3, 5, 4), seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def photographs(n: int, side: int) -> Tensor:
    """Return colour images uint8 (n, 3, side, side) whose neighbouring pixels go together, as in photographs."""
    coarse = torch.rand(n, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    noise = 0.05 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1))
    return ((smooth + noise).clamp(0, 1) * 255).round().byte()


def of_kornia(images: Tensor, eps: float = 0.1) -> Whitening:
    from kornia.enhance import ZCAWhitening

    zca = ZCAWhitening(eps=eps, compute_inv=True).fit(images)
    return Whitening(zca.mean_vector.flatten(), zca.transform_matrix, zca.transform_inv)


def assert_equal(ours: Whitening, theirs: Whitening, tolerance: float) -> None:
    """Check that each field differs by at most `tolerance` of its norm."""
    for name, tensor in vars(theirs).items():
        error = (getattr(ours, name).double() - tensor.double()).norm() / tensor.double().norm()
        assert float(error) <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("eps", [0.1, 0.01])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_apply_and_invert_equal_kornia(eps: float, dtype: torch.dtype, tolerance: float) -> None:
    from kornia.enhance import ZCAWhitening

    train, other = pictures().to(dtype), pictures(7, seed=1).to(dtype)
    theirs, ours = ZCAWhitening(eps=eps, compute_inv=True).fit(train), Whitening.fit(train, eps)
    assert ours.matrix.dtype == dtype
    assert_equal(ours, of_kornia(train, eps), tolerance)
    torch.testing.assert_close(ours.apply(other), theirs(other), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.invert(other), theirs.inverse_transform(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [150, 1000], ids=["fewer images than values", "more images than values"])
def test_the_fit_to_bytes_is_kornias_in_float64(n: int) -> None:
    images = photographs(n, 16)
    ours = Whitening.fit_bytes(images, torch.device("cpu"))
    assert ours.matrix.dtype == torch.float32
    assert_equal(ours, of_kornia(images.double() / 255), 1e-6)


def test_a_fit_by_blocks_is_the_fit_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    images = photographs(100, 8)
    whole = Whitening.fit(images.double() / 255)
    monkeypatch.setattr("mtt_fast.data.whitening._BLOCK", 7)
    assert_equal(Whitening.fit(images.double() / 255), whole, 1e-12)
    assert_equal(Whitening.fit_bytes(images, torch.device("cpu")), whole, 1e-6)


def test_sets_whitened_by_the_former_fit_are_whitened_alike() -> None:
    images = photographs(300, 16)
    before = of_kornia(images.float().div_(255))  # what earlier versions fitted, in float32
    check_same_whitening(before, Whitening.fit_bytes(images, torch.device("cpu")), "set.safetensors")


def test_default_eps_is_the_public_codes() -> None:
    torch.testing.assert_close(Whitening.fit(pictures()).matrix, Whitening.fit(pictures(), 0.1).matrix)
    assert not torch.allclose(Whitening.fit(pictures()).matrix, Whitening.fit(pictures(), 0.2).matrix)


def test_whitened_training_images_have_the_covariance_that_eps_leaves() -> None:
    train = pictures(4000, (1, 3, 2)).double()
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixed = (train.flatten(1) @ mixing).reshape(train.shape)
    white = Whitening.fit(mixed, eps=1e-9).apply(mixed).flatten(1)
    torch.testing.assert_close(white.T.cov(), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)


def test_invert_undoes_apply() -> None:
    train, other = pictures().double(), pictures(3, seed=5).double()
    whitening = Whitening.fit(train)
    torch.testing.assert_close(whitening.invert(whitening.apply(other)), other)


def test_half_precision_images_are_computed_in_float32() -> None:
    whitening, other = Whitening.fit(pictures()), pictures(3, seed=5).bfloat16()
    assert whitening.apply(other).dtype == torch.bfloat16
    torch.testing.assert_close(whitening.apply(other), whitening.apply(other.float()).bfloat16(), rtol=0, atol=0)


def test_gradients_flow_through_apply() -> None:
    whitening = Whitening.fit(pictures(12, (1, 2, 2)).double())
    images = pictures(2, (1, 2, 2), 3).double().requires_grad_()
    assert torch.autograd.gradcheck(whitening.apply, images)
    assert torch.autograd.gradcheck(whitening.invert, images)


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    whitening = Whitening.fit(pictures())
    whitening.save(tmp_path / "zca.safetensors", {"eps": "0.1"})
    again = Whitening.load(tmp_path / "zca.safetensors")
    assert all(torch.equal(getattr(whitening, f), getattr(again, f)) for f in ("mean", "matrix", "inverse"))


def test_too_large_images_are_refused_before_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = torch.zeros(1, 1, 1, 1).expand(5, 3, 128, 128)
    with pytest.raises(InputError, match=rf"at most {LARGEST_IMAGE} .*49152 \(3x128x128\).*no `zca`") as raised:
        Whitening.fit(huge)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr("mtt_fast.data.whitening.LARGEST_IMAGE", 16)
    Whitening.fit(torch.rand(2, 1, 4, 4))  # the fewest images, and the largest


def test_images_without_a_finite_matrix_are_refused() -> None:
    with pytest.raises(InputError, match="expected finite images"):
        Whitening.fit(pictures().index_fill(0, torch.tensor(0), torch.nan))
    few = pictures(3)
    with pytest.raises(InputError, match=r"expected an `eps` above 0 .*, found 0"):
        Whitening.fit(few, eps=0)
    assert Whitening.fit(few, eps=1e-3).matrix.isfinite().all()


def test_too_few_images_bytes_and_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="at least 2 training images, found 1"):
        Whitening.fit(pictures(1))
    with pytest.raises(InputError, match="at least 2 training images, found 0"):
        Whitening.fit(pictures(0))
    with pytest.raises(InputError, match="floating point"):
        Whitening.fit((255 * pictures()).byte())
    whitening = Whitening.fit(pictures())
    with pytest.raises(InputError, match="floating point"):
        whitening.apply((255 * pictures()).byte())
    for images in (pictures().numpy(), list(pictures())):
        for call in (Whitening.fit, whitening.apply, whitening.invert):
            with pytest.raises(InputError, match=r"images: expected a tensor, found (ndarray|list)"):
                call(images)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"images of 60 values, found 12 \(3x2x2\)"):
        whitening.apply(pictures(2, (3, 2, 2)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(6, 1, 2, 2).to_sparse(), r"images: expected an ordinary tensor, found a tensor of layout torch\.sparse_coo"),
        (torch.nested.nested_tensor([torch.rand(1, 2, 2)] * 6, layout=torch.jagged), "images: .*, found a nested tensor"),
        (torch.rand(6, 1, 2, 2).to(torch.float8_e4m3fn), r"images: .*, found a tensor of float8_e4m3fn; use \.float\(\)"),
        (torch.rand(6), r"images: expected \(n, C, H, W\), found shape \(6,\)"),
    ],
    ids=["sparse", "nested", "float8", "one image"],
)  # fmt: skip
def test_other_kinds_of_tensors_are_refused(images: torch.Tensor, message: str) -> None:
    whitening = Whitening.fit(torch.rand(6, 1, 2, 2))
    fit_bytes = partial(Whitening.fit_bytes, device=torch.device("cpu"))
    for call in (Whitening.fit, fit_bytes, whitening.apply, whitening.invert):
        with pytest.raises(InputError, match=message):
            call(images)


def test_a_fit_needs_numbers() -> None:
    empty = torch.zeros(6, 1, 2, 2, device="meta")
    for call in (lambda: Whitening.fit(empty), lambda: Whitening.fit_bytes(empty.byte(), torch.device("cpu"))):
        with pytest.raises(InputError, match="expected images with numbers, found a tensor on the device meta"):
            call()
    with pytest.raises(InputError, match=r"images: expected uint8, found torch\.float32"):
        Whitening.fit_bytes(pictures(), torch.device("cpu"))
    with pytest.raises(InputError, match=r"`eps`: expected a number, found '0\.1'"):
        Whitening.fit(pictures(), "0.1")  # type: ignore[arg-type]


def test_fields_that_torch_cannot_compute_with_are_refused() -> None:
    with pytest.raises(InputError, match=r"Whitening matrix: .*, found a tensor of layout torch\.sparse_coo"):
        Whitening(torch.zeros(4), torch.eye(4).to_sparse(), torch.eye(4))
    with pytest.raises(InputError, match="Whitening mean: expected a tensor, found list"):
        Whitening([0.0], torch.eye(1), torch.eye(1))  # type: ignore[arg-type]


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "other", {"images": torch.zeros(2)})
    with pytest.raises(InputError, match="expected a whitening"):
        Whitening.load(tmp_path / "other")
    good = {"mean": torch.zeros(4), "matrix": torch.zeros(4, 4), "inverse": torch.zeros(4, 4)}
    for name, tensor in good.items():
        for other in (tensor[None], tensor.long()):
            save_tensors(tmp_path / "odd", good | {name: other})
            with pytest.raises(InputError, match=f"odd: {name}: expected floating point"):
                Whitening.load(tmp_path / "odd")
    with pytest.raises(InputError, match="cannot be read"):
        Whitening.load(tmp_path / "absent")


def test_neither_import_nor_fit_needs_kornia() -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch; from mtt_fast.data.whitening import Whitening; Whitening.fit(torch.rand(9, 1, 2, 2)); "
        "sys.exit('kornia' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_matrices_need_no_gradient() -> None:
    images = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert not any(tensor.requires_grad for tensor in vars(Whitening.fit(images)).values())
