"""Quality against latency: one point for student and teacher at each number of steps.

    python benchmarks/quality.py --student STUDENT_BUNDLE --teacher TEACHER_BUNDLE --json quality.json

Quality is measured by `flashdiff evaluate`, and latency as by benchmarks/latency.py, for the same bundles in the same session.
With --evaluation, quality is read from FILE, which `flashdiff evaluate STUDENT --teacher TEACHER --json FILE` has written.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import latency
from benchmarks.command import command_parser, result_file, run_command, write_results
from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement
from flashdiff.config import parse_numbers
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import ConfigError
from flashdiff.evaluation.command import EvaluateOptions, evaluate
from flashdiff.evaluation.images import REAL

_METRICS = ("fid", "second_fid", "kid", "text", "diversity")


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
    """{"environment": ..., "points": [...], "real": the metrics of real images}.

    ConfigError for bundles that have one name in the evaluation, or that it lacks.
    """
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
        evaluation = read_evaluation(written)
    evaluated = [subject["name"] for subject in evaluation["rows"]]
    for model, counts in (("student", steps), ("teacher", teacher_steps)):
        if missing := [title for count in counts if (title := _title(names[model], count)) not in evaluated]:
            raise ConfigError(f"the evaluation has no row '{missing[0]}': it has {', '.join(evaluated)}")
    timed = latency.run(
        [(student, teacher)], batches=[1], repeats=repeats, report=report, steps=steps, teacher_steps=teacher_steps
    )
    real = next(subject for subject in evaluation["rows"] if subject["name"] == REAL)
    return {
        "environment": timed["environment"],
        "points": quality_points(evaluation, timed["rows"], names),
        "real": _metrics_of(real),
    }


def quality_points(evaluation: Mapping[str, Any], timed: Sequence[Measurement], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """A point for every timed number of steps, with its metrics as {value, low, high}.

    `names` are the bundles' folders by model: the evaluation's names for them.
    """
    subjects = {subject["name"]: subject for subject in evaluation["rows"]}
    points = []
    for total in (one for one in timed if one["stage"] == "total" and one["batch"] == 1):
        model, steps = total["model"], total["steps"]
        subject = subjects[_title(names[model], steps)]
        points.append({"model": model, "steps": steps, "median_ms": total["median_ms"], **_metrics_of(subject)})
    return points


def _title(name: str, steps: int) -> str:
    """The evaluation's name for a model at a number of steps."""
    return f"{name}, {steps} step{'s' if steps > 1 else ''}"


def _metrics_of(subject: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: subject.get(name) for name in _METRICS}  # files of before had no second distance
    return found | {name: subject["attributes"][name] for name in ("large", "small")}


def read_evaluation(file: Path) -> dict[str, Any]:
    """An evaluation's JSON; ConfigError for a file without KID, text score, attributes or the row of real images."""
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        has_all = all(subject["attributes"] and subject["kid"] and subject["text"] for subject in found["rows"])
        if has_all and any(subject["name"] == REAL for subject in found["rows"]):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f"{file}: not what `flashdiff evaluate --json` writes for two or more prompts of the embedded world, text score included"
    )


def quality_table(points: Sequence[Mapping[str, Any]]) -> str:
    """A line per point."""
    lines = []
    for point in points:
        values = (point["kid"]["value"], point["text"]["value"], 100 * point["large"]["value"], 100 * point["small"]["value"])
        lines.append([point["model"], point["steps"], f"{point['median_ms']:.1f}", *(f"{value:.1f}" for value in values)])
    return markdown_table(("model", "steps", "ms an image", "KID x1000", "text", "large, %", "small, %"), lines)


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--student", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--teacher", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--steps", default="1,2,3,4", metavar="N[,N...]", help="of the student; default: %(default)s")
    parser.add_argument("--teacher-steps", default="50,25,8,4,2", metavar="N[,N...]", help="default: %(default)s")
    parser.add_argument("--count", type=int, help="prompts, two seeds each; default: 150")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="read the quality from this file instead of measuring it")
    parser.add_argument("--repeats", type=int, default=20, help="of the timing; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few images: exercises the code, the numbers mean nothing")
    parser.add_argument("--json", type=result_file, metavar="FILE")
    options = parser.parse_args()
    return run_command("quality.py", lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    if options.evaluation and options.count is not None:
        raise ConfigError(f"--count {options.count}: --evaluation {options.evaluation} has its images; leave one of them out")
    count = 150 if options.count is None else options.count
    if count < 2 or options.repeats < 1:
        raise ConfigError("--count takes numbers from 2 on, --repeats from 1")
    results = run(
        options.student,
        options.teacher,
        steps=[1] if options.quick else parse_numbers("--steps", options.steps),
        teacher_steps=[2] if options.quick else parse_numbers("--teacher-steps", options.teacher_steps),
        count=2 if options.quick else count,
        repeats=1 if options.quick else options.repeats,
        evaluation_file=options.evaluation,
        report=lambda line: print(line, file=sys.stderr),
    )
    print(quality_table(results["points"]))
    write_results(options.json, results, indent=2)


if __name__ == "__main__":
    sys.exit(main())
