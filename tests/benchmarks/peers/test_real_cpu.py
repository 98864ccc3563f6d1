"""The comparison at real size on a CPU: its table. The run itself takes minutes and an environment of its own."""

from benchmarks.peers.real_cpu import table


def test_the_table_compares_pipelines_at_equal_steps() -> None:
    measured = [
        {"model": model, "steps": steps, "stage": stage, "median_ms": median}
        for model, steps, stage, median in (
            ("flashdiff", 1, "denoise_step", 3000.0),
            ("flashdiff", 1, "total", 10_000.0),
            ("GenAI", 1, "total", 12_000.0),
            ("flashdiff", 4, "denoise_step", 3000.0),
            ("flashdiff", 4, "total", 20_000.0),
            ("GenAI", 4, "total", 30_000.0),
        )
    ]
    lines = table(measured).splitlines()
    assert lines[2:] == [
        "| flashdiff | 1 | 3000 | 10000 | 1.00x |",
        "| GenAI | 1 |  | 12000 | 1.20x |",
        "| flashdiff | 4 | 3000 | 20000 | 1.00x |",
        "| GenAI | 4 |  | 30000 | 1.50x |",
    ]
