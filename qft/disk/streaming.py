"""Quantize a checkpoint that is larger than memory: one tensor is read, quantized and written at a time.

A thread reads ahead, another writes and takes checksums. What is finished stays finished: while it runs, `out` holds

    .qft-streaming/command.json    the settings, which a later start must share
    .qft-streaming/journal.jsonl   a line per layer that is written: its checksums, errors and the random state after it
    .qft-streaming/files/          the files of the model; those of tensors have their final size from the beginning

and no qft.json, so that nobody takes it for a model. At the end the files appear in `out` as one.
"""

from __future__ import annotations

import base64
import copy
import json
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..format import Format
from ..measure.calibration import Calibration
from ..model.layer_report import Report, report
from ..model.progress import bar
from ..model.surgery import choose_targets, replace_target, settle_tie
from ..model.targets import Target
from ..nn.experts import QuantExperts
from ..nn.packed import Packed, empty
from ..tensor import QuantTensor
from . import checkpoint, files, io
from .dense_checkpoint import DenseCheckpoint, Entry
from .described import describe
from .manifest import NAME
from .read_ahead import Loaded, ReadAhead, Span
from .shards import Described, Layout, ShardWriter, lay_out
from .tensor_file import DTYPE_NAMES, Stored, content_of

SHARD_BYTES = 2_000_000_000  # of one file of tensors: a reader that maps files has one of them resident at a time
PIECE = 1 << 25  # bytes that are copied at a time of a tensor that stays as it is
BEHIND = 2  # jobs that wait to be written
AT_ONCE = 2  # layers of a plain start that are quantized side by side
_Made = tuple[dict[str, Tensor], dict[str, Any] | None]
COMMAND, JOURNAL, FILES = "command.json", "journal.jsonl", "files"


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    fmt: Format | str | None,
    init: str = "plain",
    rank: int = 0,
    alpha: float | None = None,
    *,
    iters: int | None = None,
    calibration: str | Path | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    skip: Iterable[str] = (),
    formats: Mapping[str, Format | str] | None = None,
    dtype: str = "auto",
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Report:
    """Quantize the causal language model in a directory into another, layer by layer.

    What is written is what `qft.save` writes of `qft.quantize_model`, bit for bit, in files of `shard_bytes`. Memory
    holds the largest layer a few times: read ahead, as the start needs it, quantized. Interrupted, the same call goes
    on at the layer where it was.

    Args:
        source: written by transformers' save_pretrained, as safetensors.
        out: a new directory, or that of a call to go on with.
        fmt, init, rank, alpha, iters, dropout, rslora, skip, formats: as in `qft.quantize_model`; init by name.
        calibration: directory of `qft.calibrate`, for a start that uses activations.
        dtype: of what is not quantized: "auto" (the file's), "float32", "bfloat16" or "float16".
        tokenizer: a transformers tokenizer to save beside it.
        shard_bytes: a file of tensors that would become longer is followed by another.
        progress: draw a progress bar with the time left on stderr.

    Returns:
        What was quantized and what was not.

    Raises:
        ValueError: as `qft.quantize_model`; or `out` holds a run with other settings.
        FormatError: the source's files are damaged or of another kind, or a spelling is no format.
        FileExistsError: `out` holds something else.
        OSError: there is no model, or its disk is too small for `out`: said before anything is written.
    """
    source, out = Path(source), Path(out)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} holds no tensor; use 1 or more")
    if fmt is None and not formats:
        raise ValueError(f"{source} is not quantized; name a format, for example 'nf4 g64 f32'")
    skip = tuple(skip)
    spelled = {pattern: str(Format.parse(one)) for pattern, one in (formats or {}).items()}
    settings = {
        "source": str(source.resolve()),
        "format": None if fmt is None else str(Format.parse(fmt)),
        "init": init,
        "rank": rank,
        "alpha": alpha,
        "iters": iters,
        "dropout": dropout,
        "rslora": rslora,
        "formats": spelled,
        "skip": [*skip],
        "calibration": None if calibration is None else str(Path(calibration).resolve()),
        "dtype": dtype,
        "shard_bytes": shard_bytes,
    }
    if out.is_dir():
        files.settle(out)
        if (out / NAME).is_file():  # killed between its last two steps
            shutil.rmtree(out / files.STREAMING, ignore_errors=True)
    if not (out / files.STREAMING).is_dir():
        checkpoint.refuse_to_overwrite(out)
    dense = DenseCheckpoint(source, dtype)
    model = dense.model
    moments = None if calibration is None else Calibration.load(calibration)
    targets = choose_targets(model, fmt, init, rank, iters, moments, skip, spelled, values=False)
    jobs = _plan(dense, targets, rank, alpha, dropout, rslora)
    run = _Run(out / files.STREAMING, jobs, lay_out([job.tensors for job in jobs], shard_bytes))
    run.refuse_small_disk()
    checkpoint.claim(run.folder / COMMAND, settings | {"files": dense.files})
    start = partial(
        replace_target, init=init, rank=rank, alpha=alpha, iters=iters, calibration=moments, dropout=dropout,
        rslora=rslora,
    )  # fmt: skip
    plain = init == "plain"
    with _threads(1 if plain else torch.get_num_threads()):
        run.write(model, start, AT_ONCE if plain and not rank else 1, progress)  # factors are drawn in turn
    run.finish(model, tokenizer)
    return report(model)


# ------------------------------------------------------------------------------------------------ what is to be done


@dataclass(frozen=True)
class _Job:
    """What is read and written together: a layer to quantize, or one tensor that stays as it is.

    Attributes:
        name: of the layer, or of the tensor.
        tensors: what is written, by name.
        sources: where the dense values are and what they are called there, by their names in the layer; of a tensor
            that stays, under its own.
        value: the tensor, where it is in no file.
        target: the layer; None for a tensor that stays.
        planned: the packed layer, without values.
        first: the planned layer whose packed weight this one shares, or None.
    """

    name: str
    tensors: dict[str, Described]
    sources: dict[str, tuple[Entry, str]]
    value: Tensor | None = None
    target: Target | None = None
    planned: Packed | None = None
    first: Packed | None = None


def _plan(
    dense: DenseCheckpoint, targets: Iterable[Target], rank: int, alpha: float | None, dropout: float, rslora: bool
) -> list[_Job]:
    """Put packed layers without values into the model; what is to be done for each of its tensors, in its own order."""
    held = {id(value): (dense.entries[name], name) for name, value in _state(dense.model) if name in dense.entries}
    shared: dict[tuple[int, Format], Packed] = {}
    owners: dict[str, _Job] = {}
    for target in targets:
        stays = {id(value) for _, value in _state(target.module)}
        first = shared.get(_sharing(target))
        planned = replace_target(target, _without_values, rank, alpha, dropout=dropout, rslora=rslora, shared=shared)
        sources = {} if first else {name: held[id(target.module._parameters[name])] for name in target.weights}
        job = _Job(target.path, {}, sources, None, target, planned, first)
        owners |= {f"{target.path}.{name}": job for name, value in _state(planned) if id(value) not in stays}
    settle_tie(dense.model)
    jobs: dict[str, _Job] = {}
    for name, tensor in io.stored_tensors(dense.model)[0].items():
        if name in owners:
            job = jobs.setdefault(owners[name].name, owners[name])
        else:
            found = held.get(id(tensor))
            job = jobs.setdefault(name, _Job(name, {}, {name: found} if found else {}, None if found else tensor))
        job.tensors[name] = tensor.dtype, tuple(tensor.shape)
    return list(jobs.values())


def _sharing(target: Target) -> tuple[int, Format]:
    """What `replace_target` knows layers by that share a weight."""
    return id(getattr(target.module, target.weights[0])), target.fmt


def _state(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and persistent buffers themselves, by name."""
    return module.state_dict(keep_vars=True).items()


def _without_values(
    weight: Tensor, fmt: Format, rank: int, alpha: float | None = None
) -> tuple[QuantTensor, Tensor, Tensor]:
    """A start that gives a weight its shapes alone."""
    q: Any = empty(fmt, tuple(weight.shape), "meta")
    return q, torch.empty(rank, weight.shape[1], device="meta"), torch.empty(weight.shape[0], rank, device="meta")


@dataclass(frozen=True)
class _Read:
    """What is read together: all that a job needs, or a piece of the tensor that it copies."""

    job: _Job
    spans: tuple[Span, ...]
    last: bool = True


def _reads(jobs: Iterable[_Job]) -> Iterator[_Read]:
    for job in jobs:
        places = [place for entry, _ in job.sources.values() for _, _, place in entry.parts]
        if job.target is not None or any(entry.converter is not None for entry, _ in job.sources.values()):
            yield _Read(job, tuple((place, 0, place.nbytes) for place in places))
        elif not places:
            yield _Read(job, ())
        else:
            end = places[0].nbytes
            for start in range(0, max(end, 1), PIECE):
                yield _Read(job, ((places[0], start, min(start + PIECE, end)),), start + PIECE >= end)


# ------------------------------------------------------------------------------------------------ doing it


@dataclass
class _Run:
    """A call's folder while it runs.

    Attributes:
        folder: `.qft-streaming` in the directory of the model.
        jobs: all there is to do.
        layouts: of the files of tensors.
        lines: of the journal: what is done, in the order of the jobs.
        shards: the files of tensors, once they are written.
    """

    folder: Path
    jobs: list[_Job]
    layouts: list[Layout]
    lines: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[str, Any] = field(default_factory=dict)

    def refuse_small_disk(self) -> None:
        """Raise OSError where the files do not fit on the disk."""
        there = [path.stat() for path in (self.folder / FILES).glob("*.safetensors")]
        taken = sum(getattr(stat, "st_blocks", 0) * 512 for stat in there)  # files have holes until they are whole
        needed = sum(layout.size for layout in self.layouts) - taken
        free = shutil.disk_usage(next(path for path in self.folder.absolute().parents if path.is_dir())).free
        if needed > free:
            raise OSError(
                f"{self.folder.parent} needs {needed / 1e9:.3f} GB and its disk has {free / 1e9:.3f} GB free; make "
                "room, name a directory on another disk, or take a format of fewer bits"
            )

    def write(self, model: Any, start: Callable[..., Packed], at_once: int, progress: bool) -> None:
        """Do the jobs, `at_once` of them at a time, those excepted that an earlier call has done."""
        (self.folder / FILES).mkdir(exist_ok=True)
        layers = sum(job.target is not None for job in self.jobs)
        with ShardWriter(self.folder / FILES, self.layouts) as writer, bar(progress, layers) as advance:
            self._recover(writer)
            for job in self.jobs[: len(self.lines)]:
                if job.target is not None:
                    advance(job.name)
            reads = list(_reads(self.jobs[len(self.lines) :]))
            waiting: deque[Future[None]] = deque()
            with (
                open(self.folder / JOURNAL, "ab", buffering=0) as journal,
                closing(iter(ReadAhead([read.spans for read in reads]))) as loads,
                ThreadPoolExecutor(1, "qft-write") as pool,
                closing(_in_turn(partial(_values, model=model, start=start), reads, loads, at_once)) as made,
            ):
                drawn = torch.get_rng_state()
                for read, values, line, release in made:
                    if line is not None and not torch.equal(torch.get_rng_state(), drawn):
                        drawn = torch.get_rng_state()
                        line["random"] = _spelled(drawn)
                    waiting.append(pool.submit(self._store, writer, journal, values, line, release))
                    del values
                    if len(waiting) > BEHIND:
                        waiting.popleft().result()
                    if read.job.target is not None:
                        advance(read.job.name)
                for stored in waiting:
                    stored.result()
            self.shards = writer.shards()

    def _store(
        self,
        writer: ShardWriter,
        journal: Any,
        values: Mapping[str, Tensor],
        line: dict[str, Any] | None,
        release: Callable[[], None],
    ) -> None:
        """Write tensors, or the next piece of one; then a line for the job that they complete."""
        sums = {name: writer.write(name, content_of(tensor)) for name, tensor in values.items()}
        release()
        if line is not None:
            line["tensors"] = sums
            journal.write(json.dumps(line).encode() + b"\n")
            self.lines.append(line)

    def _recover(self, writer: ShardWriter) -> None:
        """Take over what the journal says is done and the files hold as it says; the rest is forgotten."""
        path = self.folder / JOURNAL
        found = list(_journal(path))
        begin = found[0] if found else {"job": "", "random": _spelled(torch.get_rng_state())}
        for job, line in zip(self.jobs, found[1:], strict=False):
            fits = (line["job"], [*line["tensors"]]) == (job.name, [*job.tensors])
            if not fits or not writer.recovered(line["tensors"]):
                break
            self.lines.append(line)
            _note(job.planned, line)
        drawn = next(line["random"] for line in reversed([begin, *self.lines]) if "random" in line)
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(drawn)), dtype=torch.uint8))
        with files.replace_file(path) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in (begin, *self.lines)))

    def finish(self, model: Any, tokenizer: Any) -> None:
        """Write all but the tensors, and let everything appear as one."""
        folder = self.folder / FILES
        for path in folder.iterdir():  # of a call that was killed here
            if path.name not in self.shards:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        described = {name: one for job in self.jobs for name, one in job.tensors.items()}
        tensors = {
            name: Stored(DTYPE_NAMES[described[name][0]], described[name][1], sha256)
            for line in self.lines
            for name, sha256 in line["tensors"].items()
        }
        orders = {name: tuple(order) for line in self.lines for name, order in line["orders"].items()}
        if len(self.shards) > 1:
            homes = {name: file for file, shard in self.shards.items() for name in shard.tensors}
            size = sum(stop - start for layout in self.layouts for start, stop in layout.spans.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))}
            (folder / io.INDEX).write_text(json.dumps(index, indent=2))
        _, tied = io.stored_tensors(model)
        io.write_description(model, folder, describe(model), tensors, tied, orders, tokenizer, shards=self.shards)
        files.commit(folder, self.folder.parent)
        shutil.rmtree(self.folder)


def _in_turn(
    make: Callable[[_Read, Sequence[Tensor]], _Made], reads: Iterable[_Read], loads: Iterable[Loaded], at_once: int
) -> Generator[tuple[_Read, dict[str, Tensor], dict[str, Any] | None, Callable[[], None]], None, None]:
    """What is made of each read, in their order, and what to call once it is written; `at_once` are worked on."""
    waiting: deque[tuple[_Read, Future[_Made], Callable[[], None]]] = deque()
    with ThreadPoolExecutor(at_once, "qft-quantize") as pool:
        for one, (tensors, free) in zip(reads, loads, strict=True):
            waiting.append((one, pool.submit(make, one, tensors), free))
            if len(waiting) == at_once:
                read, made, release = waiting.popleft()
                yield read, *made.result(), release
        for read, made, release in waiting:
            yield read, *made.result(), release


def _values(
    read: _Read, tensors: Sequence[Tensor], model: nn.Module, start: Callable[..., Packed]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """What is written of what was read, and the job's line of the journal if that completes it."""
    job = read.job
    line: dict[str, Any] = {"job": job.name, "orders": {}}
    if job.target is not None and job.planned is not None:
        made = _quantized(job, job.target, job.planned, tensors, model, start, line)
    elif job.value is not None:
        made = {job.name: job.value}
    else:
        ((entry, name),) = job.sources.values()
        made = {job.name: entry.made(model, tensors)[name].to(job.tensors[job.name][0])}
    line["orders"] = {name: order for name, tensor in made.items() if (order := io.memory_order(tensor))}
    return made, line if read.last else None


def _quantized(
    job: _Job,
    target: Target,
    planned: Packed,
    tensors: Sequence[Tensor],
    model: nn.Module,
    start: Callable[..., Packed],
    line: dict[str, Any],
) -> dict[str, Tensor]:
    """The tensors of a layer; the dense one has its values for that long alone."""
    module, at = target.module, 0
    empty_ones = {own: module._parameters[own] for own in job.sources}
    try:
        for own, (entry, name) in job.sources.items():
            parts = tensors[at : at + len(entry.parts)]
            at += len(parts)
            value = entry.made(model, parts)[name].to(empty_ones[own].dtype)
            module._parameters[own] = nn.Parameter(value, requires_grad=False)
        twin = None if job.first is None else copy.deepcopy(job.first).to_empty(device="cpu")
        layer = start(target, shared={} if twin is None else {_sharing(target): twin})
    finally:
        module._parameters.update(empty_ones)
        for parent, attribute in target.places:
            setattr(parent, attribute, planned)
    line["errors"] = list(layer.init_errors)
    if isinstance(layer, QuantExperts):
        line["start_errors"] = {name: list(errors) for name, errors in layer.start_errors.items()}
    _note(planned, line)
    state = dict(_state(layer))
    return {name: state[name.removeprefix(f"{target.path}.")] for name in job.tensors}


def _note(planned: Packed | None, line: Mapping[str, Any]) -> None:
    """What is known of a layer once it is quantized."""
    if planned is not None:
        planned.init_errors = tuple(line["errors"])
    if isinstance(planned, QuantExperts):
        planned.start_errors = {name: tuple(errors) for name, errors in line["start_errors"].items()}


def _journal(path: Path) -> Iterator[dict[str, Any]]:
    """Its lines, up to the first that was not written to its end."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError:
            return


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let products take so many threads. Beside a plain start, which the disk bounds, more of them would only wait for
    those that read, write and take checksums: on 4 busy cores, 4 took 17 times as long as 1."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _spelled(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()
