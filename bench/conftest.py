"""What the machine can do, measured once a run, and how far each microbenchmark is from it: beside pytest-benchmark's
own table, and in its JSON as extra_info."""

import pytest

from qft.speed import limits, roofline

ROUNDS = 10  # calls that a limit is the fastest of


def pytest_configure(config):
    config.rooflines = []


@pytest.fixture(scope="session")
def machine_limits(request):
    """Bytes and operations per second; measured in this run."""
    request.config.limits = limits.limits(ROUNDS)
    return request.config.limits


@pytest.fixture
def of_roofline(request, machine_limits):
    """Notes how near a benchmark that has run came to what the machine allows."""

    def note(benchmark, work):
        if benchmark.disabled:
            return
        median = benchmark.stats.stats.median
        info = {
            "bytes_per_s": work.nbytes / median,
            "percent_of_roofline": roofline.percent(work, median, machine_limits),
            "bound_by": roofline.bound(work, machine_limits)[1],
            "limits": machine_limits,
        }
        benchmark.extra_info.update(info)
        request.config.rooflines.append((benchmark.name, median, {**benchmark.extra_info}))

    return note


def pytest_terminal_summary(terminalreporter, config):
    if not config.rooflines:
        return
    terminalreporter.section("of roofline (warm caches)")
    found = config.limits
    terminalreporter.line(
        f"measured: read {found['read'] / 1e9:.1f}, write {found['write'] / 1e9:.1f}, copy {found['copy'] / 1e9:.1f} "
        f"GB/s; bf16 {found['bf16'] / 1e12:.3g}, f32 {found['f32'] / 1e12:.3g} TFLOP/s"
    )
    for name, median, info in config.rooflines:
        terminalreporter.line(
            f"{name.partition('[')[2].rstrip(']'):75} {1e3 * median:9.3f} ms {info['bytes_per_s'] / 1e9:7.1f} GB/s "
            f"{info['percent_of_roofline']:4.0f} % {info['bound_by']:10} error {info['relative_error']:.1g}  "
            f"{info['kernel']}"
        )
