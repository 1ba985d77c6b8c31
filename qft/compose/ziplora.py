"""ZipLoRA (Shah et al. 2023): two adapters as one, each input column of each weighed so that they do not collide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapters.peft_format import Factors, attach, check_fit, read_factors, undone_on_error
from ..nn.linear import QuantLinear
from ..training.data import IGNORE, Row

OUTPUTS = ("logits", "hidden")
SIMILARITY = 0.01  # the paper's lambda
Collate = Callable[[Sequence[Row]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Zipped:
    """What a merge found.

    Attributes:
        mergers: of the first and the second adapter, fp32 `[in]` by path.
        reconstruction: per adapter, mean squared difference between the merged model and the model with that adapter
            alone, each on the adapter's own rows.
        plain: the same for the plain sum of the two adapters.
        overlap, plain_overlap: sum over the layers of mean |m_1 m_2|; that of the plain sum is the number of layers
            which both adapt.
    """

    mergers: tuple[dict[str, Tensor], dict[str, Tensor]]
    reconstruction: tuple[float, float]
    plain: tuple[float, float]
    overlap: float
    plain_overlap: float


def ziplora(
    model: nn.Module,
    first: str | Path | Mapping[str, Factors],
    second: str | Path | Mapping[str, Factors],
    first_rows: Sequence[Row],
    second_rows: Sequence[Row],
    collate: Collate,
    *,
    steps: int = 100,
    learning_rate: float = 0.01,
    similarity: float = SIMILARITY,
    batch_size: int = 8,
    output: str = "logits",
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Zipped:
    """Merge two adapters of one base with a coefficient per input column (Shah et al., equations 3 to 5).

    ΔW = ΔW_1 diag(m_1) + ΔW_2 diag(m_2) with m from 1, so that AdamW starts at the plain sum, minimises
    mean (f(x_1) − f_1(x_1))² + mean (f(x_2) − f_2(x_2))² + similarity · Σ_layers mean |m_1 m_2|, where f_i is the model
    with adapter i alone and x_i are its rows. The authors merge in this form (ziplora-pytorch); f is here a language
    model's logits, or its last hidden states. Columns of ΔW_i scale with those of A_i, so the merged product is again a
    LoRA, A = [A_1 diag(m_1); A_2 diag(m_2)] and B = [B_1, B_2]: ranks add.

    Args:
        model: quantized, causal or sequence to sequence; run in eval mode. It ends with the merged adapter, of scaling
            1, as its only LoRA; its codes stay. An error leaves it with the LoRA it had.
        first, second: adapter directories, or factors by path.
        first_rows, second_rows: what each adapter is for; 1 row or more.
        collate: rows to a batch with `labels`, and `attention_mask` for causal models; padding is not compared.
        steps: of AdamW; 0 is the plain sum.
        learning_rate: positive. 5e-5, as in the authors' code for images, moves a coefficient by 0.005 in 100 steps.
        similarity: lambda, 0 or more.
        batch_size: rows of each adapter per step.
        output: what f is: "logits" or "hidden".
        seed: of the rows' order.
        on_step: called with (step, steps, loss).

    Raises:
        FormatError: an adapter is damaged, or does not fit the model; or a layer cannot hold both ranks.
        OSError: an adapter's files cannot be read.
        ValueError: no rows, or an argument out of range.
    """
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r} is unknown; use {' or '.join(map(repr, OUTPUTS))}")
    if steps < 0 or similarity < 0 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"steps={steps}, similarity={similarity}, batch_size={batch_size} and learning_rate={learning_rate} must "
            "be 0, 0 and 1 or more, and positive"
        )
    if not (len(first_rows) and len(second_rows)):
        raise ValueError(f"{len(first_rows)} and {len(second_rows)} rows; each adapter needs rows of its own task")
    adapters = [_factors(model, first, "the first adapter"), _factors(model, second, "the second adapter")]
    merge = _Merge(model, adapters)
    rows = (first_rows, second_rows)
    compare = _Comparison(model, merge, collate, output)
    was_training = model.training
    model.eval()
    try:
        with undone_on_error(model):
            merge.attach()
            plain = compare.mean(0, first_rows, batch_size), compare.mean(1, second_rows, batch_size)
            plain_overlap = merge.overlap().item()
            optimizer = torch.optim.AdamW(merge.parameters(), lr=learning_rate, weight_decay=0.0)
            order = torch.Generator().manual_seed(seed)
            for step in range(1, steps + 1):
                loss = similarity * merge.overlap()
                for which in (0, 1):
                    drawn = torch.randperm(len(rows[which]), generator=order)[:batch_size]
                    loss = loss + compare.difference(which, [rows[which][i] for i in drawn.tolist()])
                merge.differentiate(loss)
                optimizer.step()
                if on_step:
                    on_step(step, steps, loss.item())
            merged = compare.mean(0, first_rows, batch_size), compare.mean(1, second_rows, batch_size)
            merge.settle()
    finally:
        model.train(was_training)
    one, other = ({path: m.detach() for path, m in adapter.items()} for adapter in merge.mergers)
    return Zipped((one, other), merged, plain, merge.overlap().item(), plain_overlap)


def _factors(model: nn.Module, adapter: str | Path | Mapping[str, Factors], name: str) -> dict[str, Factors]:
    factors = dict(adapter) if isinstance(adapter, Mapping) else read_factors(adapter)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    check_fit(layers, {path: entry.shape for path, entry in factors.items()}, name)
    return factors


class _Merge:
    """Both adapters side by side as the model's LoRA, and the coefficients of their columns.

    Attributes:
        A, B: of each adapter by path, scaling folded in.
        mergers: of each adapter by path, `[in]`.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Mapping[str, Factors]]) -> None:
        self.model = model
        self.A: list[dict[str, Tensor]] = []
        self.B: list[dict[str, Tensor]] = []
        self.mergers: list[dict[str, Tensor]] = []
        for adapter in adapters:
            devices = {path: next(model.get_submodule(path).parameters()).device for path in adapter}
            pairs = {path: factors.unscaled() for path, factors in adapter.items()}
            self.A.append({path: a.to(devices[path]) for path, (a, _) in pairs.items()})
            self.B.append({path: b.to(devices[path]) for path, (_, b) in pairs.items()})
            self.mergers.append({path: torch.ones_like(a[0]).requires_grad_() for path, a in self.A[-1].items()})

    def attach(self) -> None:
        """Give the model LoRAs of both ranks together and scaling 1: the plain sum."""
        merged = {}
        for path in sorted({path for adapter in self.A for path in adapter}):
            a = torch.cat([adapter[path] for adapter in self.A if path in adapter])
            b = torch.cat([adapter[path] for adapter in self.B if path in adapter], dim=1)
            merged[path] = Factors(a, b, alpha=len(a))
        attach(self.model, merged, source="the merge")

    def merged(self) -> dict[str, Tensor]:
        """The merged LoRA's A, by its parameter's name."""
        return self._stacked(
            [{path: a * m[path] for path, a in A.items()} for A, m in zip(self.A, self.mergers, strict=True)]
        )

    def alone(self, which: int) -> dict[str, Tensor]:
        """The same with one adapter as it is and nothing of the other."""
        return self._stacked([{path: a * float(at == which) for path, a in A.items()} for at, A in enumerate(self.A)])

    @staticmethod
    def _stacked(adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        paths = {path for adapter in adapters for path in adapter}
        return {f"{path}.lora_A": torch.cat([a[path] for a in adapters if path in a]) for path in paths}

    def overlap(self) -> Tensor:
        """Sum over the layers that both adapt of mean |m_1 m_2|."""
        one, other = self.mergers
        terms = [(m * other[path]).abs().mean() for path, m in one.items() if path in other]
        return sum(terms, torch.zeros(()))

    def parameters(self) -> list[Tensor]:
        """The coefficients."""
        return [m for adapter in self.mergers for m in adapter.values()]

    def differentiate(self, loss: Tensor) -> None:
        """Set the gradients of the coefficients; no Parameter of the model gets one."""
        gradients = torch.autograd.grad(loss, self.parameters(), allow_unused=True)
        for merger, gradient in zip(self.parameters(), gradients, strict=True):
            merger.grad = gradient

    @torch.no_grad()
    def settle(self) -> None:
        """Write the merged columns into the model's LoRA."""
        for name, tensor in self.merged().items():
            self.model.get_parameter(name).copy_(tensor)


class _Comparison:
    """The merged model beside the model with one adapter alone."""

    def __init__(self, model: nn.Module, merge: _Merge, collate: Collate, output: str) -> None:
        self.model, self.merge, self.collate, self.output = model, merge, collate, output

    def difference(self, which: int, rows: Sequence[Row]) -> Tensor:
        """Mean squared difference over the features of the rows' tokens, fp32."""
        batch = {name: t.to(next(self.model.parameters()).device) for name, t in self.collate(rows).items()}
        with torch.no_grad():
            alone = self._run(self.merge.alone(which), batch)
        merged = self._run(self.merge.merged(), batch)
        counts = self._counts(batch)
        squares = (merged - alone).square().mean(dim=-1)
        return (squares * counts).sum() / counts.sum().clamp(min=1)

    @torch.no_grad()
    def mean(self, which: int, rows: Sequence[Row], batch_size: int) -> float:
        """`difference` over all rows, each token weighing the same."""
        total, tokens = 0.0, 0
        for at in range(0, len(rows), batch_size):
            chunk = rows[at : at + batch_size]
            count = int(self._counts(self.collate(chunk)).sum())
            if count:
                total += float(self.difference(which, chunk)) * count
                tokens += count
        if not tokens:
            raise ValueError("the rows hold no token to compare; give rows with text")
        return total / tokens

    def _run(self, tensors: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        # in eval mode nothing is checkpointed: a layer run again after the tensors are put back would see the others
        if self.output == "logits":
            return functional_call(self.model, tensors, (), batch).logits.float()
        out = functional_call(self.model, tensors, (), {**batch, "output_hidden_states": True})
        return (out.decoder_hidden_states if self._is_encoder_decoder else out.hidden_states)[-1].float()

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def _counts(self, batch: dict[str, Tensor]) -> Tensor:
        """Which positions of the output are no padding, bool `[rows, length]`."""
        return batch["labels"] != IGNORE if self._is_encoder_decoder else batch["attention_mask"] != 0
