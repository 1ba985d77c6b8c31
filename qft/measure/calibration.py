"""Second moments of what each linear layer reads, E[x xᵀ], measured on a text in bounded memory.

Calibrated starting points (QERA, GPTQ, CLoQ, LQ-LoRA) and bit plans weigh a layer's error by them: the expected squared
error of its outputs is tr(R S Rᵀ), R = W − Q. A batch's products are fp32, their sum over batches float64.

A directory with a calibration holds `calibration.json`, which says what it was made from and which parts are complete,
and one safetensors file per part. A part serves every layer that reads the same tensors: q, k and v; gate and up. What
a pass over the rows has finished appears there as one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..disk import tensor_file
from ..disk.checkpoint import refuse_to_overwrite, write_json
from ..disk.files import replace_files, settle
from ..disk.tensor_file import Stored
from ..format import FormatError
from ..model.progress import bar
from ..model.targets import quantizable, weight_of
from .activations import Batches, Collate, SecondMoment, Source, accumulate, sensitivities, survey

NAME = "calibration.json"
MOMENT = "second_moment"  # the one tensor of a part's file
MEMORY = 2 << 30  # bytes
SAMPLES = 16  # values of each parameter that tell one model's weights from another's


class Calibration(Mapping[str, Tensor]):
    """Second moments by layer path: fp32 `[in, in]`, symmetric, or their diagonal `[in]`.

    One made in a directory reads a moment from there each time it is asked for, onto the CPU, and checks its SHA-256;
    one made without a directory is held in memory, and its tensors are not to be changed.

    Attributes:
        tokens: positions of the rows, padding not counted.
        full: whether the moments are whole matrices.
        groups: paths of the layers, those that read the same tensors together: they share one moment.
        sensitivity: by layer path, how much the loss minds noise in the layer's outputs (see
            `qft.measure.activations.sensitivities`); empty unless gradients were measured.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        read: Callable[[int], Tensor],
        tokens: int,
        full: bool,
        sensitivity: Mapping[str, float],
    ) -> None:
        self.groups = tuple(map(tuple, groups))
        self.tokens = tokens
        self.full = full
        self.sensitivity = sensitivity
        self._read = read
        self._group_of = {path: number for number, group in enumerate(self.groups) for path in group}

    @classmethod
    def load(cls, directory: str | Path) -> Calibration:
        """The calibration in a directory; no moment is read yet.

        Raises:
            FormatError: its description is damaged; later, where a moment is read: that moment's file is.
            ValueError: `calibrate` was interrupted there, and has passes to go.
            OSError: there is none.
        """
        directory = Path(directory)
        if directory.is_dir():
            settle(directory)
        if not (directory / NAME).is_file():
            raise FileNotFoundError(f"{directory} holds no {NAME}; give a directory written by qft calibrate")
        return _Ledger.read(directory).calibration(directory)

    def __getitem__(self, path: str) -> Tensor:
        if path not in self._group_of:
            raise KeyError(f"{path} has no second moment; calibrate the model with this layer")
        return self._read(self._group_of[path])

    def __contains__(self, path: object) -> bool:
        return path in self._group_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._group_of)

    def __len__(self) -> int:
        return len(self._group_of)


def calibrate(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Collate,
    *,
    full: bool = True,
    gradients: bool = False,
    batch_size: int = 8,
    directory: str | Path | None = None,
    memory: int = MEMORY,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    progress: bool = False,
) -> Calibration:
    """Measure E[x xᵀ] of the input of every linear layer that `quantize_model` would replace.

    The model is called as model(**batch), in eval mode and without gradients; labels are kept from it. Positions that
    a two-dimensional `attention_mask` hides are left out wherever a layer's input has the mask's shape; elsewhere (a
    pooler's first token) every position counts. A weight used several times, or by several layers, has the moment of
    all tensors it reads, each counted once. Which layers read the same tensors is learned from the first batch; layers
    that it does not reach have no moment, and are named once.

    Where the sums do not fit in `memory`, several passes over the rows are made, each as deep as it must be; the result
    is the same bit for bit.

    Args:
        model: any module; only looked at.
        rows: as `qft.training.data.read` gives them, or whatever `collate` takes; a mapping of tensors each.
        collate: makes `batch_size` rows a batch, a mapping of tensors.
        full: keep whole matrices; False keeps their diagonals, E[x_j²].
        gradients: measure how much the loss minds noise in each layer's outputs as well, for `qft.plan_bits`: one pass
            forward and backward, which holds the activations of a batch. The model must compute a loss of labels.
        batch_size: rows per forward pass.
        directory: where the moments are kept, and where a calibration that was interrupted goes on with its next pass.
            None keeps them in memory: 4 in² bytes for each group of layers.
        memory: most bytes of float64 sums held at a time. A batch's fp32 product, half as large as the largest of
            them, comes on top.
        skip: layers to leave out, patterns as in `quantize_model`.
        include: layers to take though `quantize_model` replaces them only where `formats` names them: the output head.
        progress: draw a progress bar with the time left on stderr.

    Raises:
        ValueError: there is no layer or no row; an input is NaN or infinite (its layer is named); a layer alone needs
            more than `memory`; a layer is called otherwise than in the first batch; or `directory` holds a calibration
            of other rows, of another model or choice of layers, or with the other `full`.
        FormatError: what is in `directory` is damaged. FileExistsError: `directory` holds something else.
    """
    layers = quantizable(model, skip, include)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no linear layer to calibrate; see qft.report for the reasons")
    if not len(rows):
        raise ValueError("calibration needs at least one row; give it text")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} holds no row; use 1 or more")
    place = Path(directory) if directory is not None else None
    batches = Batches(model, rows, collate, batch_size)
    with _evaluating(model):
        ledger = _begin(place, _origin(model, layers, rows, full), lambda: survey(model, layers, batches), batches)
        passes = _passes(ledger, memory)
        missing = gradients and not ledger.sensitivity
        with bar(progress, (len(passes) + missing) * len(batches), "calibrating") as advance:
            if missing:  # before the last pass: a calibration counts once every moment is there
                ledger.sensitivity = sensitivities(model, layers, batches, lambda: advance("calibrating, gradients"))
                if place is not None:
                    with replace_files(place) as folder:
                        ledger.write(folder)
            for turn, numbers in enumerate(passes, start=1):
                moments = {number: SecondMoment(ledger.sources[number], full) for number in numbers}
                what = f"calibrating, pass {turn} of {len(passes)}"
                accumulate(model, layers, batches, [*moments.values()], lambda what=what: advance(what))  # type: ignore[misc]
                ledger.add(place, moments)
    return ledger.calibration(place)


def _passes(ledger: _Ledger, memory: int) -> list[list[int]]:
    """The sources still to be measured, by the passes in which their sums fit in `memory` together."""
    passes: list[list[int]] = []
    room = 0
    for number in ledger.pending():
        source = ledger.sources[number]
        needed = source.nbytes(ledger.origin["full"])
        if needed > memory:
            raise ValueError(
                f"the sum for {source.layers[0]} takes {needed} bytes, more than memory={memory}; give it that much, "
                "or keep diagonals only"
            )
        if needed > room:
            passes.append([])
            room = memory
        passes[-1].append(number)
        room -= needed
    return passes


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ------------------------------------------------------------------------------------------------ what is kept


@dataclass
class _Ledger:
    """What a calibration is made from and which of its parts are finished: in memory, or as files in a directory."""

    origin: dict[str, Any]
    tokens: int
    sources: list[Source]
    stored: dict[int, Stored] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    held: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> _Ledger:
        path = directory / NAME
        try:
            said = json.loads(path.read_bytes())
            sources = [Source(**{**entry, "layers": tuple(entry["layers"])}) for entry in said["sources"]]
            stored = {
                int(number): Stored(entry["dtype"], tuple(entry["shape"]), entry["sha256"])
                for number, entry in said["stored"].items()
            }
            sensitivity = {path: float(value) for path, value in said["sensitivity"].items()}
            return cls({**said["origin"]}, int(said["tokens"]), sources, stored, sensitivity)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise FormatError(f"{path} is damaged; delete {directory} and calibrate again") from None

    def write(self, directory: Path) -> None:
        said = {
            "origin": self.origin,
            "tokens": self.tokens,
            "sources": [asdict(source) for source in self.sources],
            "stored": {number: asdict(stored) for number, stored in self.stored.items()},
            "sensitivity": self.sensitivity,
        }
        write_json(directory / NAME, said)

    def pending(self) -> list[int]:
        """Numbers of the sources that no pass has finished."""
        return [number for number in range(len(self.sources)) if number not in {**self.stored, **self.held}]

    def add(self, directory: Path | None, moments: dict[int, SecondMoment]) -> None:
        """Keep what a pass has finished; each sum is dropped as its mean is kept."""
        if directory is None:
            for number, moment in moments.items():
                self.held[number] = moment.mean()
            return
        with replace_files(directory) as folder:
            for number, moment in moments.items():
                self.stored[number] = tensor_file.write(folder / _file(number), {MOMENT: moment.mean()}, {})[MOMENT]
            self.write(folder)

    def calibration(self, directory: Path | None) -> Calibration:
        if left := len(self.pending()):
            raise ValueError(
                f"{directory} holds {len(self.stored)} of the {left + len(self.stored)} parts of a calibration that "
                "was interrupted; repeat the command that began it"
            )

        def read(number: int) -> Tensor:
            if directory is None:
                return self.held[number]
            path = directory / _file(number)
            if not path.is_file():
                raise FormatError(f"{path} is missing; copy the directory again, or calibrate again")
            return tensor_file.read(path, {MOMENT: self.stored[number]})[MOMENT]

        groups = [source.layers for source in self.sources]
        return Calibration(groups, read, self.tokens, bool(self.origin["full"]), self.sensitivity)


def _file(number: int) -> str:
    return f"{number:04}.safetensors"


def _begin(
    directory: Path | None, origin: dict[str, Any], look: Callable[[], list[Source]], batches: Batches
) -> _Ledger:
    """The ledger in `directory`, which must have the same origin, or a new one."""
    if directory is not None:
        if directory.is_dir():
            settle(directory)
        if (directory / NAME).is_file():
            ledger = _Ledger.read(directory)
            _refuse_difference(directory, ledger.origin, origin)
            return ledger
        refuse_to_overwrite(directory)
    ledger = _Ledger(origin, batches.tokens(), look())
    if directory is not None:
        with replace_files(directory) as folder:
            ledger.write(folder)
    return ledger


def _origin(model: nn.Module, layers: Mapping[str, nn.Module], rows: Sequence[Any], full: bool) -> dict[str, Any]:
    """What two calls must share for one to go on with the other's calibration."""
    text = hashlib.sha256()
    for row in rows:
        for name in sorted(row.keys() - {"labels"}):
            value = torch.as_tensor(row[name])
            text.update(f"{name} {value.dtype} {list(value.shape)} {value.tolist()}\n".encode())
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLES, len(flat)), dtype=torch.float64).long()
        weights.update(f"{name} {flat[places.to(flat.device)].tolist()}\n".encode())
    shapes = {path: list(weight_of(module).shape) for path, module in layers.items()}
    return {"rows": text.hexdigest(), "weights": weights.hexdigest(), "layers": shapes, "full": full}


def _refuse_difference(directory: Path, held: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    reasons = {
        "layers": "a model with other layers, or of another choice of them",
        "weights": "a model with other weights",
        "rows": "other rows",
        "full": "whole matrices" if held.get("full") else "diagonals",
    }
    for name, reason in reasons.items():
        if held.get(name) != now[name]:
            raise ValueError(f"{directory} holds a calibration of {reason}; name another directory, or delete it")
