"""LoraHub (Huang et al., COLM 2024): weights for a library of adapters, found without gradients from a few examples."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.peft_format import Factors, attach, check_fit, save_adapter, undone_on_error
from ..disk.files import replace_file
from ..nn.linear import QuantLinear
from ..training.data import IGNORE, Row
from .library import Library

BOUND = 1.5  # of every weight, either side (section 4.2 and the authors' algorithm.py)
PENALTY = 0.05  # on the mean of |w|, as in algorithm.py
EVALUATIONS = 40
WEIGHTS_FILE = "lorahub.json"

Collate = Callable[[Sequence[Row]], dict[str, Tensor]]


@dataclass(frozen=True)
class Composition:
    """What a search found.

    Attributes:
        weights: by adapter's name, those of the least objective.
        loss: mean loss per learned token of the examples at these weights, nats.
        base_loss: the same at weights of 0, which is the base without any adapter.
        objectives: loss + penalty of the weights tried, in order, those of 0 first; inf where the loss was NaN.
    """

    weights: dict[str, float]
    loss: float
    base_loss: float
    objectives: tuple[float, ...]

    def save(self, model: nn.Module, directory: str | Path) -> None:
        """Write the composed adapter that `model` carries, and lorahub.json with the weights beside it.

        Raises:
            OSError: the disk is full or the directory cannot be written.
        """
        save_adapter(model, directory)
        text = {
            "weights": self.weights,
            "loss": self.loss,
            "base_loss": self.base_loss,
            "objectives": list(self.objectives),
        }
        with replace_file(Path(directory) / WEIGHTS_FILE) as temporary:
            temporary.write_text(json.dumps(text, indent=1) + "\n")


def lorahub(
    model: nn.Module,
    library: Library | str | Path,
    rows: Sequence[Row],
    collate: Collate,
    *,
    evaluations: int = EVALUATIONS,
    penalty: float = PENALTY,
    seed: int = 0,
    batch_size: int = 8,
    on_evaluation: Callable[[int, int, float], None] | None = None,
) -> Composition:
    """Compose a library's adapters for a new task: m = (Σ w_i B_i)(Σ w_i A_i), with w found from a few examples.

    The factors are summed before they are multiplied (Huang et al., equation 1): terms B_i A_j between adapters are
    part of it, and w and −w give the same model. An adapter's scaling is folded into its factors, its square root into
    each, so adapters of different alpha weigh what they did alone. Nevergrad's NGOpt minimises mean loss + penalty ·
    mean |w| from w = 0 within ±1.5, and the best weights it tried are kept: on the examples never worse than the base.
    At small budgets NGOpt takes COBYLA, which draws nothing: the seed then changes nothing.

    Args:
        model: quantized; causal or sequence to sequence, or anything called as model(**batch) that returns an object
            with the mean `loss` over its learned tokens. It ends with the composed adapter, of scaling 1, as its only
            LoRA; its codes stay. An error leaves it with the LoRA it had.
        library: a Library, or the folder of one.
        rows: the examples; five or so.
        collate: rows to a batch with `labels` `[rows, length]`, −100 where nothing is learned.
        evaluations: how many weights Nevergrad may try; 1 or more. The loss of the examples is computed once for each.
        penalty: 0 or more.
        seed: of the search.
        batch_size: rows per forward pass.
        on_evaluation: called with (evaluations done, in all, least objective so far).

    Raises:
        OSError: Nevergrad is not installed, or the library cannot be read.
        FormatError: the library's adapters differ in kind, or do not fit the model.
        ValueError: no rows, nothing to learn in them, an argument out of range, or the base's loss is not finite.
    """
    if evaluations < 1 or penalty < 0 or batch_size < 1:
        raise ValueError(
            f"evaluations={evaluations}, penalty={penalty} and batch_size={batch_size} must be 1, 0 and 1 or more"
        )
    nevergrad = import_nevergrad()
    library = library if isinstance(library, Library) else Library.open(library)
    sums = WeightedSums.of(model, library)
    was_training = model.training
    model.eval()
    try:
        with undone_on_error(model):
            sums.attach()
            batches = [collate(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
            search = _Search(lambda weights: sums.loss(weights, batches), penalty)
            best = search.run(nevergrad, len(library.names), evaluations, seed, on_evaluation)
            sums.set(best)
    finally:
        model.train(was_training)
    weights = dict(zip(library.names, best, strict=True))
    return Composition(
        weights, search.losses[best], search.losses[(0.0,) * len(best)], tuple(search.objectives.values())
    )


def import_nevergrad() -> Any:
    """The library of the search.

    Raises:
        OSError: it is not installed.
    """
    try:
        import nevergrad
    except ModuleNotFoundError:
        raise OSError(
            "LoraHub searches with Nevergrad, which is not installed; run: pip install 'qft[compose]'"
        ) from None
    return nevergrad


class WeightedSums:
    """The factors of every adapter of a library on a model's device, and their sums as the model's LoRA.

    Attributes:
        A, B: by path, fp32 `[adapters, rank, in]` and `[adapters, out, rank]`, scaling folded in.
    """

    def __init__(self, model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        self.model, self.A, self.B = model, a, b

    @classmethod
    def of(cls, model: nn.Module, library: Library) -> WeightedSums:
        """Read a library.

        Raises:
            FormatError: it does not fit the model.
        """
        layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
        check_fit(layers, library.layers, f"adapter {library.names[0]!r}")
        factors = [library.read(name) for name in library.names]
        a, b = {}, {}
        for path in library.layers:
            pairs = [adapter[path].unscaled() for adapter in factors]
            a[path] = torch.stack([pair[0] for pair in pairs]).to(layers[path].device)
            b[path] = torch.stack([pair[1] for pair in pairs]).to(layers[path].device)
        return cls(model, a, b)

    def attach(self) -> None:
        """Give the model a LoRA of weights 0 and scaling 1, in place of its own."""
        empty = {path: Factors(self.A[path][0] * 0, self.B[path][0] * 0, self.A[path].shape[1]) for path in self.A}
        attach(self.model, empty, source="the library")

    @torch.no_grad()
    def set(self, weights: Sequence[float]) -> None:
        """Make the model's LoRA (Σ w_i B_i)(Σ w_i A_i)."""
        for path in self.A:
            layer: Any = self.model.get_submodule(path)
            w = torch.tensor(weights, dtype=torch.float32, device=self.A[path].device)
            layer.lora_A.copy_(torch.tensordot(w, self.A[path], 1))
            layer.lora_B.copy_(torch.tensordot(w, self.B[path], 1))

    @torch.no_grad()
    def loss(self, weights: Sequence[float], batches: Sequence[dict[str, Tensor]]) -> float:
        """Mean loss per learned token at these weights, nats.

        Raises:
            ValueError: no token is learned.
        """
        self.set(weights)
        # a causal model predicts a token from those before it, so a row's first label never counts
        whole = bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", True))
        total, tokens = 0.0, 0
        for batch in batches:
            on_device = {name: tensor.to(next(self.model.parameters()).device) for name, tensor in batch.items()}
            learned = int((batch["labels"][:, 0 if whole else 1 :] != IGNORE).sum())
            if learned:
                total += float(self.model(**on_device).loss) * learned
                tokens += learned
        if not tokens:
            raise ValueError("the examples hold no token to learn; give rows whose labels are not all -100")
        return total / tokens


class _Search:
    """Minimise loss(w) + penalty * mean |w|; no w is evaluated twice.

    Attributes:
        losses, objectives: of the weights tried, in order.
    """

    def __init__(self, loss: Callable[[Sequence[float]], float], penalty: float) -> None:
        self.loss, self.penalty = loss, penalty
        self.losses: dict[tuple[float, ...], float] = {}
        self.objectives: dict[tuple[float, ...], float] = {}

    def run(
        self,
        nevergrad: Any,
        count: int,
        evaluations: int,
        seed: int,
        on_evaluation: Callable[[int, int, float], None] | None,
    ) -> tuple[float, ...]:
        """The best weights of `evaluations` asked for and of 0.

        Raises:
            ValueError: the loss at 0 is not finite.
        """
        nothing = (0.0,) * count
        if not math.isfinite(self.objective(nothing)):
            raise ValueError(
                f"the base's loss on the examples is {self.losses[nothing]}; its weights are damaged, or overflow: "
                "try another dtype"
            )
        array = nevergrad.p.Array(init=nothing, lower=[-BOUND] * count, upper=[BOUND] * count)
        array.random_state.seed(seed)
        with warnings.catch_warnings():
            # COBYLA, where NGOpt takes it, is started again with a first step below its last one's, which SciPy mends
            warnings.filterwarnings("ignore", message="COBYLA: Invalid RHOEND", category=UserWarning)
            optimizer = nevergrad.optimizers.NGOpt(array, budget=evaluations)
            try:
                for done in range(1, evaluations + 1):
                    candidate = optimizer.ask()
                    objective = self.objective(tuple(float(w) for w in candidate.value))
                    # Nevergrad warns of values beyond 5e20: a composition that overflows is bad enough at 1e20
                    optimizer.tell(candidate, min(objective, 1e20))
                    if on_evaluation:
                        on_evaluation(done, evaluations, min(self.objectives.values()))
            finally:
                # its COBYLA waits in a thread that ends with it: held by a traceback, it would keep the process alive
                del optimizer
        return min(self.objectives, key=self.objectives.__getitem__)

    def objective(self, weights: tuple[float, ...]) -> float:
        """Of these weights; inf where the loss is NaN."""
        if weights not in self.objectives:
            loss = self.losses[weights] = self.loss(weights)
            mean = sum(map(abs, weights)) / len(weights)
            self.objectives[weights] = math.inf if math.isnan(loss) else loss + self.penalty * mean
        return self.objectives[weights]
