"""Microbenchmarks of every verb next to bitsandbytes and dense torch: `make bench`, some minutes.

Each case is compared with the reference before it is timed. Caches are warm here, as pytest-benchmark repeats one call:
a weight that fits in the cache can pass its roofline, which is that of memory. `python bench/speed.py` times cases in
turn with cold caches, and its figures are the ones reported.
"""

import pytest
from contenders import UnavailableError, prepare
from experiments import MICROBENCHMARKS

# Equal work side by side in the report, and equal weights one after the other: they are made once.
CASES = sorted(MICROBENCHMARKS, key=lambda case: (case.shape, case.dtype, case.fmt or "", case.who))


@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.work}: {case.name}")
def test_verb(benchmark, case, of_roofline):
    benchmark.group = case.work
    try:
        ready = prepare(case)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    benchmark(ready.call)
    benchmark.extra_info.update(kernel=ready.kernel or case.who, relative_error=ready.error, weight_bytes=ready.nbytes)
    of_roofline(benchmark, ready.work)
