"""Instructions of the CPU kernels, held to tests/instructions.toml: what a timing on a busy machine cannot tell."""

import json
import os
import platform
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import instruction_counters as counters  # noqa: E402
import instructions as bench  # noqa: E402
import instructions_page  # noqa: E402
from instructions import BUILT, WORKS, Count  # noqa: E402
from machine_code import Instruction, decoding_loops, disassemble, innermost_loops, read, short_name  # noqa: E402

BUDGETS = tomllib.loads((ROOT / "tests" / "instructions.toml").read_text())


def check(what, *arguments):
    """Skip, and say why, where this machine cannot count, or compiles otherwise than the one the budgets are from."""
    try:
        what(*arguments)
    except OSError as error:
        pytest.skip(f"NOT CHECKED: {error}")
    if counters.compiler() != BUDGETS["compiler"]:
        pytest.skip(f"NOT CHECKED: budgets are for {BUDGETS['compiler']}, and this is {counters.compiler()}")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The driver with all codes of an instruction set, made once."""
    made = {}

    def of(isa):
        if isa not in made:
            made[isa] = counters.build(isa, BUILT, tmp_path_factory.mktemp(isa))
        return made[isa]

    return of


def over(counts):
    """Counts beyond their budgets, in words."""
    return {
        f"{one.isa} {one.work} {one.code}: {one.per_code:.3f} for {budget}"
        for one in counts
        if one.per_code > (budget := BUDGETS[one.isa][one.work][one.code])
    }


@pytest.mark.slow
@pytest.mark.parametrize("isa", bench.ISAS)
def test_no_verb_takes_more_instructions_than_its_budget(program, isa):
    check(counters.require_counter, isa)
    counts = bench.count(isa, program(isa), BUILT)
    assert {(one.work, one.code) for one in counts} == {
        (work, code) for work, row in BUDGETS[isa].items() for code in row
    }
    assert over(counts) == set(), (
        "a reason for more goes into the commit, with what bench/instructions.py --budgets says"
    )
    # scratch is asked for once a call, and nothing else of the C library is needed; two instructions a row of 128 codes
    # are OpenMP's
    assert [one for one in counts if one.kinds and abs(one.kinds["libraries"]) > 0.02] == []


@pytest.mark.slow
@pytest.mark.parametrize("isa", counters.TRAPPED)
def test_the_loops_that_decode_neither_spill_nor_call(program, isa):
    check(counters.require, "objdump")
    loops = list(decoding_loops(disassemble(program(isa)), isa))
    counted, budgets = bench.most(loops), BUDGETS["loops"][isa]
    assert counted.keys() == budgets.keys(), "run bench/instructions.py --budgets and look at what changed"
    assert {name: number for name, number in counted.items() if number > budgets[name]} == {}
    for kind in ("stack", "calls"):
        found, allowed = bench.most(loops, kind), BUDGETS[kind][isa]
        assert {name: number for name, number in found.items() if number > allowed.get(name, 0)} == {}, kind


@pytest.mark.slow
def test_both_counters_agree(program):
    check(counters.require_counter, "avx2")
    one_code = WORKS[:1] + WORKS[-3:]
    found = [bench.count("avx2", program("avx2"), BUILT[:1], one_code, how) for how in ("callgrind", "trap")]
    assert [one.per_code for one in found[1]] == pytest.approx([one.per_code for one in found[0]], rel=1e-3)


@pytest.mark.slow
def test_a_shuffle_more_per_vector_is_over_the_budget(tmp_path):
    check(counters.require_counter, "avx2")
    shutil.copytree(counters.TEMPLATES, tmp_path / "csrc")
    vectors = tmp_path / "csrc" / "qft" / "cpu" / "isa" / "avx2.h"
    text = vectors.read_text()
    changed, times = re.subn(r"_mm256_fmadd_ps\((a\.\w+)", r"_mm256_fmadd_ps(_mm256_permute_ps(\1, 0x1b)", text)
    assert times == 2  # halves of a vector
    vectors.write_text(changed)
    works = [work for work in WORKS if work.verb == "matmul_t"]
    counts = bench.count("avx2", counters.build("avx2", ["nf4"], tmp_path, tmp_path / "csrc"), ["nf4"], works)
    assert len(over(counts)) == len(works)


# ------------------------------------------------------------------------------------------------ reading objdump

DUMP = """
instructions:     file format elf64-x86-64

Disassembly of section .text:

0000000000001000 <void qft::avx512::matmul<qft::avx512::nf4>(qft::MatmulArgs const&) [clone ._omp_fn.0]>:
    1000:	push   rbp
    1001:	mov    rbp,rsp
    1004:	vmovups zmm0,ZMMWORD PTR [rax]        # 2000 <table>
    100a:	vpermps zmm1,zmm2,zmm0
    1010:	vfmadd231ps zmm3,zmm1,ZMMWORD PTR [rbx+rsi*4]
    1017:	jne    100a <void qft::avx512::matmul<qft::avx512::nf4>(qft::MatmulArgs const&) [clone ._omp_fn.0]+0xa>
    1019:	vmovaps ZMMWORD PTR [rbp-0x50],zmm3
    101e:	rep stos QWORD PTR es:[rdi],rax
    1020:	jl     1004 <void qft::avx512::matmul<qft::avx512::nf4>(qft::MatmulArgs const&) [clone ._omp_fn.0]+0x4>
    1022:	call   3000 <GOMP_loop_end@plt>
    1027:	ret

0000000000001030 <main>:
    1030:	prefetcht0 BYTE PTR [rsp+0x8]
    1035:	vmovss xmm0,DWORD PTR [rbp+0x4]
    103a:	jmp    1004 <elsewhere>
"""


def test_what_objdump_prints_is_read():
    functions = read(DUMP)
    code, main = functions.values()
    assert [one.name for one in code[2:5]] == ["vmovups", "vpermps", "vfmadd231ps"]
    assert [one.kinds for one in code] == [
        (),
        (),
        ("loads",),
        ("shuffles",),
        ("products", "loads"),
        (),
        ("stores", "stack"),
        ("loads",),
        (),
        ("calls",),
        (),
    ]
    assert [one.kinds for one in main] == [(), ("loads",), ()]  # rbp is any register there
    assert code[7] == Instruction(0x101E, "stos", "QWORD PTR es:[rdi],rax")


def test_the_loop_inside_a_loop_is_found():
    (name, code), (_, main) = read(DUMP).items()
    (loop,) = innermost_loops(name, code)
    assert [one.address for one in loop.body] == [0x100A, 0x1010, 0x1017]
    assert (loop.count("products"), loop.count("shuffles")) == (1, 1)
    assert innermost_loops("main", main) == []
    assert list(decoding_loops(read(DUMP), "avx512")) == []  # one product is no block of codes
    assert bench.most([loop, loop]) == {"matmul<nf4>, 1 products": 3}


@pytest.mark.parametrize(
    ("function", "short"),
    [
        (
            "void qft::avx512::matmul_shifted<qft::avx512::nf4, false>(qft::MatmulArgs const&)",
            "matmul_shifted<nf4, false>",
        ),
        ("qft::avx2::MatmulTile<qft::avx2::nf4, 2, true>::run()", "MatmulTile<nf4, 2, true>::run"),
        ("qft::avx2::Table<4>::operator()(int) const [clone .cold]", "Table<4>::operator()"),
        ("main", "main"),
    ],
)
def test_functions_have_short_names(function, short):
    assert short_name(function) == short


# ------------------------------------------------------------------------------------------- budgets and the page

COUNTS = [
    Count("avx2", "nf4", "matmul M=1", 1.0),
    Count("avx2", "int4", "matmul M=1 zero", 123.0),
    Count("avx512", "nf4", "matmul M=1", 0.25, {"products": 0.0625, "libraries": 0.0}),
]


def test_budgets_read_back_with_five_per_cent_added():
    (loop,) = innermost_loops(*next(iter(read(DUMP).items())))
    found = tomllib.loads(bench.budgets(COUNTS, {"avx512": [loop]}, "gcc 12"))
    assert found == {
        "compiler": "gcc 12",
        "loops": {"avx512": {"matmul<nf4>, 1 products": 3}, "avx512_bf16": {}},
        "stack": {"avx512": {}, "avx512_bf16": {}},
        "calls": {"avx512": {}, "avx512_bf16": {}},
        "avx2": {"matmul M=1": {"nf4": 1.05}, "matmul M=1 zero": {"int4": 129.2}},
        "avx512": {"matmul M=1": {"nf4": 0.2625}},
    }


def test_a_machine_that_cannot_count_says_why(monkeypatch):
    with pytest.raises(counters.MissingError, match="no-such-tool is not on the PATH"):
        counters.require("no-such-tool")
    monkeypatch.setattr(counters, "NEEDED", {"avx512": {"avx1024"}})
    monkeypatch.setattr(shutil, "which", lambda name: name)
    if platform.system() == "Linux":
        with pytest.raises(counters.MissingError, match="this processor has no avx1024, so its avx512 kernels"):
            counters.require_counter("avx512")
    monkeypatch.setattr(platform, "system", lambda: "Plan9")
    with pytest.raises(counters.MissingError, match="on Linux on x86-64; this is Plan9"):
        counters.require()


def test_an_object_older_than_its_sources_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(counters, "ROOT", tmp_path)
    monkeypatch.setattr(counters, "TEMPLATES", tmp_path / "csrc")
    built = tmp_path / "build" / "cmake-1" / "CMakeFiles" / "kernels_avx2.dir" / "emitted" / "nf4.cpp.o"
    sources = [tmp_path / "csrc" / "a.h", tmp_path / "qft" / "compiler" / "emit.py", tmp_path / "qft" / "format.py"]
    for path in (*sources, built):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in sources:
        os.utime(path, (1, 1))
    assert counters.built_object("nf4", "avx2") == built
    assert counters.built_object("nf3", "avx2") is None
    os.utime(sources[0])
    os.utime(built, (2, 2))
    assert counters.built_object("nf4", "avx2") is None


def test_the_page_shows_the_counts_or_says_there_are_none(tmp_path):
    assert "not counted yet" in instructions_page.section(tmp_path)
    loops = innermost_loops(*next(iter(read(DUMP).items())))
    run = bench.report(COUNTS, {"scalar": "valgrind is not on the PATH"}, {"avx2": [], "avx512": loops})
    (tmp_path / instructions_page.NAME).write_text(bench.spelled(run))
    assert json.loads(bench.spelled(run)) == run
    text = instructions_page.section(tmp_path)
    assert "| matmul M=1 | 1.00 |  |\n| matmul M=1 zero |  | 123.00 |" in text
    assert "| matmul M=1 | 0.250 | 0.062 | 0.000 |" in text
    assert "scalar was not counted: valgrind is not on the PATH" in text
    assert re.search(r"gcc|clang", text)
