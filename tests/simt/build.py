"""Compile kernel sources and the emulator into one shared library, and talk to it through ctypes.

    library = build(Path("scale_test.cpp"), folder, include=[Path("csrc")])
    library.configure(**SCHEDULES["random"])
    if not library.functions.run_scale(...):
        print(library.error())

Objects and libraries are kept in `folder` under the hash of what went into them, so a second call costs one
preprocessor run per source; several processes may share the folder.
"""

import ctypes
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = "async_copy clocks collective control faults fiber hooks launch memory order scheduler shadow symbols"
EMULATOR = [f"{name}.cpp" for name in NAMES.split()]

COMMON = ["-std=gnu++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas"]
EMULATOR_FLAGS = [*COMMON, "-O2"]
KERNEL_FLAGS = [
    *COMMON,
    "-Werror=undef",  # an #if on a macro of nvcc's would silently be 0
    "-fno-strict-aliasing",  # nvcc lets kernels read a bf16 pair as uint32_t
    "-ffp-contract=off",
    "-fno-tree-vectorize",
    "-ftrivial-auto-var-init=pattern",  # an accumulator never set to 0 is then wrong, not 0 by luck
]
HOOK_FLAGS = [
    "-fsanitize=thread,undefined",
    # vptr needs libubsan; the accesses themselves show a null or a wrapped pointer, and g++ is a fifth faster without
    "-fno-sanitize=vptr,null,pointer-overflow",
    "--param=tsan-instrument-func-entry-exit=0",
]
LINK_FLAGS = ["-shared", "-Wl,-Bsymbolic", f"-Wl,--version-script={HERE / 'exports.map'}"]
# What g++ makes of large copies, which -fsanitize=thread leaves to the runtime that is not linked.
CHECKED_CALLS = ["--redefine-sym=memcpy=simt_memcpy", "--redefine-sym=memmove=simt_memmove",
                 "--redefine-sym=memset=simt_memset"]  # fmt: skip

ORDERS = {"ascending": 0, "descending": 1, "breadth": 2, "random": 3}
# One warp far ahead from either end, with copies that land last or at any time, and one drawn schedule: each alone
# finds every bug of test_simt_bugs.py.
SCHEDULES: dict[str, dict[str, object]] = {
    "ascending-late": {"order": "ascending", "lazy_async": True},
    "descending-early": {"order": "descending", "lazy_async": False},
    "random": {"order": "random", "lazy_async": False, "seed": 7},
}


class Config(ctypes.Structure):
    """simt::Config of host.h, field by field."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("shadow", ctypes.c_bool),
        ("preempt", ctypes.c_int),
        ("lazy_async", ctypes.c_bool),
        ("early_exit_ok", ctypes.c_bool),
        ("max_steps", ctypes.c_uint64),
        ("multiprocessors", ctypes.c_int),
    )


class Stats(ctypes.Structure):
    """simt::Stats of host.h, field by field."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("switches", "accesses", "collectives", "barriers", "blocks"))


class Library:
    """A kernel library with its own emulator. `functions` is the ctypes library; what it exports is SIMT_EXPORT."""

    def __init__(self, path: Path, *, hooks: bool) -> None:
        self.path, self.hooks = path, hooks
        self.functions = ctypes.CDLL(str(path))
        for name, pointee in (("simt_config", Config), ("simt_stats", Stats)):
            getattr(self.functions, name).restype = ctypes.POINTER(pointee)
        self.functions.simt_error.restype = ctypes.c_char_p
        self.config: Config = self.functions.simt_config().contents
        self.stats: Stats = self.functions.simt_stats().contents
        self.configure()

    def configure(self, **fields: object) -> None:
        """Set fields of Config for the launches to come; those not named return to their defaults."""
        self.functions.simt_reset_config()
        self.config.shadow = self.hooks
        for name, value in fields.items():
            if name not in dict(Config._fields_):
                raise ValueError(f"no field {name!r} in Config; it has {', '.join(n for n, _ in Config._fields_)}")
            setattr(self.config, name, ORDERS[value] if name == "order" and isinstance(value, str) else value)

    def error(self) -> str:
        """Why the last launch failed; empty if it did not."""
        return self.functions.simt_error().decode()


def build(sources: Path | Sequence[Path], folder: Path, **options) -> Library:
    """Compile, link and load; options as in compile_library."""
    return Library(compile_library(sources, folder, **options), hooks=options.get("hooks", True))


def compile_library(
    sources: Path | Sequence[Path],
    folder: Path,
    *,
    hooks: bool = True,  # every load and store is judged; False: only schedules, poison and guard pages find bugs
    optimize: str = "-O1",
    include: Sequence[Path] = (),
    define: Mapping[str, object] | None = None,
    flags: Sequence[str] = (),  # more for the kernel sources; -fno-sanitize=signed-integer-overflow saves g++ much time
    parts: Sequence[str] = (),  # of this folder, beside EMULATOR: "hopper.cpp" for mbarrier, TMA and wgmma
    emulator_flags: Sequence[str] = (),  # for all sources, the emulator's too: -DSIMT_UCONTEXT
    jobs: int = 2,
) -> Path:
    """The shared library of the sources and the emulator, in `folder`. RuntimeError with g++'s text if it refuses."""
    sources = [sources] if isinstance(sources, Path) else list(sources)
    search = [f"-I{path}" for path in (HERE, *include)]
    defines = [f"-D{name}={value}" for name, value in (define or {}).items()]
    checks = HOOK_FLAGS if hooks else []
    kernel = [*KERNEL_FLAGS, *checks, optimize, *search, *defines, *flags, *emulator_flags]
    emulator = [*EMULATOR_FLAGS, *emulator_flags]
    with ThreadPoolExecutor(jobs) as pool:  # kernels first: they take longest
        kernels = pool.map(lambda path: _object(path, folder, kernel, CHECKED_CALLS if hooks else []), sources)
        own = pool.map(lambda name: _own_object(name, folder, tuple(emulator)), [*EMULATOR, *parts])
        objects = [*kernels, *own]
    stem = sources[0].stem
    target = folder / f"lib{stem}-{_digest(*LINK_FLAGS, *(path.name for path in objects))}.so"
    if not target.exists():
        _write(target, lambda out: _run("g++", *LINK_FLAGS, "-o", out, *objects, "-ldl"))
    return target


def _object(source: Path, folder: Path, flags: Sequence[str], rename: Sequence[str] = ()) -> Path:
    return _compile(source, folder, flags, rename, _source_digest(source, flags, rename))


def _own_object(name: str, folder: Path, flags: tuple[str, ...]) -> Path:
    return _compile(HERE / name, folder, flags, (), _own_digest(name, flags))


@cache
def _own_digest(name: str, flags: tuple[str, ...]) -> str:
    """The emulator does not change while a process runs: its sources are looked at once."""
    return _source_digest(HERE / name, flags)


def _source_digest(source: Path, flags: Sequence[str], rename: Sequence[str] = ()) -> str:
    return _digest(_compiler(), *flags, *rename, _run("g++", *flags, "-E", source))


def _compile(source: Path, folder: Path, flags: Sequence[str], rename: Sequence[str], digest: str) -> Path:
    target = folder / f"{source.stem}-{digest}.o"
    if not target.exists():

        def compile_to(out: Path) -> None:
            _run("g++", *flags, "-c", source, "-o", out)
            if rename:
                _run("objcopy", *rename, out)

        _write(target, compile_to)
    return target


@cache
def _compiler() -> str:
    return _run("g++", "--version")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


_counter = itertools.count()


def _write(target: Path, make) -> None:
    """Make the file under a name of our own and rename it: others see all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}-{next(_counter)}-{target.name}")
    try:
        make(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    if done.stderr:  # warnings
        print(done.stderr, file=sys.stderr)
    return done.stdout
