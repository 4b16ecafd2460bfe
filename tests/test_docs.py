"""Run the commands and the code of docs/."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mtt_fast
import mtt_fast.interop
from mtt_fast import __main__, evaluate
from mtt_fast.commands import cli, parsing
from mtt_fast.convert.command import main as convert
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.distill.command import main as distill
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.options import DistillOptions
from mtt_fast.experts.command import main as train_experts
from mtt_fast.experts.options import ExpertOptions
from mtt_fast.recipes import recipe_about, recipe_names, recipe_options
from mtt_fast.testing import assert_close, relative_error
from tests.commands.option_classes import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_public_name_is_in_the_reference() -> None:
    """Check that every public name is on a page; the site's build fails where a page names what does not exist."""
    pages = [path.read_text() for path in (ROOT / "docs/reference").glob("*.md")]
    index = (ROOT / "docs/reference/index.md").read_text()
    for name in mtt_fast.__all__:
        where = f"{getattr(mtt_fast, name).__module__}.{name}"
        assert f"[`{name}`][{where}]" in index
        assert any(f"::: {where}\n" in page for page in pages)
    interop = (ROOT / "docs/reference/interop.md").read_text()
    for name in mtt_fast.interop.__all__:
        assert re.search(rf"^::: mtt_fast\.interop\.\w+\.{name}$", interop, re.MULTILINE), name


def test_what_the_pages_call_comes_with_the_import() -> None:
    """Check that no page calls a module below the package as an attribute, which it is only once something has imported it."""
    called = {name for page in PAGES for name in re.findall(r"\bmtt_fast\.([\w.]+)\(", page.read_text())}
    assert {"unroll", "ConvNet", "plan"} <= called <= set(mtt_fast.__all__)


def test_the_example_of_an_augmentation_mirrors_half_of_the_images() -> None:
    text = mtt_fast.Augmentation.__doc__ or ""
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, Any] = {"mtt_fast": mtt_fast, "torch": torch}
    exec(textwrap.dedent(example), space)
    images = torch.rand(40, 1, 2, 3)
    mirrored = space["flip"].draw(images, torch.Generator().manual_seed(0))
    expected = [image.flip(2) if flip else image for image, flip in zip(images, mirrored.flatten(), strict=True)]
    assert 5 < mirrored.sum() < 35
    assert torch.equal(space["flip"](images, mirrored), torch.stack(expected))


def test_the_example_of_a_set_can_be_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", mtt_fast.SyntheticDataset.__doc__ or "", re.DOTALL)
    exec(textwrap.dedent(example), {"mtt_fast": mtt_fast, "torch": torch})
    evaluate.main(["set.safetensors", "--num_eval", "1", "--epoch_eval_train", "2", "--out", "result.json"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["dataset"], result["model"]) == ("digits", "ConvNetD2W16")


def test_every_example_is_shown() -> None:
    page = (ROOT / "docs/examples.md").read_text()
    examples = list((ROOT / "examples").glob("*.py"))
    assert examples
    for example in examples:
        assert f'```python\n--8<-- "examples/{example.name}"\n```' in page


@pytest.fixture
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
def test_the_call_leaves_the_gradients_of_the_loop_that_it_replaces() -> None:
    setup, loop, *calls = blocks_of("migrating.md")[:5]
    space: dict[str, Any] = {}
    gradients = []
    exec(setup, space)
    for way in (loop, *calls):
        exec(way, space)
        gradients.append({name: space[name].grad.clone() for name in ("images", "lr")} | {"loss": space["grand_loss"]})
        space["images"].grad = space["lr"].grad = None
    for name, expected in gradients[0].items():
        assert_close(name, gradients[1][name], expected, 1e-9)
        for others in gradients[2:]:  # their draws are those of the call
            assert torch.equal(others[name], gradients[1][name])


@pytest.mark.usefixtures("_float64")
def test_the_call_in_readme_leaves_the_gradients_of_its_loop() -> None:
    loop, call = blocks_of("../README.md")
    space: dict[str, Any] = {}
    for block in blocks_of("migrating.md")[:2]:  # what README's blocks start from
        exec(block, space)
    gradients = []
    for way in (loop, call):
        space["images"].grad = space["lr"].grad = None
        exec(way, space)
        gradients.append([space[name].grad.clone() for name in ("images", "lr")])
    for actual, expected in zip(*gradients, strict=True):
        assert_close("gradient", actual, expected, 1e-9)


@pytest.mark.usefixtures("_float64")
def test_the_window_starts_with_the_velocity_that_was_left() -> None:
    """Compare the gradient of the page's window with that of recorded steps; without the velocity it is another one."""
    setup, loop, _, _, _, window, *_ = blocks_of("migrating.md")
    space: dict[str, Any] = {}
    for block in (setup, loop):
        exec(block, space)
    space["images"].grad = None
    exec(window, space)
    net, images, labels, lr = (space[name] for name in ("net", "images", "labels", "lr"))
    theta, velocity = space["start"], torch.zeros_like(space["start"])
    for n, index in enumerate(space["order"]):
        leaf = theta if n > 3 else theta.detach().requires_grad_()
        seen, rate = (images[index], lr) if n >= 3 else (images[index].detach(), lr.detach())
        loss = torch.nn.functional.cross_entropy(net(leaf, seen), labels[index])
        velocity = 0.9 * velocity + torch.autograd.grad(loss, leaf, create_graph=n >= 3)[0]
        theta = leaf - rate * velocity if n >= 3 else leaf.detach() - rate * velocity
    expected = torch.nn.functional.cross_entropy(net(theta, images.detach().flip(3)), labels)
    (gradient,) = torch.autograd.grad(expected, images)
    assert_close("images", images.grad, gradient, 1e-9)
    images.grad = None
    exec(window.replace(", velocity=velocity", ""), space)
    assert relative_error(images.grad, gradient) > 0.1


@pytest.mark.usefixtures("_float64")
def test_the_window_of_adam_starts_with_the_moments_that_were_left() -> None:
    """Compare the gradient of the page's window with that of recorded steps of torch.optim.Adam."""
    setup, loop, _, _, _, window, of_adam, *_ = blocks_of("migrating.md")
    space: dict[str, Any] = {}
    for block in (setup, loop, window):
        exec(block, space)
    space["images"].grad = None
    exec(of_adam, space)
    net, images, labels, lr = (space[name] for name in ("net", "images", "labels", "lr"))
    theta = space["start"].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr.item())
    for index in space["before"]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(theta, images[index].detach()), labels[index]).backward()
        optimizer.step()
    state = optimizer.state[theta]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    theta = theta.detach().requires_grad_()
    for n, index in enumerate(space["window"], len(space["before"]) + 1):
        loss = torch.nn.functional.cross_entropy(net(theta, images[index]), labels[index])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        used = square.detach() > 0  # √0 has no derivative
        root = torch.where(used, square, 1).div(1 - 0.999**n).sqrt().where(used, 0)
        theta = theta - lr.detach() * mean / (1 - 0.9**n) / (root + 1e-8)
    expected = torch.nn.functional.cross_entropy(net(theta, images.detach().flip(3)), labels)
    assert_close("images", images.grad, torch.autograd.grad(expected, images)[0], 1e-6)


def test_the_other_blocks_on_porting_do_what_they_say() -> None:
    setup, loop, *_, module, tesla = blocks_of("migrating.md")
    space: dict[str, Any] = {}
    for block in (setup, loop):
        exec(block, space)
    space["images"].grad = None
    exec(module, space)
    assert space["images"].grad.isfinite().all()
    assert space["images"].grad.any()
    exec(tesla, space)
    torch.testing.assert_close(space["images_ours"], space["images_theirs"])


@pytest.mark.slow
def test_processes_that_share_steps_compute_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(next(block for block in blocks_of("migrating.md") if "init_process_group" in block))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    one, three = (
        subprocess.run([*command, "--nproc-per-node", count, script], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        for count in "13"
    )  # fmt: skip
    assert one == three
    assert len(re.findall(r"^\d: loss \d\.\d{4}$", one, re.MULTILINE)) == 3


def test_the_order_by_difficulty_is_one_for_a_curriculum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = on_digits(blocks_of("methods.md")[4], {"expert, 10": "expert, 2", "range(10)]": "range(2)]"})
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 2 --lr_teacher 0.1".split()
    assert cli.run(train_experts, flags) == 0
    space: dict[str, Any] = {}
    exec(block, space)
    assert cli.run(train_experts, [*flags, "--buffer_path", "others", "--sort_method", "order.pt"]) == 0
    right = space["net"](space["theta"], space["images"].batch(slice(None))[0]).argmax(1) == space["images"].labels
    first, last = (torch.cat([row[part] for row in torch.load("order.pt")]) for part in (slice(20), slice(-20, None)))
    assert right[first].double().mean() > right[last].double().mean()


def test_forgetting_events_are_scores_for_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = on_digits(blocks_of("methods.md")[0], {})
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --model ConvNetD1W4 --num_experts 1 --train_epochs 6".split()
    assert cli.run(train_experts, [*flags, "--lr_teacher", "0.1"]) == 0
    space: dict[str, Any] = {}
    exec(block, space)
    events, never = np.load("forgetting.npy"), ~space["correct"].any(0).numpy()
    assert 0 < events[~never].max() <= 3  # right and wrong in turn, in six epochs
    assert (events[never] == 6).all()
    flags += "--max_start_epoch 2 --Iteration 0 --num_eval 1 --epoch_eval_train 1 --expert_lr 0.1 --out run".split()
    assert (
        cli.run(distill, [*flags, "--pix_init", "window", "--score_path", "forgetting.npy", "--score", "forgetting"])
        == 0
    )
    hardest, images = SyntheticDataset.load("run/synthetic.safetensors").images, space["images"]
    events = torch.from_numpy(np.load("forgetting.npy"))
    for label in range(10):
        (place,) = (images.batch(slice(None))[0] == hardest[label]).flatten(1).all(1).nonzero()[0]
        assert events[place] == events[images.labels == label].max()


def test_the_numbers_of_frequencies_restore_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --model ConvNetD1W4 --num_experts 1 --train_epochs 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2"
    flags += " --num_eval 1 --epoch_eval_train 1 --Iteration 2 --ipc 4 --msz_per_channel 16 --lr_img 1e4"
    assert cli.run(distill, [*flags.split(), "--out", "runs/fred-cifar10-ipc1"]) == 0
    space: dict[str, Any] = {}
    exec(blocks_of("methods.md")[1], space)
    assert len(space["numbers"]) == 40 * 16
    torch.testing.assert_close(torch.from_numpy(space["restored"]), space["images"], rtol=0, atol=1e-5)


def test_images_of_the_users_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    own, restore = blocks_of("methods.md")[2:4]
    Path("quarters.py").write_text(own)
    flags = "--dataset digits --model ConvNetD1W4 --num_experts 1 --train_epochs 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2"
    flags += (
        " --num_eval 1 --epoch_eval_train 1 --Iteration 2 --ipc 4 --lr_img 10 --parametrisation quarters.py:Quarters"
    )
    with caplog.at_level("INFO"):
        assert cli.run(distill, [*flags.split(), "--out", "runs/quarters"]) == 0
    assert "as many as 1 images per class of all pixels" in caplog.text
    space: dict[str, Any] = {}
    exec(own + restore, space)
    torch.testing.assert_close(space["images"], space["distilled"].images)


def test_experts_of_ones_own_training_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    network, trained, kept = blocks_of("methods.md")[-3:]
    Path("nets.py").write_text(network)
    for ours, toy in {'"CIFAR10"': '"digits"', "range(10)": "range(2)", "range(30)": "range(5)"}.items():
        assert trained.count(ours) == 1
        trained = trained.replace(ours, toy)
    space: dict[str, Any] = {}
    exec(trained, space)
    del sys.modules["nets"]
    flags = "--dataset digits --model nets.py:Small".split()
    with caplog.at_level("INFO"):
        assert cli.run(convert, [".", "buffers", *flags]) == 0
    assert "use them with: python -m mtt_fast.distill --buffer_path buffers --dataset digits" in caplog.text
    flags += "--num_experts 2 --max_start_epoch 1 --Iteration 1 --syn_steps 2 --num_eval 1 --epoch_eval_train 1 --out run".split()
    assert cli.run(distill, ["--buffer_path", "buffers", *flags]) == 0
    experts = json.loads(Path("run/summary.json").read_text())["accuracy"]["experts"]
    assert (experts["n"], experts["mean"] > 0.2) == (2, True)

    exec(kept, space)
    assert torch.equal(space["start"], space["rows"][3])
    assert torch.equal(space["target"], space["rows"][5])


def on_digits(block: str, further: dict[str, str]) -> str:
    """Return Python code of a page with toy settings in place of CIFAR-10's."""
    toys = {
        '"CIFAR10"': '"digits"',
        "zca=True": "zca=False",
        "ConvNet()": "ConvNet(1, 10, 8, 4, 1)",
        "buffers/CIFAR10/ConvNet": "buffers/digits/ConvNetD1W4",
    }
    for ours, toy in (toys | further).items():
        assert block.count(ours) == 1, ours
        block = block.replace(ours, toy)
    return block


def blocks_of(page: str) -> list[str]:
    """Return the Python blocks of a page of docs/."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)


def test_flags_that_are_said_to_be_the_same_are_there() -> None:
    text = (ROOT / "docs/migrating.md").read_text()
    lines = text[text.index("Names, meanings and defaults") : text.index("What differs")]
    both, distill, experts = (re.findall(r"--(\w+)", line) for line in lines.split("\n- ")[1:])
    fields = [{field.name for field in dataclasses.fields(options)} for options in (DistillOptions, ExpertOptions)]
    successors = re.findall(r"--(\w+)", text[text.index("The successors' changes") : text.index("lists all")])
    assert fields[0] | {"help"} >= set(successors) >= {"gradient", "rho_max", "lr_y", "match_step", "loss_ratio"}
    assert len(both) > 5
    assert len(distill) > 5
    assert len(experts) > 5
    assert fields[0] >= {*both, *distill}
    assert fields[1] >= {*both, *experts}


def test_the_commands_in_the_table_are_those_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/running.md").read_text()
    first_column = re.findall(
        r"^\| (.*?) \|", page[page.index("| command |") : page.index("Options are read")], re.MULTILINE
    )
    monkeypatch.setattr(sys, "argv", ["mtt_fast", "--help"])
    assert __main__.main() == 0
    accepted = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_column))) == sorted(accepted)


def commands_in(page: Path) -> list[str]:
    """Return the printed command lines of this project that are whole: without … or a list of choices."""
    text = page.read_text().replace("\\\n", " ")
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = [*blocks.splitlines(), *re.findall(r"`([^`\n]+)`", text.replace(blocks, ""))]
    whole = [line for line in lines if not re.search(r"…|\\\||STAGE|--help", line)]
    return [line for line in whole if re.match(r" *(python -m )?(mtt_fast[ .]|bench )\w+ ", line)]


def test_the_command_lines_are_accepted() -> None:
    """Parse them all: flags, values and recipes are there."""
    parsed = set()
    for line in (line for page in PAGES for line in commands_in(page)):
        words = shlex.split(line.replace("mtt_fast.", "mtt_fast ").replace("$lr", "0.01"), comments=True)
        package, name, *words = words[2:] if words[0] == "python" else words
        if name in ("analysis", "baselines"):
            name, *words = words
        if words:
            kind = COMMANDS[name] if package == "mtt_fast" else importlib.import_module(f"bench.{name}").Options
            options: Any = parsing.preview(kind, words, "")
            if recipe := getattr(options, "recipe", None):
                assert recipe_options(recipe)
            parsed.add(name)
    assert {"distill", "evaluate", "experts", "convert", "score", "recipes", "meta_step", "precision"} <= parsed


def test_the_plan_on_the_page_keeps_to_its_budget() -> None:
    (block,) = blocks_of("running.md")
    space: dict[str, Any] = {"mtt_fast": mtt_fast, "net": mtt_fast.ConvNet(image_size=128, depth=5)}
    exec(block.replace("print(", "plan = (", 1), space)
    assert 0 < space["plan"].peak_bytes <= 4 << 30


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_what_its_description_says(name: str) -> None:
    options, description = parse_options(["--recipe", name, "--dry-run"]), recipe_about(name)["description"]
    for words, value in {
        "nearest step": options.match_step == "nearest",
        "without the parameters of the first layers": options.depth_ratio,
        "with all parameters": not (options.loss_ratio or options.depth_ratio),
        "dropped parameters": options.loss_ratio,
        "Grad-CAM weights": options.cam_model,
        "EMA of the images": options.ema_decay,
        "flat experts": options.rho_max,
        "learned labels": options.lr_y,
        "labels of a teacher": options.teacher_label,
        "truncated gradient (approximate)": options.gradient == "truncated",
    }.items():
        assert value or words not in description
    for pattern, value in {r"(\d+) images? per class": options.ipc, r"at (\d+)×": options.res}.items():
        assert all(int(number) == value for number in re.findall(pattern, description))
