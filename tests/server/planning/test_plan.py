"""How many devices a load needs."""

import pytest
from simulated import RISING, costs_of

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import ConfigError
from flashdiff.server.planning import plan as planning
from flashdiff.server.planning.plan import Demand, forecast, full_batches_s, plan

FAKE = FakeComponents()
COSTS = costs_of(FAKE, RISING, {1: 1.0, 2: 1.5, 4: 2.5})
SIZE = FAKE.spec.sizes[0]


@pytest.fixture(autouse=True)
def few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "REQUESTS", 300)


def demand(rate: float = 200.0, p99_s: float = 0.1, **changes: object) -> Demand:
    return Demand(**{"rate": rate, "p99_s": p99_s, "mix": {2: 0.5, 4: 0.5}, "size": SIZE, **changes})  # type: ignore[arg-type]


def test_the_plan_is_the_fewest_devices_that_are_in_time() -> None:
    lines: list[str] = []
    found = plan(FAKE, [COSTS], demand(), lines.append)
    assert found == forecast(FAKE, [COSTS], demand(), found.devices)
    assert forecast(FAKE, [COSTS], demand(), found.devices - 1) is None
    assert found.in_time >= 0.99
    assert (found.latency_ms["p50"] or 0) < (found.latency_ms["p99"] or 0) <= 100
    assert 0 < found.utilization < 1
    assert found.refused == 0
    assert any(line == f"{found.devices - 1} devices: too few" for line in lines)


def test_more_is_needed_for_a_higher_rate_and_for_a_lower_p99() -> None:
    devices = [plan(FAKE, [COSTS], one, lambda line: None).devices for one in (demand(), demand(rate=400.0), demand(p99_s=0.035))]
    assert devices[0] < devices[1]
    assert devices[0] < devices[2]


def test_devices_whose_queue_grows_are_too_few_even_if_nothing_is_late_yet() -> None:
    patient = demand(p99_s=1000.0)
    found = plan(FAKE, [COSTS], patient, lambda line: None)
    assert found.devices > patient.rate * full_batches_s(FAKE, COSTS, patient)


def test_too_few_devices_refuse_what_has_a_deadline() -> None:
    found = forecast(FAKE, [COSTS], demand(timeout_s=0.1), 1, to_the_end=True)
    assert found
    assert set(found.refusals) == {"DeadlineError"}
    assert sum(found.refusals.values()) == pytest.approx(found.refused * found.requests)
    assert found.utilization > 0.9


def test_files_wait_for_the_two_threads_of_a_server() -> None:
    """200 files a second of 9.5 ms each keep 1.9 threads busy, so with two some wait; more need further servers."""
    lines: list[str] = []
    ample = forecast(FAKE, [COSTS], demand(files_s=0.0095), 20, servers=2, to_the_end=True)
    alone = forecast(FAKE, [COSTS], demand(files_s=0.0095), 20, to_the_end=True)
    assert ample
    assert alone
    assert (ample.latency_ms["p99"] or 0) + 9.5 < (alone.latency_ms["p99"] or 0)
    assert plan(FAKE, [COSTS], demand(files_s=0.0195), lines.append).servers == 3
    assert lines[0] == "writing files keeps 3.9 threads busy, and a server has 2: 3 servers"
    assert plan(FAKE, [COSTS], demand(files_s=0.001), print).servers == 1


def test_the_fastest_of_unequal_devices_decides_the_least_time() -> None:
    slow = {key: {batch: 20 * ms for batch, ms in by_batch.items()} for key, by_batch in COSTS.items()}
    assert plan(FAKE, [COSTS, slow], demand(rate=20.0, timeout_s=0.1), lambda line: None).in_time >= 0.99


def test_slower_devices_need_more() -> None:
    slow = {key: {batch: 2 * ms for batch, ms in by_batch.items()} for key, by_batch in COSTS.items()}
    fast, mixed = (plan(FAKE, costs, demand(), lambda line: None).devices for costs in ([COSTS], [COSTS, slow]))
    assert fast < mixed


def test_a_p99_below_what_an_idle_device_takes_is_refused_with_the_least_one() -> None:
    with pytest.raises(ConfigError, match=r"^--p99 0\.01: a request of 4 steps takes 0\.022 s on an idle device"):
        plan(FAKE, [COSTS], demand(p99_s=0.01), print)
    rare = {2: 0.995, 4: 0.005}  # of which the 99th percentile knows nothing
    with pytest.raises(ConfigError, match=r"a request of 2 steps takes 0\.012 s"):
        plan(FAKE, [COSTS], demand(p99_s=0.01, mix=rare), print)


def test_a_timeout_that_no_device_can_keep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--timeout 0\.01: a request of 4 steps takes 0\.022 s"):
        plan(FAKE, [COSTS], demand(timeout_s=0.01), print)


def test_a_rate_for_more_devices_than_are_simulated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--rate 1e\+06: this takes more than 1000 devices"):
        plan(FAKE, [COSTS], demand(rate=1e6), print)
