"""Test the report: one page without other files, of finished and unfinished runs, with the content of their files."""

from __future__ import annotations

import base64
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mtt_fast.commands import cli
from mtt_fast.commands.tables import percent
from mtt_fast.distill.command import main as distill
from mtt_fast.errors import InputError
from mtt_fast.report.__main__ import main
from mtt_fast.report.page import mebibytes, number, pictures, seconds
from mtt_fast.storage.text_files import write_json

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 "
    "--syn_steps 3 --Iteration 6 --eval_it 1 --num_eval 2 --epoch_eval_train 1 --batch_real 512 --lr_img 10"
).split()
ALONE = {"meta", "br", "img"}  # elements of HTML without an end


class Page(HTMLParser):
    """The elements of a page, and its text; complains where they are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.drawings = 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := values.get(name))]
        if tag == "img":
            self.pictures.append(values)
        self.drawings += tag == "svg"
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, no_curves: None) -> Path:
    folder = tmp_path_factory.mktemp("report")
    folders = ["--data_path", f"{folder}/data", "--buffer_path", f"{folder}/buffers", "--out", f"{folder}/toy"]
    assert cli.run(distill, [*TOY, *folders]) == 0
    return folder / "toy"


def test_a_finished_run_has_a_page(run: Path) -> None:
    assert cli.run(main, [str(run)]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert not [link for link in page.links if not link.startswith(("#", "data:image/png;base64,"))]
    summary = json.loads((run / "summary.json").read_text())
    text = " ".join(page.text)
    for kind in ("distilled", "random_real_images", "experts"):
        assert percent(summary["accuracy"][kind], digits=2) in text
    assert summary["versions"]["torch"] in text
    assert "--syn_steps 3" in text
    assert "finished, 6 iterations" in text
    assert page.drawings == 3
    assert "Loss" in page.text
    assert "by network" not in text  # of one network there is nothing to compare
    shown = [picture["alt"] for picture in page.pictures]
    assert shown == [f"toy, iteration {iteration}" for iteration in (0, 2, 3, 4, 6)]  # seven snapshots, five shown
    last = page.pictures[-1]["src"]
    assert last is not None
    assert base64.b64decode(last.split(",")[1]) == (run / "history" / "iteration_000006.png").read_bytes()


def test_the_same_run_is_the_same_page(run: Path, tmp_path: Path) -> None:
    pages = [tmp_path / name for name in ("a.html", "b.html")]
    for page in pages:
        assert cli.run(main, [str(run), "--out", str(page)]) == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_run_under_way_stands_beside_a_baseline(run: Path, tmp_path: Path) -> None:
    under_way, baseline = tmp_path / "going", tmp_path / "dm & co"
    under_way.mkdir()
    for name in ("config.toml", "metrics.jsonl"):
        (under_way / name).write_bytes((run / name).read_bytes())
    last = {"kind": "evaluation", "iteration": 6, "accuracy_mean": 0.98765, "accuracy_std": 0.0125, "networks": 2}
    with open(under_way / "metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps(last) + "\n")
    baseline.mkdir()
    accuracy = {"distilled": {"mean": 0.5, "std": 0.25, "n": 3}}
    summary = {"method": "<DM>", "accuracy": accuracy, "options": {"dataset": "digits", "ipc": 1, "model": "ConvNet"}}
    (baseline / "summary.json").write_text(json.dumps(summary))
    page = tmp_path / "both.html"
    assert cli.run(main, [str(under_way), str(baseline), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    Page(text)
    assert "by network" not in text
    assert "50.00 ± 25.00" in text
    assert "98.77 ± 1.25" in text  # the last evaluation of the run that is not finished
    assert "not finished, 6 iterations" in text
    assert "&lt;DM&gt;" in text
    assert "Loss (each method&#39;s own)" in text
    assert "dm &amp; co" in text
    assert "<DM>" not in text


def test_the_page_shows_the_accuracies_of_several_networks(tmp_path: Path) -> None:
    networks = {name: {"mean": mean, "std": 0.01, "n": 2} for name, mean in (("ConvNet", 0.5), ("VGG11", 0.25))}
    for name, of_run in (("one", networks), ("two", {"ConvNet": networks["ConvNet"], "MLP": networks["VGG11"]})):
        summary = {"accuracy": {}, "accuracy_by_network": {"distilled": of_run}, "options": {}}
        write_json(tmp_path / name / "summary.json", summary)
    page = tmp_path / "page.html"
    assert cli.run(main, [str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(page)]) == 0
    words = [word for word in Page(page.read_text(encoding="utf-8")).text if word]
    begin = words.index("Test accuracy by network (%)") + 1
    assert words[begin : begin + 12] == [
        "run", "ConvNet", "VGG11", "MLP", "one", "50.00 ± 1.00", "25.00 ± 1.00", "—", "two", "50.00 ± 1.00", "—",
        "25.00 ± 1.00",
    ]  # fmt: skip


def test_runs_of_one_name_keep_their_own_pictures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "cost$x^$" / "toy"
    (other / "history").mkdir(parents=True)
    (other / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (other / "config.toml").write_bytes((run / "config.toml").read_bytes())
    Image.new("RGB", (3, 3)).save(other / "history" / "iteration_000000.png")
    page = tmp_path / "both.html"
    assert cli.run(main, [str(run), str(other), "--out", str(page)]) == 0
    assert "each method" not in page.read_text(encoding="utf-8")  # there is one
    pictures = {picture["alt"]: picture["src"] for picture in Page(page.read_text(encoding="utf-8")).pictures}
    names = f"{run.parent.name}/toy", "cost$x^$/toy"
    assert [sum(str(alt).startswith(name) for alt in pictures) for name in names] == [5, 1]
    shown = pictures[f"{names[1]}, iteration 0"]
    assert shown is not None
    assert base64.b64decode(shown.split(",")[1]) == (other / "history" / "iteration_000000.png").read_bytes()
    assert cli.run(main, [str(run), str(run / ".." / "toy"), "--out", str(page)]) == 2
    assert "toy: expected each run once, found it twice" in capsys.readouterr().err


def test_what_a_page_says_of_the_successors_options(tmp_path: Path) -> None:
    def accuracy(mean: float) -> dict[str, float | str]:
        return {"mean": mean, "std": 0.01, "n": 2, "epoch": "best"}

    options = {"dataset": "digits", "ipc": 1, "model": "MLP", "texture": True}
    summary = {
        "accuracy": {"distilled": accuracy(0.5), "ema": accuracy(0.6), "own_training": accuracy(0.7)},
        "accuracy_by_network": {"distilled": {"MLP": accuracy(0.5), "VGG11": accuracy(0.4)}},
        "protocol": {"text": "protocol toy: the BEST epoch"},
        "gradient": {"kind": "truncated (approximate)"},
        "learning_rate": 0.02, "learning_rate_per_step": [0.01, 0.03],
        "skipped_iterations": 0, "iterations_repeated_in_tf32": 6, "iterations_above_threshold": 17, "options": options,
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    evaluation = {"iteration": 0, "accuracy_mean": 0.5, "accuracy_std": 0.1, "networks": 2}
    kinds = {"evaluation": evaluation, "ema_evaluation": evaluation, "gradient": {"iteration": 0, "cosine": 0.75}}
    lines = [json.dumps({"kind": kind} | values) for kind, values in kinds.items()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert cli.run(main, [str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert "MTT, textures, digits, 1 image per class" in text
    assert "60.00 ± 1.00 (best epoch)" in text
    assert "after the method's own steps" in text
    assert "MLP VGG11 " in text
    assert "40.00 ± 1.00 (best epoch)" in text
    assert "Evaluation: protocol toy: the BEST epoch." in text
    assert "gradient truncated (approximate)" in text
    assert "of each step 0.01, 0.03" in text
    assert "iterations repeated in tf32 6" in text
    assert "iterations above the threshold 17" in text
    assert "not finite" not in text
    assert "Cosine of the approximate gradient to the exact one" in text
    assert page.drawings == 2


@pytest.mark.parametrize(
    ("config", "method"),
    [
        pytest.param('method = "dsa"', "DSA", id="baseline"),
        pytest.param('recipe = "datm-cifar10-ipc1"', "DATM", id="recipe"),
        pytest.param('recipe = "of an older version"', "MTT", id="unknown recipe"),
        pytest.param("seed = 0", "MTT", id="distillation"),
        pytest.param("texture = true", "MTT, textures", id="textures"),
        pytest.param("msz_per_channel = 16", "MTT, 16 frequencies", id="frequencies"),
        pytest.param('parametrisation = "speed"', "MTT, images by speed", id="parametrisation"),
    ],
)
def test_a_run_that_is_not_finished_has_its_methods_name(config: str, method: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'{config}\ndataset = "digits"\nipc = 1\nmodel = "MLP"\n')
    assert cli.run(main, [str(tmp_path)]) == 0
    text = " ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).text)
    assert f"{method}, digits, 1 image per class, MLP; not finished, 0 iterations." in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "expected a run's folder", id="nothing"),
        pytest.param("{}", "expected the summary of a run", id="empty"),
        pytest.param("{", "expected the summary of a run", id="not JSON"),
    ],
)
def test_mistakes_are_told(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    assert cli.run(main, [str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_report_of_no_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(main, []) == 2
    assert "expected the folder of a run" in capsys.readouterr().err


def test_a_picture_stands_over_its_own_iteration(tmp_path: Path) -> None:
    snapshots = {iteration: tmp_path / str(iteration) for iteration in (1000, 0, 250)}
    for side, path in enumerate(snapshots.values(), start=1):
        Image.new("RGB", (side, 1)).save(path, format="PNG")
    shown = [(picture.caption, base64.b64decode(picture.data)) for picture in pictures(snapshots)]
    captions = {"iteration 0": 0, "iteration 250": 250, "iteration 1,000": 1000}
    assert shown == [(caption, snapshots[iteration].read_bytes()) for caption, iteration in captions.items()]


@pytest.mark.parametrize("damage", [b"no picture", None, "GIF"], ids=["text", "truncated", "another kind"])
def test_a_damaged_snapshot_is_not_shown(tmp_path: Path, damage: bytes | str | None) -> None:
    path = tmp_path / "iteration_000000.png"
    Image.effect_noise((64, 64), 50).save(path, format=damage if isinstance(damage, str) else "PNG")
    if not isinstance(damage, str):
        path.write_bytes(damage or path.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"iteration_000000\.png: expected a picture \(PNG\), .*; delete it"):
        pictures({0: path})


def test_numbers_are_rounded_for_the_page() -> None:
    assert [seconds(value) for value in (3.04, 61, 3599.7, 7500)] == ["3.0 s", "1 min 01 s", "1 h 00 min", "2 h 05 min"]
    assert percent({"mean": 0.123456, "std": 0.01, "n": 1}, digits=2) == "12.35"
    assert mebibytes(100 << 20) == "100 MiB"
    assert number([0.01, 0.0212345]) == "0.01, 0.021234"


def test_a_run_that_cannot_be_written_to_is_reported_elsewhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = os.access  # the system lets root write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run and allowed(path, mode))
    assert cli.run(main, [str(run)]) == 2
    expected = f"error: {run}: expected a folder to write in, found that {run} is read-only; choose another --out\n"
    assert capsys.readouterr().err == expected
    assert cli.run(main, [str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
