"""Focused Prefix Tuning (Ma et al., ACL 2023): text with a wanted attribute, without what all of the data has anyway.

PEFT trains the prefixes: a general one on all of the data, which learns its implicit attributes (topic, register), and
a specific one on the rows of each wanted attribute. What is here combines them while generating (section 3):

    log p = alpha log p_specific - (alpha - 1) log p_general, where p_specific is among its likeliest top_p.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from peft import PeftModel

TOP_P = 0.8


def focus(specific: Mapping[str, tuple[float, Tensor]], general: Tensor, top_p: float = TOP_P) -> Tensor:
    """The focused distribution of the next token, as log-probabilities.

    log p = Σ alpha_i log p_i - (Σ alpha_i - 1) log p_general, normalised, on the smallest set of tokens that holds
    `top_p` of the specific distribution; of several attributes that distribution is Π p_i^(alpha_i / Σ alpha). The
    weights sum to 1, so that a general model equal to the specific ones changes nothing.

    Args:
        specific: (alpha, logits `[rows, vocabulary]`) by attribute; alpha 1 alone is the specific model itself, the
            paper's are a little more.
        general: logits `[rows, vocabulary]`.
        top_p: 0 < top_p <= 1; 1 keeps every token.

    Returns:
        fp32 `[rows, vocabulary]`, -inf outside the set.

    Raises:
        ValueError: no attribute, an alpha that is not positive, or top_p out of range.
    """
    if not specific or not all(alpha > 0 for alpha, _ in specific.values()):
        given = ", ".join(f"{name}={alpha}" for name, (alpha, _) in specific.items()) or "none"
        raise ValueError(f"the attributes' alphas are {given}; give one or more, each positive, such as 1.2")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is outside (0, 1]; 1 keeps every token")
    total = sum(alpha for alpha, _ in specific.values())
    wanted = torch.stack([alpha * logits.float().log_softmax(-1) for alpha, logits in specific.values()]).sum(0)
    probability, order = (wanted / total).softmax(-1).sort(descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    outside = torch.zeros_like(wanted, dtype=torch.bool).scatter(-1, order, before >= top_p)
    focused = wanted - (total - 1) * general.float().log_softmax(-1)
    return focused.masked_fill(outside, -torch.inf).log_softmax(-1)


class FocusedPrefix(LogitsProcessor):
    """Turns the logits of one specific prefix into the focused distribution, for transformers' `generate`.

    The model is run once more for the general prefix and for each further attribute, each with a key and value cache of
    its own; `generate` below puts it in place. Where rows were reordered, as beams are, a cache is built anew.

    Args:
        model: a PeftModel whose adapters are prefixes of one causal language model, quantized or not.
        general: name of the adapter trained on all of the data.
        specific: alpha by adapter name; the model's active adapter is one of them, and its logits are those that come
            in.
        attention_mask: of the prompts, int64 `[rows, length]`, padded on the left; None where nothing is padded.
        top_p: see `focus`.

    Raises:
        ValueError: a name is no prefix of the model, or the active adapter is not among the specific ones.
    """

    def __init__(
        self,
        model: PeftModel,
        general: str,
        specific: Mapping[str, float],
        attention_mask: Tensor | None = None,
        top_p: float = TOP_P,
    ) -> None:
        for name in (general, *specific):
            _check_prefix(model, name)
        if model.active_adapter not in specific:
            raise ValueError(f"the active adapter is {model.active_adapter!r}, none of {', '.join(specific)}; set one")
        self.specific, self.top_p = dict(specific), top_p
        self.active = str(model.active_adapter)
        self.general = _Reader(model, general, attention_mask)
        self.others = {n: _Reader(model, n, attention_mask) for n in specific if n != self.active}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]  # torch's legacy aliases
        """Focused log-probabilities `[rows, vocabulary]` for the active specific prefix's `scores`."""
        logits = {self.active: scores, **{name: read(input_ids) for name, read in self.others.items()}}
        specific = {name: (alpha, logits[name]) for name, alpha in self.specific.items()}
        return focus(specific, self.general(input_ids), self.top_p)


def generate(
    model: PeftModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    general: str,
    specific: Mapping[str, float],
    top_p: float = TOP_P,
    **keywords: Any,
) -> Any:
    """Generate with focused prefixes; what transformers' `generate` returns.

    Args:
        model, general, specific, top_p: as in `FocusedPrefix`; the active adapter is put back.
        input_ids, attention_mask: prompts, int64 `[rows, length]`, padded on the left.
        keywords: for `generate`: max_new_tokens, do_sample, temperature and so on.

    Raises:
        ValueError: as `FocusedPrefix` and `focus` do.
    """
    if not specific:
        raise ValueError("no attribute is wanted; give specific the alpha of at least one prefix, such as 1.2")
    first = next(iter(specific))
    _check_prefix(model, first)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    with _active(model, first):
        focused = FocusedPrefix(model, general, specific, attention_mask, top_p)
        return model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=[*keywords.pop("logits_processor", []), focused],
            **keywords,
        )


class _Reader:
    """Next-token logits under one prefix, with the keys and values of what was read before."""

    def __init__(self, model: PeftModel, name: str, attention_mask: Tensor | None) -> None:
        self.model, self.name, self.mask = model, name, attention_mask
        self.read: Tensor | None = None
        self.cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits `[rows, vocabulary]` after `input_ids` `[rows, length]`."""
        rows, length = input_ids.shape
        known = 0 if self.read is None else self.read.shape[1]
        if not (0 < known < length and self.read is not None and torch.equal(self.read, input_ids[:, :known])):
            known = 0
            with _active(self.model, self.name):
                self.cache = self.model.get_prompt(rows)
        mask = self._mask(input_ids)
        out = self.model.get_base_model()(
            input_ids=input_ids[:, known:],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, known - length :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.read, self.cache = input_ids.clone(), out.past_key_values
        last: Tensor = out.logits[:, -1]
        return last

    def _mask(self, input_ids: Tensor) -> Tensor:
        """1 for the prefix, the prompt's tokens and what was generated since: int64 `[rows, prefix + length]`."""
        config: Any = self.model.peft_config[self.name]
        virtual = config.num_virtual_tokens
        mask = torch.ones(len(input_ids), virtual + input_ids.shape[1], dtype=torch.int64, device=input_ids.device)
        if self.mask is not None:
            prompt = self.mask.repeat_interleave(len(input_ids) // len(self.mask), dim=0)  # one row per beam
            mask[:, virtual : virtual + prompt.shape[1]] = prompt
        return mask


@contextmanager
def _active(model: PeftModel, name: str) -> Iterator[None]:
    """Let one prefix be the active adapter for a while; PEFT's set_adapter would also change what trains."""
    before = model.active_adapter
    model.active_adapter = name
    try:
        yield
    finally:
        model.active_adapter = before


def _check_prefix(model: PeftModel, name: str) -> None:
    config = model.peft_config.get(name)
    if config is None:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(model.peft_config)}")
    if config.peft_type != "PREFIX_TUNING" or config.task_type != "CAUSAL_LM":
        kind = str(config.peft_type).rpartition(".")[2]
        raise ValueError(f"adapter {name!r} is {kind} for {config.task_type}; focus needs causal prefixes")
