"""The report of all benchmarks: what stands in it, which results count, and what is refused."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import latency, report
from benchmarks.analysis import plots
from benchmarks.analysis.results import BENCHMARKS, RETIRED, parse, plan_name
from benchmarks.analysis.sections import SECTIONS, fastest
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.records import record
from benchmarks.harness.tables import percent, seconds, times
from fixtures.toy_plan import toy

Record = dict[str, Any]


def latency_record(tmp_path: Path) -> Record:
    """Of a real run, without measuring starts, which takes the longest."""
    file = tmp_path / "latency.jsonl"
    flags = f"--plan {toy().plan} --backends ort-cpu --batch 1,2 --runs 2 --warmup 0 --threads 1".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "start_rows", lambda *_: [])
        assert latency.main([*flags, "-o", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def controlnet_record(device: str = "cpu") -> Record:
    ours = {"question": "end_to_end", "whose": "ours", "method": "CAR", "candidate": "ort-cpu", "backend": "ort-cpu"}
    ours |= {"tier": "engine", "precision": "fp32", "size": 256, "steps": 10, "timed_steps": 10, "scaled": False}
    ours["group"] = "ControlNet 512² engine fp32"
    rows = [{**ours, "p50": 6.0, "p95": 6.5, "min": 5.8, "runs": 3}]
    for steps in (20, 50):
        their = {
            "question": "end_to_end",
            "whose": "theirs",
            "method": "ControlNet",
            "candidate": "ControlNet, engine",
            "group": ours["group"],
        }
        their |= {"backend": "openvino", "tier": "engine", "precision": "fp32", "size": 512, "steps": steps}
        times_of = {"timed_steps": 2, "scaled": True, "p50": 7.0 * steps, "p95": 8.0 * steps, "min": 6.0, "runs": 3}
        rows.append({**their, **times_of, "text_s": 0.1, "control_s": 0.1, "step_s": 7.0, "decode_s": 2.0})
        ratio = {"question": "ratio", "method": "ControlNet", "tier": "engine", "precision": "fp32", "size": 512}
        ratio |= {"steps": steps, "candidate": "ort-cpu", "against": "engine", "scaled": True, "compares": "…"}
        rows.append({**ratio, "times_ours": 7.0 * steps / 6, "p10": 1.0, "p90": 2.0})
    rows.append({"question": "parameters", "part": "unet", "parameters": 859_520_964, "published": 859_520_964})
    model = {"plans": ["d16-depth16-fp32-b1-0123456789ab.plan"], "depth": 16, "image_size": 256}
    settings = {"theirs": "Stable Diffusion 1.5", "ours": model, "warmup": 1, "runs": 3, "threads": 2}
    return record("controlnet", {**settings, "device": device}, rows)


def schedules_record() -> Record:
    def row(name: str, flags: str, ratio: float, equal: float, kid: float) -> Record:
        found = {"question": "schedule", "schedule": name, "flags": flags, "p50": 0.06 * ratio, "ratio": ratio}
        found |= {"tokens_equal": equal, "kid_half": kid, "kid_floor": 0.019, "f1": 0.5, "f1_change": 0.0}
        return {**found, "f1_change_error": 0.004, "images": 264}

    rows = [
        row("exact", "", 1.0, 1.0, 0.021),
        row("short", "--cfg-scales -3", 0.7, 0.9, 0.022),
        row("stop", "--stop-after 3", 0.5, 1.0, 0.05),
    ]
    return record("schedules", {"plan": "emoji-canny.plan", "backend": "ort-cpu"}, rows)


def training_record() -> Record:
    settings = {"preset": "d16", "stages": ["car"], "batch": 1, "precision": "fp32"}
    settings |= {"tokens": 680, "width": 1024, "pixels": 256}
    row = {"stage": "car", "speedup_p10": 1.9, "speedup_p90": 2.1, "peak_rss": None, "runs": 5}
    rows = [
        {**row, "variant": "plain", "speedup": 1.0, "step_p50": 2.8, "images_per_s": 0.36},
        {**row, "variant": "ours", "speedup": 2.03, "step_p50": 1.4, "images_per_s": 0.71},
    ]
    return record("training", settings, rows)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """One of every benchmark."""
    first = latency_record(tmp_path_factory.mktemp("latency"))
    return [first, controlnet_record(), schedules_record(), training_record()]


def written(folder: Path, records: Sequence[Mapping[str, Any]], *more: str) -> str:
    """The document of these records, made by the command. more: further arguments."""
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    output = folder / "docs" / "performance.md"
    files = [str(folder / "results.jsonl"), *more]
    assert report.main([*files, "-o", str(output), "--images", str(folder / "docs" / "images")]) == 0
    return output.read_text(encoding="utf-8")


def changed(found: Record, **parts: Any) -> Record:
    """A copy with other parts; those of the machine by machine_NAME."""
    machine = {k.removeprefix("machine_"): v for k, v in parts.items() if k.startswith("machine_")}
    rest = {k: v for k, v in parts.items() if not k.startswith("machine_")}
    return {**found, **rest, "machine": {**found["machine"], **machine}}


def cells(text: str, start: str) -> list[list[str]]:
    """Of the lines of tables that begin with a cell, the cells."""
    lines = re.findall(rf"^\| {re.escape(start)} .*$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def in_short(text: str) -> str:
    return text[text.index("## In short") : text.index("## Contents")]


def test_every_benchmark_has_a_section_with_machine_versions_commit_and_command(
    records: list[Record], tmp_path: Path
) -> None:
    assert tuple(SECTIONS) == BENCHMARKS
    text = written(tmp_path, records)
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["In short", "Contents", *(h for h, _ in SECTIONS.values()), report.LAST]
    assert len(re.findall(r"^> .*core", text, re.MULTILINE)) == len(records)
    for found in records:
        m = found["machine"]
        assert f"python {m['python']}, numpy {m['numpy']}" in text
        assert f"commit {m['commit']}" in text
        assert f"`{m['command']}`" in text
    for words in ("vs. PyTorch's GEMM rate", "× 23.3", "70 %", "× 2.03"):
        assert words in in_short(text)
    assert "stop" not in in_short(text)  # an image that isn't finished is no shorter way to the same


def test_links_lead_to_headings_and_diagrams_to_files(records: list[Record], tmp_path: Path) -> None:
    note = tmp_path / "note.md"
    note.write_text("## Measured once\n\n#### On paper\n\nText.\n", encoding="utf-8")
    other = changed(records[0], machine_cpu="Another (R) CPU (family 9, model 9)")
    text = written(tmp_path, [*records, other], str(note))
    anchors: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        base = report.anchor(heading)
        number = sum(re.fullmatch(rf"{re.escape(base)}(-\d+)?", a) is not None for a in anchors)
        anchors.append(f"{base}-{number}" if number else base)
    links = re.findall(r"\]\(#(.*?)\)", text)
    assert len(links) == len(records) + 1 + len(SECTIONS) + 2 + 1
    assert set(links) <= set(anchors)
    images = re.findall(r"!\[.+\]\((.*?)\)", text)
    assert len(images) == len(set(images)) == 3
    for name in images:
        with Image.open(tmp_path / "docs" / name) as image:
            assert image.format == "PNG"
            assert image.width == 1260
            assert len(image.convert("L").getcolors() or []) > 5  # something is drawn
    assert {p.name for p in (tmp_path / "docs" / "images").iterdir()} == {Path(name).name for name in images}
    assert text.index("## Measured once") < text.index(f"## {report.LAST}")


def test_no_cell_of_a_table_is_longer_than_a_phrase(records: list[Record], tmp_path: Path) -> None:
    lines = [line for line in written(tmp_path, records).splitlines() if line.startswith("| ")]
    assert lines
    assert max(len(cell.strip()) for line in lines for cell in line.split("|")) <= 50


def test_the_same_results_give_the_same_document_and_diagrams(records: list[Record], tmp_path: Path) -> None:
    found = []
    for name, given in (("first", records), ("second", list(reversed(records)))):
        (tmp_path / name).mkdir()
        text = written(tmp_path / name, given)
        images = sorted((tmp_path / name / "docs" / "images").iterdir())
        found.append((text, {p.name: p.read_bytes() for p in images}))
    assert found[0] == found[1]


def test_the_newest_result_of_a_subject_counts(tmp_path: Path) -> None:
    old = changed(controlnet_record(), time="2026-01-01T00:00:00+00:00", machine_commit="olderolder00")
    new = changed(controlnet_record(), time="2026-01-02T00:00:00+00:00", machine_commit="newernewer00")
    # The same model exported again, by other code and for other batches, is no other subject.
    ours = {**new["settings"]["ours"], "plans": ["d16-depth16-fp32-b1.4-ba9876543210.plan"]}
    new = changed(new, settings={**new["settings"], "ours": ours})
    for given in ([old, new], [new, old]):
        text = written(tmp_path, given)
        assert "newernewer00" in text
        assert "olderolder00" not in text


def test_other_machines_devices_and_plans_are_sections_of_their_own(tmp_path: Path) -> None:
    one = controlnet_record()
    here = changed(one, machine_cpu="First(R) Processor (family 1, model 1)", machine_cores=2)
    there = changed(one, machine_cpu="First(R) Processor (family 1, model 2)", machine_cores=2)
    card = changed(controlnet_record("cuda"), machine_gpu="NVIDIA H100")
    sections = re.findall(r"^### (.*)$", written(tmp_path, [here, there, card]), re.MULTILINE)
    places = ["First, 2 cores", "First, 2 cores", "NVIDIA H100"]
    assert sections == [f"d16-depth16-fp32 vs. Stable Diffusion 1.5 — {place}" for place in places]
    one = schedules_record()
    two = changed(one, settings={**one["settings"], "backend": "openvino"})
    assert len(re.findall(r"^### ", written(tmp_path, [one, two]), re.MULTILINE)) == 2


def run_of(against: str, steps: Sequence[int], p50: float, day: int) -> Record:
    """A run of our engine on a GPU vs. theirs in PyTorch."""
    found = changed(controlnet_record("cuda"), machine_gpu="NVIDIA H100", machine_commit=f"commitof{against}{day}")
    rows = [row for row in found["results"] if row.get("whose") == "ours" or row.get("steps") in steps]
    for row in rows:
        if row["question"] == "ratio":
            row |= {"against": against, "times_ours": p50, "scaled": False}
        elif row["whose"] == "theirs":
            row |= {"tier": against, "candidate": f"ControlNet, {against}", "p50": p50, "scaled": False}
        else:
            row |= {"p50": p50 / 10}
    return changed(found, time=f"2026-01-0{day}T00:00:00+00:00", results=[*rows, found["results"][-1]])


def test_comparisons_of_several_runs_are_joined(tmp_path: Path) -> None:
    """Of each the newest counts, and every run that counts is named."""
    runs = [run_of("eager", [20, 50], 3.01, 1), run_of("eager", [20, 50], 3.02, 2), run_of("compiled", [20], 1.03, 3)]
    texts = []
    for order in (runs, list(reversed(runs))):
        text = written(tmp_path, order)
        assert len(re.findall(r"^### ", text, re.MULTILINE)) == 1
        section = text[text.index("### d16") :]
        assert [row[1:8] for row in cells(section, "ControlNet") if "ort-cpu" in row] == [
            ["20", "512²", "engine", "fp32", "ort-cpu", "eager", "× 3.02"],
            ["50", "512²", "engine", "fp32", "ort-cpu", "eager", "× 3.02"],
            ["20", "512²", "engine", "fp32", "ort-cpu", "compiled", "× 1.03"],
        ]
        theirs = [row for tier in ("eager", "compiled") for row in cells(section, f"ControlNet, {tier}")]
        assert [[row[1], row[6]] for row in theirs] == [
            ["eager", "3.02 s"],
            ["eager", "3.02 s"],
            ["compiled", "1.03 s"],
        ]
        assert re.findall(r"commit (commitof\w+)", text) == ["commitofeager2", "commitofcompiled3"]
        assert text.count("unet 859.5 M") == 1
        chosen = [[row[1], row[3]] for row in cells(in_short(text), "ControlNet")]
        assert chosen == [["20", "compiled PyTorch"], ["50", "eager PyTorch"]]  # where theirs is nearest to ours
        assert "Theirs has no engine on this device" in text
        texts.append(text)
    assert texts[0] == texts[1]
    assert "Theirs has no engine" not in written(tmp_path, [controlnet_record()])


def test_a_note_stands_above_the_figures_and_is_mentioned_in_short(tmp_path: Path) -> None:
    text = written(tmp_path, [{**controlnet_record(), "note": "The room was warm."}])
    section = text[text.index("### d16") :]
    assert section.index("**Note:** The room was warm.") < section.index("Ours (depth 16")
    assert "see its note" in in_short(text)
    assert "note" not in in_short(written(tmp_path, [controlnet_record()]))


def test_other_batches_of_a_plan_are_a_section_of_their_own(records: list[Record], tmp_path: Path) -> None:
    alone = changed(records[0], settings={**records[0]["settings"], "batch": [1]})
    sections = re.findall(r"^### (.*?) —", written(tmp_path, [records[0], alone]), re.MULTILINE)
    assert [s[s.index(",") :] for s in sections] == [", batch 1", ", batches 1 and 2"]


def test_what_is_scaled_or_missing_is_labelled(tmp_path: Path) -> None:
    text = written(tmp_path, [controlnet_record()])
    assert "*scaled*: fewer steps were timed" in text
    last = text[text.index(f"## {report.LAST}") :]
    for words in ("Any GPU", "Quality", "multiplied from fewer"):
        assert words in last
    for benchmark in BENCHMARKS:
        assert (f"python -m benchmarks.{benchmark} --help" in last) == (benchmark != "controlnet")
    text = written(tmp_path, [changed(controlnet_record("cuda"), machine_gpu="NVIDIA H100")])
    assert "Any GPU" not in text


def test_int8_is_shown_after_what_is_exact_and_not_in_its_place(records: list[Record], tmp_path: Path) -> None:
    latency = json.loads(json.dumps(records[0]))
    for row in [r for r in latency["results"] if r.get("backend") == "ort-cpu"]:
        latency["results"].append({**row, "candidate": "ort-cpu, int8", "precision": "int8", "p50": row["p50"] / 2})
    compared = json.loads(json.dumps(controlnet_record()))
    for row in [r for r in compared["results"] if r["question"] == "ratio"]:
        compared["results"].append({**row, "candidate": "ort-cpu, int8", "times_ours": 2 * row["times_ours"]})
    drawn = json.loads(json.dumps(schedules_record()))
    whole = drawn["results"][0]
    drawn["results"].append({**whole, "schedule": "int8", "ratio": 0.6, "tokens_equal": 0.95, "kid_half": 0.023})
    text = written(tmp_path, [latency, compared, drawn])
    short = in_short(text)
    assert [row[3] for row in cells(short, plan_name(toy().plan.name))] == ["ort-cpu", "ort-cpu, int8"]
    ratios = [row[5:7] for row in cells(short, "ControlNet") if row[1] == "20"]
    assert ratios == [["ort-cpu", "× 23.3"], ["ort-cpu, int8", "× 46.7"]]
    assert [row[1:6] for row in cells(short, "emoji-canny on ort-cpu")] == [
        ["short", "70 %", "90 %", "0.022", "0.021"],
        ["int8", "60 %", "95 %", "0.023", "0.021"],
    ]
    for words in ("not how equals compare", "*int8*: the plan's INT8 form", "*int8*: the exact loop"):
        assert words in text


def test_diagrams_of_an_earlier_report_are_removed_and_others_stay(tmp_path: Path) -> None:
    images = tmp_path / "docs" / "images"
    images.mkdir(parents=True)
    (images / "performance-latency-7.png").write_bytes(b"old")
    (images / "demo.png").write_bytes(b"another's")
    written(tmp_path, [controlnet_record()])
    assert sorted(p.name for p in images.iterdir()) == ["demo.png", "performance-controlnet-1.png"]


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Their keys have other names, and benchmarks that are gone are passed over."""
    found = schedules_record()
    for row in found["results"]:
        row["pictures"] = row.pop("images")
    gone = [{"format": 1, "benchmark": name} for name in RETIRED]
    text = written(tmp_path, [*gone, found])
    assert text == written(tmp_path, [{**schedules_record(), "time": found["time"]}])
    assert "| images |" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"results.jsonl:2: no result of a benchmark .*; take the line out"),
        ("[]", r"results.jsonl:2: no result of a benchmark .*; take the line out"),
        ('{"format": 2, "benchmark": "latency"}', r":2: format 2, and this version reads 1; measure again"),
        ('{"format": 1, "benchmark": "cooking"}', r"'cooking', and this report knows latency, .*; take the line out"),
        ('{"format": 1, "benchmark": "latency"}', r":2: latency without 'time'; measure again"),
    ],
)
def test_a_line_that_is_no_known_result_is_refused_by_its_number(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(training_record()) + "\n" + line + "\n", encoding="utf-8")
    assert report.main([str(file), "-o", str(tmp_path / "x.md"), "--images", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.startswith("benchmarks.report: error: ")
    assert not (tmp_path / "x.md").exists()


def test_a_result_that_lacks_something_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = training_record()
    del found["results"][1]["speedup"]
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(found), encoding="utf-8")
    assert report.main([str(file), "-o", str(tmp_path / "x.md"), "--images", str(tmp_path)]) == 2
    assert (
        "results.jsonl:1: a result of training that can't be shown (KeyError('speedup'))" in capsys.readouterr().err
    )
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_files_that_hold_nothing_or_are_not_there_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "none.jsonl"):
        assert report.main([str(tmp_path / name), "-o", str(tmp_path / "x.md"), "--images", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("write some, e.g. with benchmarks.latency -o")
    assert second.endswith("give a file that a benchmark wrote")
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "empty.jsonl"), "-o", "x.html", "--images", "x"])
    assert stop.value.code == 2
    assert "ends with .md" in capsys.readouterr().err


def test_numbers_are_shown_in_the_unit_that_suits() -> None:
    assert [seconds(v) for v in (1234.5, 95, 2.345, 0.0634, 1.2e-5)] == [
        "1,234 s",
        "95 s",
        "2.35 s",
        "63.4 ms",
        "12 µs",
    ]
    assert [times(v) for v in (2.034, 23.3, 1234)] == ["× 2.03", "× 23.3", "× 1,234"]
    assert percent(0.614) == "61 %"
    assert plan_name("d16-depth16-fp32-b1.4-0123456789ab.plan") == "d16-depth16-fp32"
    assert plan_name("emoji-canny.plan") == "emoji-canny"


def test_a_diagram_shows_our_fastest_against_each_of_theirs() -> None:
    rows = [row for row in controlnet_record()["results"] if row["question"] == "ratio"]
    slower = [{**row, "candidate": "openvino", "times_ours": row["times_ours"] / 2} for row in rows]
    assert list(fastest([*slower, *rows])) == rows
    with Image.open(io.BytesIO(plots.ratio_bars(rows))) as image:
        assert image.format == "PNG"
    with pytest.raises(BenchmarkError, match="format 0"):
        parse(json.dumps({**controlnet_record(), "format": 0}), "here:1")
