"""Reports of training runs: logs as killed and resumed runs leave them, summaries, pages with something on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from car_train import checkpoint
from car_train.cli import main
from car_train.evaluation.curves import caption, newest_samples, run_labels, smooth, write
from car_train.evaluation.runs import ReportError, Run, read_log, read_run, summary
from fixtures.small import small_config, small_model

pytest.importorskip("matplotlib")


def lines(steps: range, start: float = 0.0, **values: float) -> list[str]:
    """Log lines, half a second a step."""
    return [json.dumps({"step": s, "seconds": start + 0.5 * (s - steps[0] + 1), **values}) for s in steps]


def make_run(folder: Path, stage: str = "var", steps: int = 20, about: bool = True, **options: Any) -> Path:
    """A run's folder as training writes it, with a validation at every tenth step."""
    folder.mkdir(parents=True)
    config = json.loads(small_config(control=stage == "car").to_json())
    if stage == "vqvae":
        config["var"] = config["car"] = None
    image = 20
    if about:
        given = {"data": "/somewhere/pets", "output": str(folder), "steps": 40, "batch": 16, "lr": 1e-4, **options}
        counts = {"pictures": {"train": 160, "val": 10}, "parameters": {"total": 5000, "trainable": 3000}}
        found = {"format": 1, "stage": stage, "options": given, "config": config, **counts, "versions": {}}
        (folder / "run.json").write_text(json.dumps(found))
    with (folder / "log.jsonl").open("w") as log:
        for s in range(1, steps + 1):
            record = {"step": s, "seconds": 0.5 * s, "loss": 5 / s, "lr": 1e-4}
            if stage == "vqvae":
                record |= {"l1": 0.5 / s, "psnr": 10 + s / 2, "codes_used": 0.5, "codes_used_0": 0.1}
            else:
                record |= {"accuracy": s / 100, "accuracy_last": s / 200}
            if s % 10 == 0:
                record |= {f"val_{k}": 1.1 * v for k, v in record.items() if k in ("loss", "psnr", "accuracy")}
            log.write(json.dumps(record) + "\n")
    for step in (10, 20):
        sheet = Image.new("RGB", (16 * image, 2 * image), (200, step, 0))
        sheet.save(folder / f"samples-{step:07d}.png")
    return folder


def test_a_torn_last_line_is_left_out_and_counted(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines(range(1, 4))) + '\n{"step": 4, "sec')
    records, damaged = read_log(log)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert damaged == 1


def test_a_resumed_run_counts_its_later_records_and_all_its_seconds(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    # Killed in step 7, resumed from the checkpoint of step 4; then stopped at 8 and resumed there.
    torn = '{"step": 7, "se'
    log.write_text(
        "\n".join([*lines(range(1, 7), loss=9.0), torn + lines(range(5, 6))[0], *lines(range(6, 9), loss=1.0)])
        + "\n"
        + "\n".join(lines(range(9, 11), loss=0.5))
    )
    records, damaged = read_log(log)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["loss"] for r in records] == [9.0] * 5 + [1.0] * 3 + [0.5] * 2
    assert damaged == 1
    # 6 steps, 3 after the first stop, 2 after the second, half a second each: also the work that was lost counts.
    assert records[-1]["seconds"] == pytest.approx(0.5 * (6 + 3 + 2))
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds)


def test_the_summary_has_last_and_best_in_each_figures_own_direction(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as log:
        worse = {"val_loss": 3.0, "val_accuracy": 0.01, "val_loss_last": math.nan}
        log.write(json.dumps({"step": 30, "seconds": 20.0, "loss": 1.0, **worse}) + "\n")
    reported = json.loads(json.dumps(summary(run), allow_nan=False))
    assert reported["last"] == {"step": 30, "val_loss": 3.0, "val_accuracy": 0.01, "val_loss_last": None}
    assert reported["best"]["val_loss"] == {"value": pytest.approx(1.1 * 5 / 20), "step": 20}
    assert reported["best"]["val_accuracy"] == {"value": pytest.approx(1.1 * 0.2), "step": 20}
    assert "val_loss_last" not in reported["best"]
    assert (reported["step"], reported["steps"], reported["seconds"], reported["batch"]) == (30, 40, 20.0, 16)
    assert reported["images_per_second"] == pytest.approx(32.0)  # 16 images in half a second


def test_an_older_run_without_run_json_is_described_by_its_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "car", about=False)
    model = small_model()
    checkpoint.save(model, run / "step-0000020")
    found = read_run(run)
    assert found.stage == "car"
    assert found.config == model.config
    # What a checkpoint holds: a buffer would be a mistake here, a parameter left out too.
    sizes = {name: sum(v.numel() for v in m.state_dict().values()) for name, m in checkpoint.modules(model).items()}
    assert found.parameters == {"total": sum(sizes.values()), "trainable": sizes["car"]}
    assert summary(found)["images_per_second"] is None
    assert write([found], tmp_path / "page.png").is_file()


def test_smoothing_is_a_mean_that_skips_what_is_no_number() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 100.0])
    np.testing.assert_allclose(smooth(values, 3), [1, 1.5, 3, 52, 52])
    np.testing.assert_allclose(smooth(values, 0), values)
    flat = smooth(np.random.default_rng(0).normal(5, 1, 2000), 200)
    assert np.abs(flat[200:] - 5).max() < 0.5  # a fifth of the noise's ±3


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Run], Path]:
    """The three stages on one page, two runs of the last; names that a page must not take for markup."""
    folder = tmp_path_factory.mktemp("runs")
    names = {"vqvae": ["vqvae"], "var": ["a<b>&$x^$ 猫"], "car": ["1/car", "2/car"]}
    runs = [read_run(make_run(folder / name, stage)) for stage in names for name in names[stage]]
    return runs, write(runs, folder / "page.png")


def test_a_page_shows_the_curves_and_the_newest_samples_of_every_run(page: tuple[list[Run], Path]) -> None:
    pixels = np.asarray(Image.open(page[1]).convert("RGB"))
    # The sheet of step 20 has this red, that of step 10 another; lanczos leaves an even area as it is.
    assert (pixels == (200, 20, 0)).all(-1).sum() > 10_000
    assert not (pixels == (200, 10, 0)).all(-1).any()
    for colour in ((0, 114, 178), (213, 94, 0)):  # of first and second runs
        assert (pixels == colour).all(-1).sum() > 300


def test_a_caption_says_how_far_and_how_well(page: tuple[list[Run], Path]) -> None:
    text = caption(page[0][0])
    assert text.startswith("step 20 of 40 · batch 16 · ")
    assert "32 images/s" in text
    assert "best psnr 22 @ 20" in text


def test_runs_are_called_by_as_much_of_their_path_as_distinguishes_them(page: tuple[list[Run], Path]) -> None:
    assert run_labels(page[0][2:]) == ["1/car", "2/car"]
    assert run_labels(page[0][:2]) == ["vqvae", "a<b>&$x^$ 猫"]


def test_a_page_may_be_a_pdf(tmp_path: Path) -> None:
    pdf = write([read_run(make_run(tmp_path / "run"))], tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Count 1" in pdf


def test_a_torn_sheet_gives_way_to_an_older_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    whole = (run / "samples-0000020.png").read_bytes()
    (run / "samples-0000030.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (9, 9)).save(run / "samples-0000040.png", "PPM")  # a kind that training never writes
    found = newest_samples(read_run(run))
    assert found is not None
    assert found[1] == 20


def test_the_command_writes_a_report_or_prints_summaries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = make_run(tmp_path / "run"), tmp_path / "page.pdf"
    assert main(["report", str(run), "-o", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert main(["report", str(run), str(run), "--json"]) == 0
    reported = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert reported == [summary(run)] * 2


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda run: (run / "log.jsonl").unlink(), "no training run there"),
        (lambda run: (run / "log.jsonl").write_text("\n{\n[]\n{}\n"), "holds no step"),
        (lambda run: (run / "run.json").write_text("{"), "can't be read"),
        (lambda run: (run / "run.json").write_text("[]"), "not an object"),
        (lambda run: (run / "run.json").write_text('{"stage": "gan"}'), "no stage 'gan'"),
        (lambda run: (run / "run.json").write_text('{"stage": ["var"]}'), "no stage"),
        (lambda run: (run / "log.jsonl").write_text('{"step": 1, "seconds": 1, "strange": 2}'), "none of the curves"),
    ],
)
def test_a_folder_that_is_no_run_is_an_error_with_a_remedy(tmp_path: Path, break_it: Any, words: str) -> None:
    run = make_run(tmp_path / "run")
    break_it(run)
    with pytest.raises(ReportError, match=words):
        write([read_run(run)], tmp_path / "page.png")
    assert not list(tmp_path.glob("*page*"))


@pytest.mark.parametrize(
    ("output", "words"),
    [("page.gif", "no such kind"), ("none/page.png", "does not exist"), ("folder.png", "can't be written")],
)
def test_an_output_that_cannot_be_written_is_an_error_and_leaves_nothing(
    tmp_path: Path, output: str, words: str
) -> None:
    run = read_run(make_run(tmp_path / "run"))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ReportError, match=words):
        write([run], tmp_path / output)
    with pytest.raises(ReportError, match="9 runs"):
        write([run] * 9, tmp_path / "page.png")
    assert {p.name for p in tmp_path.iterdir()} == {"run", "folder.png"}
