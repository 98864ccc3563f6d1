"""The README's table of speeds, between two comments that mark its place."""

import re

from benchmarks.environment import describe_machine
from benchmarks.reporting.result_files import Results
from benchmarks.timing.speedup import ideal_gaps, of_main_backend, speedup_table
from flashdiff.errors import ConfigError

_REGION = re.compile(r"(<!-- speed: .*? -->\n).*?(<!-- /speed -->)", re.DOTALL)


def replace_speed_table(readme: str, results: Results, link: str) -> str:
    """The README with a new table of speeds, which links to its result file; ConfigError for a README without the comments."""
    if not _REGION.search(readme):
        raise ConfigError("the README has no lines `<!-- speed: ... -->` and `<!-- /speed -->` to write the table between")
    measurements = [one for one in results.latency if one["batch"] == 1]
    if not measurements:
        raise ConfigError("the README's table needs measurements of latency.py at batch 1")
    measurements = of_main_backend(measurements)
    gaps = {(gap.total["model"], gap.total["steps"]): gap for gap in ideal_gaps(measurements)}
    rest = "\n".join(
        f"With {steps} steps the student has {gap.share_of_ideal:.2f} of the ideal: of its {gap.total['median_ms']:.1f} ms, "
        f"{gap.fixed:.1f} are text, decoding and PNG,\n"
        f"and {gap.evaluations:.1f} what its evaluations cost more one by one than in the teacher's guided pairs."
        for steps in (4, 2)
        if (gap := gaps.get(("student", steps)))
    )
    where = f"{describe_machine(results.environment)}, {measurements[0]['precision']}"
    caption = (
        f"*Medians of {measurements[0]['n']} interleaved runs on {where}; prompt to PNG bytes, in\n"
        f"milliseconds ([rows]({link})). Ideal is the ratio of network\n"
        f"evaluations.\n{rest}*"
    )
    return _REGION.sub(lambda found: f"{found[1]}\n{speedup_table(measurements)}\n\n{caption}\n{found[2]}", readme)
