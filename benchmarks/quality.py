"""Quality against latency: one point for teacher and student at each number of steps.

    python benchmarks/quality.py --student STUDENT_BUNDLE --teacher TEACHER_BUNDLE --json quality.json

Quality is what `flashdiff evaluate` measures; latency what benchmarks/latency.py does, for the same bundles in the same session.
With --evaluation, quality is what `flashdiff evaluate STUDENT --teacher TEACHER --json FILE` has written of them before.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import latency
from benchmarks.rows import result_file
from flashdiff.config import parse_numbers
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ConfigError, FlashdiffError
from flashdiff.evaluation.command import EvaluateOptions, evaluate
from flashdiff.evaluation.images import REAL
from flashdiff.files import write_whole

_MEASURES = ("fid", "kid", "text", "diversity")


def points(evaluation: dict[str, Any], timed: Sequence[dict[str, Any]], names: dict[str, str]) -> list[dict[str, Any]]:
    """Every timed number of steps with its measures, {value, low, high} each.

    `names` has the folders of the two bundles by model, as the evaluation calls them.
    """
    rows = {row["name"]: row for row in evaluation["rows"]}
    found = []
    for total in (row for row in timed if row["stage"] == "total" and row["batch"] == 1):
        model, steps = total["model"], total["steps"]
        row = rows[_title(names[model], steps)]
        found.append({"model": model, "steps": steps, "median_ms": total["median_ms"], **_measures(row)})
    return found


def _title(name: str, steps: int) -> str:
    """What `flashdiff evaluate` calls a row."""
    return f"{name}, {steps} step{'s' if steps > 1 else ''}"


def _measures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _MEASURES} | {name: row["attributes"][name] for name in ("large", "small")}


def run(
    student: Path,
    teacher: Path,
    *,
    steps: Sequence[int],
    teacher_steps: Sequence[int],
    count: int,
    repeats: int,
    evaluation_file: Path | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """{"environment": ..., "points": [...], "real": the row of real images}. ConfigError where a bundle's rows cannot be told."""
    names = {"student": student.resolve().name, "teacher": teacher.resolve().name}
    if names["student"] == names["teacher"]:
        raise ConfigError(f"--student and --teacher are both called '{names['student']}', and so would be their rows: rename one")
    with tempfile.TemporaryDirectory() as folder:
        written = evaluation_file or Path(folder) / "evaluation.json"
        if not evaluation_file:
            options = EvaluateOptions(
                subject=str(student),
                steps=tuple(steps),
                teacher=str(teacher),
                teacher_steps=tuple(teacher_steps),
                count=count,
                json_file=written,
            )
            evaluate(options, open_bundle=open_bundle, report=report)
        evaluation = _read(written)
    there = [row["name"] for row in evaluation["rows"]]
    for model, counts in (("student", steps), ("teacher", teacher_steps)):
        if missing := [title for count in counts if (title := _title(names[model], count)) not in there]:
            raise ConfigError(f"the evaluation has no row '{missing[0]}': it has {', '.join(there)}")
    timed = latency.run(
        [(student, teacher)], batches=[1], repeats=repeats, report=report, steps=steps, teacher_steps=teacher_steps
    )
    real = next(row for row in evaluation["rows"] if row["name"] == REAL)
    return {
        "environment": timed["environment"],
        "points": points(evaluation, timed["rows"], names),
        "real": _measures(real),
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        has_all = all(row["attributes"] and row["kid"] and row["text"] for row in found["rows"])
        if has_all and any(row["name"] == REAL for row in found["rows"]):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f"{file}: not what `flashdiff evaluate --json` writes for two or more prompts of the embedded world, text score included"
    )


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The points as a table."""
    lines = ["| model | steps | ms an image | KID x1000 | text | large, % | small, % |", "|---|---|---|---|---|---|---|"]
    for p in found:
        values = (p["kid"]["value"], p["text"]["value"], 100 * p["large"]["value"], 100 * p["small"]["value"])
        lines.append(f"| {p['model']} | {p['steps']} | {p['median_ms']:.1f} | " + " | ".join(f"{v:.1f}" for v in values) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--teacher", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--steps", default="1,2,3,4", metavar="N[,N...]", help="of the student; default: %(default)s")
    parser.add_argument("--teacher-steps", default="50,25,8,4,2", metavar="N[,N...]", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=150, help="prompts, two seeds each; default: %(default)s")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="numbers to take instead of measuring quality now")
    parser.add_argument("--repeats", type=int, default=20, help="of the timing; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few images: does it run, not what it measures")
    parser.add_argument("--json", type=result_file, metavar="FILE")
    options = parser.parse_args()
    try:
        if options.count < 2 or options.repeats < 1:
            raise ConfigError("--count takes numbers from 2 on, --repeats from 1")
        report = run(
            options.student,
            options.teacher,
            steps=[1] if options.quick else parse_numbers("--steps", options.steps),
            teacher_steps=[2] if options.quick else parse_numbers("--teacher-steps", options.teacher_steps),
            count=2 if options.quick else options.count,
            repeats=1 if options.quick else options.repeats,
            evaluation_file=options.evaluation,
            report=lambda line: print(line, file=sys.stderr),
        )
        print(markdown(report["points"]))
        if options.json:
            write_whole(options.json, json.dumps(report, indent=2) + "\n")
    except (FlashdiffError, OSError) as error:
        print(f"quality.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
