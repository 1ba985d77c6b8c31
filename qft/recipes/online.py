"""Online-LoRA (Wei et al., WACV 2025): learn from a stream whose tasks nobody announces, and forget less.

When the loss has settled, a task is taken to be learned: its LoRA is frozen and a new one starts beside it. What the
frozen one holds is guarded by a few hard samples that are learned again at every step, and by a penalty on the new
factors where the old ones mattered.

The frozen factors are ranks of the same `lora_A` and `lora_B`: [frozen | new], of which only the new rows and columns
get a gradient. So the layer stays what it is, one fused product, saved and loaded as one LoRA, and its shape never
changes; a second pair beside it would take a product, a file entry and a kernel of its own. The optimizer must not
decay weights, or frozen ranks would fade: it is made here, without decay.

At a switch the function is continuous, unlike in the authors' code, which adds the new A to the old A and the new B to
the old B and zeroes both (the products' cross terms jump, and two zero factors never train again): the new pair moves
into free frozen ranks, and its successor starts with A random and B zero. Only where no rank is free are the frozen
ones recompressed by SVD, and the step says what that lost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.prepare import prepare_for_training
from ..model.targets import matches
from ..nn.linear import QuantLinear
from ..training.data import IGNORE, PaddingCollator, Row

BUFFER = 4  # hard samples kept (Wei et al., section 4)


class PlateauDetector:
    """Says when a loss has settled (Aljundi et al. 2019, section 3.1, as in Online-LoRA's code).

    It fires where, over the last `window` losses, the mean is below `mean` and the variance below `variance`, and a
    peak was seen since it last fired: a window whose mean exceeded that of the last firing by more than its standard
    deviation. Noise counts as a peak sooner or later; a long plateau then fires again.

    Args:
        mean: threshold of the window's mean, in the loss's unit; a little above what a learned task reaches.
        variance: threshold of the window's variance (population), in the unit's square.
        window: losses, 2 or more.
    """

    def __init__(self, mean: float, variance: float = 0.02, window: int = 5) -> None:
        if window < 2:
            raise ValueError(f"window={window} has no variance; use 2 or more")
        if not (variance > 0 and math.isfinite(mean)):
            raise ValueError(
                f"thresholds mean={mean} and variance={variance} let nothing fire; use finite mean, variance > 0"
            )
        self.mean, self.variance = mean, variance
        self.losses: deque[float] = deque(maxlen=window)
        self.last = (math.inf, 0.0)  # mean and standard deviation of the window it last fired at
        self.peak = True  # the first plateau needs none

    def update(self, loss: float) -> bool:
        """Take the next loss; returns whether a plateau was reached with it."""
        self.losses.append(loss)
        if len(self.losses) < (self.losses.maxlen or 0):
            return False
        mean = sum(self.losses) / len(self.losses)
        variance = sum((value - mean) ** 2 for value in self.losses) / len(self.losses)
        self.peak = self.peak or mean > sum(self.last)
        if not (self.peak and mean < self.mean and variance < self.variance):
            return False
        self.last, self.peak = (mean, math.sqrt(variance)), False
        return True

    def state_dict(self) -> dict[str, Any]:
        """What it has seen."""
        return {"losses": list(self.losses), "last": list(self.last), "peak": self.peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.losses = deque(state["losses"], self.losses.maxlen)
        self.last, self.peak = (state["last"][0], state["last"][1]), state["peak"]


class HardBuffer:
    """The `size` rows of highest loss so far, each with the loss it had when last seen."""

    def __init__(self, size: int = BUFFER) -> None:
        self.size = size
        self.rows: list[Row] = []
        self.losses: list[float] = []

    def offer(self, rows: Sequence[Row], losses: Sequence[float]) -> None:
        """Keep the hardest of `rows` and of what is held; of equal losses those held longer."""
        every = [*zip(self.losses, self.rows, strict=True), *zip(losses, rows, strict=True)]
        kept = sorted(every, key=lambda pair: -pair[0])[: self.size]
        self.losses, self.rows = [loss for loss, _ in kept], [row for _, row in kept]


@dataclass(frozen=True)
class OnlineStep:
    """What one step of a stream did.

    Attributes:
        loss: of the batch, before the step: mean cross entropy per token, nats.
        switched: whether a plateau was reached: the LoRA was frozen and a new one begun.
        lost: share of the frozen products' Frobenius norm that recompressing dropped, over all layers; 0 where it was
            not needed.
    """

    loss: float
    switched: bool = False
    lost: float = 0.0


class OnlineLora:
    """Trains a packed causal language model on a stream, one batch at a time, in place.

    The loss of a step is CE(batch) + CE(hard buffer) + weight / 2 · Σ Omega p² over the new factors p (Online-LoRA,
    equation 6). Omega is the running mean over switches of the squared gradient, on the buffer, of the log-probability
    of the model's own prediction (equation 5): here the mean over a row's tokens of its own likeliest token.

    Args:
        model: holds QuantLinears. A LoRA that is attached already, such as LoftQ's, is taken over as frozen ranks.
        collate: pads rows to a batch.
        detector: when to switch.
        rank, alpha: of the new pair; its product is scaled by alpha / rank. alpha None is the rank.
        limit: frozen ranks a layer can hold, `rank` or more.
        targets: layers that get a LoRA: paths, last names or globs over paths. The paper takes ("q_proj", "v_proj").
        learning_rate: AdamW's, without decay.
        weight: of the penalty; the paper's 2000.
        buffer: hard samples kept.
        seed: of the new factors' A.
        gradient_checkpointing: as in `qft.prepare_for_training`.

    Raises:
        ValueError: an argument out of range, or `targets` name no quantized layer.
    """

    def __init__(
        self,
        model: nn.Module,
        collate: PaddingCollator,
        detector: PlateauDetector,
        *,
        rank: int = 4,
        alpha: float | None = None,
        limit: int = 16,
        targets: Iterable[str] = ("*",),
        learning_rate: float = 2e-4,
        weight: float = 2000.0,
        buffer: int = BUFFER,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        if limit < rank:
            raise ValueError(f"limit={limit} frozen ranks cannot hold a pair of rank={rank}; use {rank} or more")
        if weight < 0 or buffer < 1:
            raise ValueError(f"weight={weight} must be 0 or more and buffer={buffer} 1 or more")
        patterns = tuple(targets)
        self.layers: dict[str, QuantLinear] = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, QuantLinear) and any(matches(path, pattern) for pattern in patterns)
        }
        if not self.layers:
            raise ValueError(f"targets {', '.join(patterns)} name no quantized layer of {type(model).__name__}")
        self.model, self.collate, self.detector = model, collate, detector
        self.rank, self.limit, self.weight = rank, limit, weight
        self.buffer = HardBuffer(buffer)
        self.switches = 0
        self.used: dict[str, int] = {}  # frozen ranks that are taken
        self.importance: dict[str, tuple[Tensor, Tensor]] = {}  # Omega of A [rank, in] and B [out, rank]
        device = next(iter(self.layers.values())).device
        self.generator = torch.Generator(device).manual_seed(seed)
        prepare_for_training(model, gradient_checkpointing=gradient_checkpointing)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                for parameter in module.parameters():
                    parameter.requires_grad_(False)
        for path, layer in self.layers.items():
            self.used[path] = self._attach(path, layer, rank if alpha is None else alpha)
        self.optimizer = torch.optim.AdamW(self._factors(), lr=learning_rate, weight_decay=0.0)

    # -------------------------------------------------------------------------------------------------- steps

    def step(self, rows: Sequence[Row]) -> OnlineStep:
        """Learn one batch of the stream, and switch to a new LoRA if the loss has settled.

        Args:
            rows: as `qft.training.data.read` gives them.

        Raises:
            ValueError: the loss is not finite; nothing was changed by it.
        """
        self.model.train()
        self.optimizer.zero_grad()
        fresh, tokens = self._losses(rows)
        loss = total = fresh.sum() / tokens.sum()
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at this batch; lower the learning rate")
        means = (fresh.detach() / tokens).tolist()
        if self.buffer.rows:
            again, counted = self._losses(self.buffer.rows)
            total = total + again.sum() / counted.sum()
            self.buffer.losses = (again.detach() / counted).tolist()
        self.buffer.offer(rows, means)
        (total + self._penalty()).backward()
        self.optimizer.step()
        value = loss.item()
        if not self.detector.update(value):
            return OnlineStep(value)
        return OnlineStep(value, switched=True, lost=self.switch())

    def switch(self) -> float:
        """Freeze the current LoRA and begin a new one, without changing what the model computes.

        Returns:
            The share that recompressing lost, see `OnlineStep.lost`.
        """
        self._measure_importance()
        self.switches += 1
        lost = total = 0.0
        for path, layer in self.layers.items():
            dropped, whole = self._consolidate(path, layer)
            lost, total = lost + dropped, total + whole
        self.optimizer.state.clear()  # moments of factors that are gone
        return math.sqrt(lost / total) if total else 0.0

    # -------------------------------------------------------------------------------------------------- losses

    def _losses(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Summed cross entropy of each row, and its number of predicted tokens (1 where there is none)."""
        logits, labels = self._logits(rows)
        losses = nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORE, reduction="none")
        return losses.sum(1), (labels != IGNORE).sum(1).clamp(min=1)

    def _logits(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """fp32 `[rows, length - 1, vocabulary]`, and the labels they are to predict."""
        device = next(iter(self.layers.values())).device
        batch = {name: tensor.to(device) for name, tensor in self.collate(rows).items()}
        labels = batch.pop("labels")[:, 1:]
        return self.model(**batch, use_cache=False).logits[:, :-1].float(), labels

    def _penalty(self) -> Tensor | float:
        """weight / 2 · Σ Omega p² over the new factors."""
        terms = [
            (omega * new.square()).sum()
            for path, both in self.importance.items()
            for omega, new in zip(both, self._new(self.layers[path]), strict=True)
        ]
        return self.weight / 2 * torch.stack(terms).sum() if terms else 0.0

    def _measure_importance(self) -> None:
        """Take the buffer's squared gradients into the running mean."""
        sums = {path: [torch.zeros_like(new) for new in self._new(layer)] for path, layer in self.layers.items()}
        for row in self.buffer.rows:
            self.optimizer.zero_grad()
            logits, labels = self._logits([row])
            likeliest = logits.log_softmax(-1).amax(-1)[labels != IGNORE]
            (likeliest.sum() / max(1, len(likeliest))).backward()
            for path, layer in self.layers.items():
                for total, grad in zip(sums[path], self._new_grads(layer), strict=True):
                    total += grad.square() / len(self.buffer.rows)
        self.optimizer.zero_grad()
        for path, now in sums.items():
            before = self.importance.get(path, (torch.zeros_like(now[0]), torch.zeros_like(now[1])))
            mean = [old + (new - old) / (self.switches + 1) for old, new in zip(before, now, strict=True)]
            self.importance[path] = (mean[0], mean[1])

    # -------------------------------------------------------------------------------------------------- factors

    def _attach(self, path: str, layer: QuantLinear, alpha: float) -> int:
        """Give a layer its [frozen | new] LoRA; returns the frozen ranks that an attached one takes."""
        before, scaling = layer.lora_rank, layer.lora_scaling
        if before > self.limit:
            raise ValueError(f"{path} has a LoRA of rank {before}, limit={self.limit} frozen ranks are too few for it")
        total = self.limit + self.rank
        a = torch.zeros(total, layer.in_features, device=layer.device)
        b = torch.zeros(layer.out_features, total, device=layer.device)
        if layer.lora_A is not None and layer.lora_B is not None:
            a[:before] = layer.lora_A.detach()
            b[:, :before] = layer.lora_B.detach() * (scaling * self.rank / alpha)
            layer.remove_lora()
        layer.add_lora(total, alpha * total / self.rank, A=a, B=b)  # alpha / rank, whatever the number of frozen ranks
        self._begin(layer)
        for parameter, frozen in (
            (layer.lora_A, (slice(self.limit),)),
            (layer.lora_B, (slice(None), slice(self.limit))),
        ):
            parameter.register_hook(partial(_without, frozen=frozen))  # type: ignore[union-attr]
        return before

    @torch.no_grad()
    def _begin(self, layer: QuantLinear) -> None:
        """A new pair: A Kaiming-uniform, B zero."""
        a, b = self._new(layer)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=self.generator)
        b.zero_()

    @torch.no_grad()
    def _consolidate(self, path: str, layer: QuantLinear) -> tuple[float, float]:
        """Move the new pair into frozen ranks; the squared norms of what recompressing dropped, and of what it had."""
        a, b = layer.lora_A, layer.lora_B
        new_a, new_b = self._new(layer)
        free, dropped, whole = self.used[path], 0.0, 0.0
        if free + self.rank <= self.limit:
            a[free : free + self.rank] = new_a  # type: ignore[index]
            b[:, free : free + self.rank] = new_b  # type: ignore[index]
            self.used[path] = free + self.rank
        else:
            left, right, values = _recompressed(b, a)  # type: ignore[arg-type]
            a[: self.limit], b[:, : self.limit] = right[: self.limit], left[:, : self.limit]  # type: ignore[index]
            self.used[path] = self.limit
            squares = values.square()
            dropped, whole = squares[self.limit :].sum().item(), squares.sum().item()
        self._begin(layer)
        return dropped, whole

    def _new(self, layer: QuantLinear) -> tuple[Tensor, Tensor]:
        """The new pair: A `[rank, in]` and B `[out, rank]`, views."""
        return layer.lora_A[self.limit :], layer.lora_B[:, self.limit :]  # type: ignore[index]

    def _new_grads(self, layer: QuantLinear) -> tuple[Tensor, Tensor]:
        """The new pair's gradients; zero where none reached the layer."""
        a, b = (torch.zeros_like(p) if p.grad is None else p.grad for p in (layer.lora_A, layer.lora_B))  # type: ignore[union-attr,arg-type]
        return a[self.limit :], b[:, self.limit :]

    def _factors(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B) if p is not None]

    # -------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything a stream needs to go on, the factors included; for torch.save."""
        return {
            "shape": [self.rank, self.limit],
            "factors": {path: (layer.lora_A, layer.lora_B) for path, layer in self.layers.items()},
            "used": dict(self.used),
            "importance": dict(self.importance),
            "switches": self.switches,
            "detector": self.detector.state_dict(),
            "buffer": {"rows": self.buffer.rows, "losses": self.buffer.losses},
            "generator": self.generator.get_state(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, on the same base with the same arguments.

        Raises:
            ValueError: the state belongs to other layers, ranks or limits; nothing was changed.
        """
        if state["shape"] != [self.rank, self.limit] or state["factors"].keys() != self.layers.keys():
            raise ValueError(
                f"the state is of rank and limit {state['shape']} on {len(state['factors'])} layers, this stream of "
                f"{[self.rank, self.limit]} on {len(self.layers)}; build it with the same arguments"
            )
        with torch.no_grad():
            for path, (a, b) in state["factors"].items():
                self.layers[path].lora_A.copy_(a)  # type: ignore[union-attr]
                self.layers[path].lora_B.copy_(b)  # type: ignore[union-attr]
        device = next(iter(self.layers.values())).device
        self.used, self.switches = dict(state["used"]), state["switches"]
        self.importance = {path: (a.to(device), b.to(device)) for path, (a, b) in state["importance"].items()}
        self.detector.load_state_dict(state["detector"])
        self.buffer.rows, self.buffer.losses = list(state["buffer"]["rows"]), list(state["buffer"]["losses"])
        self.generator.set_state(state["generator"].cpu())
        self.optimizer.load_state_dict(state["optimizer"])


def _without(grad: Tensor, frozen: tuple[slice, ...]) -> Tensor:
    """The gradient, zero at frozen ranks."""
    kept = grad.clone()
    kept[frozen] = 0
    return kept


def _recompressed(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product b a `[out, ranks] [ranks, in]` with its ranks in falling order of singular value.

    Returns:
        U sqrt(S) `[out, ranks]`, sqrt(S) Vt `[ranks, in]`, and S, fp32; computed in float64 from two QR factors, so
        that the dense product is never formed.
    """
    q_out, r_out = torch.linalg.qr(b.double())
    q_in, r_in = torch.linalg.qr(a.double().T)
    u, values, vt = torch.linalg.svd(r_out @ r_in.T)
    root = values.sqrt()
    return (q_out @ u * root).float(), (root[:, None] * (vt @ q_in.T)).float(), values
