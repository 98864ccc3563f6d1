"""The report's sentences: what the measurements say about speed and quality."""

from collections.abc import Mapping

from benchmarks.reporting.result_files import Results
from benchmarks.timing.speedup import of_main_backend


def claims(results: Results) -> list[str]:
    """A sentence per claim, as far as the results have what it needs."""
    return [*_speed_claims(results), *_quality_claims(results)]


def _speed_claims(results: Results) -> list[str]:
    sentences = []
    timed = of_main_backend(results.latency)
    totals = {(one["model"], one["steps"]): one for one in timed if one["stage"] == "total" and one["batch"] == 1}
    teacher = max((total for (model, _), total in totals.items() if model == "teacher"), key=lambda t: t["steps"], default=None)
    for steps in (4, 2):
        student = totals.get(("student", steps))
        if student and teacher:
            speed, ideal = teacher["median_ms"] / student["median_ms"], teacher["nfe"] / student["nfe"]
            sentences.append(
                f"{steps} steps take {student['median_ms']:.1f} ms where the teacher's {teacher['steps']} guided ones take "
                f"{teacher['median_ms']:.0f} ms: {speed:.1f} times as fast, {speed / ideal:.2f} of the ideal {ideal:.0f}."
            )
    for (model, steps), stock in totals.items():
        if model.startswith("diffusers") and ("student", steps) in totals and steps == 4:
            ratio = stock["median_ms"] / totals["student", steps]["median_ms"]
            sentences.append(
                f"The same {steps} steps in stock {model} take {stock['median_ms']:.1f} ms, {ratio:.1f} times as long."
            )
    return sentences


def _quality_claims(results: Results) -> list[str]:
    sentences = []
    points = {(point["model"], point["steps"]): point for point in results.quality.get("points", ())}
    for steps in (4, 2):
        if ("student", steps) in points and ("teacher", 50) in points:
            pair = (points["student", steps], points["teacher", 50])
            kid, real = [point["kid"] for point in pair], results.quality["real"]["kid"]
            text, large = ([point[name]["value"] for point in pair] for name in ("text", "large"))
            sentences.append(
                f"At {steps} steps the kernel distance to real images (KID x1000) is {_with_interval(kid[0])}; the 50-step "
                f"teacher's is {_with_interval(kid[1])}, other real images' {_with_interval(real)}. The text score is "
                f"{text[0]:.1f} (teacher {text[1]:.1f}), large attributes are right on {100 * large[0]:.1f} % "
                f"({100 * large[1]:.1f} %) of the images."
            )
    return sentences


def _with_interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.1f} ({estimate['low']:.1f} to {estimate['high']:.1f})"
