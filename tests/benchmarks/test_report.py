"""The report on made-up rows: what it says, shows and refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import quality
from benchmarks.quality import points
from benchmarks.report import claims, read_results, with_speed, write_report
from flashdiff.errors import ConfigError

_HERE = {
    "cpu": "a cpu",
    "threads": 2,
    "system": "linux",
    "libraries": {"openvino": "1"},
    "bundles": {"student": {"hash": "s"}, "teacher": {"hash": "t"}},
}


def _timed(model: str, steps: int, nfe: int, total: float, **stages: float) -> list[dict[str, Any]]:
    about = {"model": model, "backend": "openvino", "precision": "fp32", "batch": 1, "steps": steps, "nfe": nfe}
    return [{**about, "stage": name, "median_ms": ms, "p95_ms": ms, "n": 20} for name, ms in {**stages, "total": total}.items()]


def _write(folder: Path, name: str, **content: Any) -> Path:
    file = folder / name
    file.write_text(json.dumps({"environment": _HERE, **content}))
    return file


def _value(number: float) -> dict[str, float]:
    return {"value": number, "low": number - 1, "high": number + 1}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    stages = {"text": 1.0, "decode": 1.0, "image_encoding": 0.1}
    rows = [
        *_timed("student", 4, 4, 20.0, denoise_step=4.0, **stages),
        *_timed("student, served", 4, 4, 25.0, denoise_step=4.0, queue=1.0, wire=2.0, **stages),
        *_timed("diffusers", 4, 4, 90.0),
        *_timed("teacher", 50, 100, 400.0, denoise_step=8.0, **stages),
    ]
    open_loop = [
        {
            "phase": "open loop",
            "batching": batching,
            "load": load,
            "sent": 10,
            "statuses": {"OK": 9},
            "p50_ms": 20,
            "p95_ms": 30,
            "p99_ms": 40,
        }
        for load in (0.5, 0.8)
        for batching in ("step", "request")
    ]
    load_rows = [
        {"phase": "offline", "images_per_s": 100, "cores": "own"},
        {"phase": "quiet", "idle_cores": "asleep", "p50_ms": 20, "p50_beyond_engine_ms": 2},
        {"phase": "saturated", "goodput_per_s": 90, "cores": "own", "of_offline": 100},
        *open_loop,
        {"phase": "overload", "seconds": 60, "goodput_per_s": 85, "refusal_p99_ms": 5, "memory_mb": [70, 90, 91]},
        {"phase": "chaos", "answered": 10, "accepted": 10, "sent": 10, "slots_left": 0},
    ]
    measures = {name: _value(20.0) for name in ("fid", "kid", "text", "diversity")}
    measures |= {"large": _value(0.9), "small": _value(0.7)}
    timed = {
        "points": [
            {"model": model, "steps": steps, "median_ms": ms, **measures, "kid": _value(kid)}
            for model, steps, ms, kid in (("student", 4, 20.0, 20.0), ("teacher", 50, 400.0, 10.0))
        ]
    }
    networks = [
        {"parameters": parameters, "size": [side, side], "batch": batch, "median_ms": 2.0, "samples_ms": [2.0, 2.0]}
        for parameters in (10**6, 4 * 10**6)
        for side in (64, 128)
        for batch in (1, 8)
    ]
    return [
        _write(tmp_path, "latency.json", rows=rows),
        _write(tmp_path, "load.json", rows=load_rows),
        _write(tmp_path, "quality.json", real={**measures, "kid": _value(1.0)}, **timed),
        _write(tmp_path, "peers.json", rows=[{**row, "server": "LitServe", "goodput_per_s": 9.0} for row in open_loop]),
        _write(tmp_path, "scaling.json", rows=networks),
    ]


def test_one_page_holds_all_and_says_what_the_numbers_say(files: list[Path], tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    Image.new("RGB", (8, 8)).save(sheet)
    results = read_results(files)
    assert claims(results) == [
        "4 steps take 20.0 ms where the teacher's 50 guided ones take 400 ms: 20.0 times as fast, 0.80 of the ideal 25.",
        "The same 4 steps in stock diffusers take 90.0 ms, 4.5 times as long.",
        "At 4 steps the kernel distance to real images (KID x1000) is 20.0 (19.0 to 21.0); the 50-step teacher's is "
        "10.0 (9.0 to 11.0), other real images' 1.0 (0.0 to 2.0). The text score is 20.0 (teacher 20.0), large attributes "
        "are right on 90.0 % (90.0 %) of the images.",
    ]
    write_report(results, [sheet], tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text()
    assert html.count("<img ") == 6
    assert 'src="data:image/png;base64,' in html
    assert "http" not in html
    assert "<td>student, served</td>" in html
    for name in ("stages", "load", "quality", "peers", "scaling"):
        with Image.open(tmp_path / "report" / f"{name}.png") as plot:
            assert plot.width > 500


def test_numbers_of_two_machines_or_bundles_do_not_stand_side_by_side(files: list[Path], tmp_path: Path) -> None:
    for name, value in (("cpu", "another"), ("libraries", {"openvino": "2"}), ("bundles", {"student": {"hash": "other"}})):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**json.loads(files[1].read_text()), "environment": {**_HERE, name: value}}))
        with pytest.raises(ConfigError, match=f"its {name} differs from that of"):
            read_results([files[0], other])
    later = tmp_path / "later.json"  # it shares no bundle with the first, but one with the second
    later.write_text(json.dumps({"environment": {**_HERE, "bundles": {"more": {"hash": "m"}}}, "rows": [{"phase": "chaos"}]}))
    other.write_text(json.dumps({"environment": {**_HERE, "bundles": {"more": {"hash": "n"}}}, "rows": [{"phase": "chaos"}]}))
    with pytest.raises(ConfigError, match=r"other\.json: its bundles differs"):
        read_results([files[0], later, other])
    old = _write(tmp_path, "old.json", rows=[{"phase": "saturated", "goodput_per_s": 90}])
    with pytest.raises(ConfigError, match=r"old\.json: rows of an older load\.py"):
        read_results([old])
    with pytest.raises(ConfigError, match="a file before it has the load of the report"):
        read_results([later, later])
    bad = tmp_path / "bad.json"
    for text in ("{}", "[]", "no JSON", '{"environment": {}, "rows": [1]}'):
        bad.write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.json: not a result"):
            read_results([bad])


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.name
)
def test_committed_results_are_drawn_or_refused_by_name(file: Path, tmp_path: Path) -> None:
    if any(kind in file.name for kind in ("latency", "load", "peers", "scaling")):
        write_report(read_results([file]), [], tmp_path / "report")
        assert len(list((tmp_path / "report").glob("*.png"))) == 1
    else:
        with pytest.raises(ConfigError, match=re.escape(file.name)):
            read_results([file])


def test_the_readme_says_what_the_committed_rows_say() -> None:
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text()
    found = re.search(r"<!-- speed: .*?\(\[rows\]\((.*?)\)\).*?<!-- /speed -->", readme, re.DOTALL)
    assert found
    assert with_speed(readme, read_results([root / found[1]]), found[1]) == readme


def test_the_readmes_table_is_replaced_and_nothing_around_it(files: list[Path]) -> None:
    results = read_results(files[:1])
    readme = with_speed("before\n<!-- speed: x -->\nold\n<!-- /speed -->\nafter\n", results, "rows.json")
    assert readme.startswith("before\n<!-- speed: x -->\n\n| model |")
    assert "| student | 1 | 4 | 4 | 1.00 | 4.00 | 1.00 | 0.10 |  |  | 20.0 (20.0) | 20.0x | 25x |" in readme
    assert "With 4 steps the student has 0.80 of the ideal: of its 20.0 ms, 2.0 are text, decoding and PNG," in readme
    assert readme.endswith("*\n<!-- /speed -->\nafter\n")
    assert "old" not in readme
    with pytest.raises(ConfigError, match="no lines"):
        with_speed("nothing to fill in", results, "rows.json")
    with pytest.raises(ConfigError, match="at batch 1"):
        with_speed(readme, read_results(files[1:2]), "rows.json")


def test_a_point_has_the_quality_and_the_time_of_one_number_of_steps() -> None:
    row = {
        "fid": _value(1),
        "kid": _value(2),
        "text": _value(3),
        "diversity": _value(4),
        "attributes": {"large": _value(5), "small": _value(6)},
    }
    evaluation = {"rows": [{"name": name, **row} for name in ("real", "mine, 4 steps", "mine, 1 step", "teacher, 50 steps")]}
    timed = [*_timed("student", 4, 4, 20.0), *_timed("student", 1, 1, 6.0), *_timed("teacher", 50, 100, 400.0)]
    found = points(evaluation, timed, {"student": "mine", "teacher": "teacher"})
    assert [(p["model"], p["steps"], p["median_ms"]) for p in found] == [
        ("student", 4, 20.0),
        ("student", 1, 6.0),
        ("teacher", 50, 400.0),
    ]
    assert found[0]["large"]["value"] == 5


def _quality(student: Path, teacher: Path, evaluation: Path | None) -> None:
    options = {"steps": [1], "teacher_steps": [2], "count": 2, "repeats": 1, "report": print}
    quality.run(student, teacher, evaluation_file=evaluation, **options)


def test_bundles_of_one_name_or_an_evaluation_without_text_scores_make_no_points(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both called 'bundle'"):
        _quality(tmp_path / "a" / "bundle", tmp_path / "b" / "bundle", None)
    row = {"name": "real", "attributes": {"large": _value(1)}, "kid": _value(1), "text": None}
    evaluation = _write(tmp_path, "evaluation.json", rows=[row])
    with pytest.raises(ConfigError, match=r"evaluation\.json: not what .* text score included"):
        _quality(tmp_path / "a", tmp_path / "b", evaluation)
    bare = _write(tmp_path, "quality.json", points=[{"model": "student", "kid": _value(1), "text": None}], real=row)
    with pytest.raises(ConfigError, match=r"quality\.json: points without KID or text score"):
        read_results([bare])
