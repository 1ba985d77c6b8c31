"""Focused prefixes: the combination's identities, and generating with PEFT's prefixes on a packed two-bit base."""

import pytest
import tiny_lm
import torch

import qft

peft = pytest.importorskip("peft")

from qft.recipes.focused_prefix import FocusedPrefix, focus, generate  # noqa: E402
from qft.training.data import Examples, PaddingCollator  # noqa: E402
from qft.training.finetune import Recipe, run  # noqa: E402

# PEFT asks transformers for names it has since renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

VIRTUAL = 5


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


def drawn(count=3, rows=2, vocabulary=40, spread=2.0):
    generator = torch.Generator().manual_seed(11)
    return [spread * torch.randn(rows, vocabulary, generator=generator) for _ in range(count)]


def nucleus(logits, top_p):
    """Tokens of one row in the smallest likeliest set that holds top_p."""
    kept, mass = set(), 0.0
    for token in logits.softmax(-1).argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept.add(token)
        mass += logits.softmax(-1)[token].item()
    return kept


# ------------------------------------------------------------------------------------------------ the formula


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.1])
def test_it_is_the_formula_on_the_specific_models_nucleus(top_p):
    specific, general, _ = drawn()
    out = focus({"kind": (1.3, specific)}, general, top_p)
    for row in range(2):
        kept = sorted(nucleus(specific[row], top_p))
        expected = (1.3 * specific[row].log_softmax(-1) - 0.3 * general[row].log_softmax(-1))[kept].log_softmax(-1)
        torch.testing.assert_close(out[row, kept], expected, atol=1e-5, rtol=0)
        assert set(out[row].isfinite().nonzero().flatten().tolist()) == set(kept)


def test_alpha_one_is_the_specific_model():
    specific, general, _ = drawn()
    torch.testing.assert_close(focus({"kind": (1.0, specific)}, general, 1.0), specific.log_softmax(-1))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 10.0])
def test_a_general_model_equal_to_the_specific_changes_nothing(alpha):
    specific, *_ = drawn()
    torch.testing.assert_close(
        focus({"kind": (alpha, specific)}, specific, 1.0), specific.log_softmax(-1), atol=1e-5, rtol=0
    )
    one = focus({"kind": (alpha, specific)}, specific, 0.6)
    torch.testing.assert_close(one, focus({"kind": (1.0, specific)}, specific, 0.6), atol=1e-5, rtol=0)


def test_several_attributes_are_summed_with_their_own_alphas():
    first, second, general = drawn()
    out = focus({"kind": (1.2, first), "topic": (0.6, second)}, general, 1.0)
    summed = 1.2 * first.log_softmax(-1) + 0.6 * second.log_softmax(-1) - 0.8 * general.log_softmax(-1)
    torch.testing.assert_close(out, summed.log_softmax(-1), atol=1e-5, rtol=0)
    same = focus({"kind": (1.2, first), "topic": (0.6, first)}, first, 1.0)
    torch.testing.assert_close(same, first.log_softmax(-1), atol=1e-5, rtol=0)


def test_what_was_forbidden_stays_forbidden():
    specific, general, _ = drawn()
    specific[:, :4] = -torch.inf
    for alpha in (1.0, 2.0):
        out = focus({"kind": (alpha, specific)}, general, 1.0)
        assert out[:, :4].isneginf().all()
        assert out[:, 4:].isfinite().all()


@pytest.mark.parametrize(
    ("alphas", "top_p", "message"),
    [
        ({}, 0.9, "alphas are none"),
        ({"kind": -0.5}, 0.9, "kind=-0.5; give one or more, each positive"),
        ({"kind": 1.2}, 0.0, "top_p=0.0 is outside"),
        ({"kind": 1.2}, 1.5, "top_p=1.5 is outside"),
    ],
)
def test_arguments_out_of_range_are_refused(alphas, top_p, message):
    logits = drawn()[0]
    with pytest.raises(ValueError, match=message):
        focus({name: (alpha, logits) for name, alpha in alphas.items()}, logits, top_p)


# ------------------------------------------------------------------------------------------------ prefixes


def config():
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)


def prefixes(*names, fmt="nf2 g64 f16"):
    """A packed model with untrained prefixes; the last name is active."""
    torch.manual_seed(0)
    dense = tiny_lm.model()
    dense.config.tie_word_embeddings = False  # a tied head without training repeats its last token
    dense.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(dense.lm_head.weight))
    model = peft.get_peft_model(qft.quantize_model(dense, fmt), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
        model.set_adapter(name)
    return model.eval()


def prompts(rows=2, length=6):
    return torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(5))


def logits_of(model, name, ids):
    model.set_adapter(name)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_generating_step_by_step_is_the_formula_on_whole_sequences():
    model = prefixes("general", "topic", "kind")
    out = generate(
        model, prompts(), general="general", specific={"kind": 1.2, "topic": 0.7}, top_p=0.9, max_new_tokens=5,
        do_sample=False, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert model.active_adapter == "kind"
    general, kind, topic = (logits_of(model, name, out.sequences) for name in ("general", "kind", "topic"))
    for step, scores in enumerate(out.scores):
        at = 5 + step
        expected = focus({"kind": (1.2, kind[:, at]), "topic": (0.7, topic[:, at])}, general[:, at], 0.9)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(out.sequences[:, at + 1], scores.argmax(-1))


def test_alpha_one_generates_as_the_specific_prefix_does():
    model, ids = prefixes("general", "kind"), prompts()
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    focused = generate(model, ids, general="general", specific={"kind": 1.0}, max_new_tokens=8, do_sample=False)
    assert torch.equal(focused, plain)
    strong = generate(model, ids, general="general", specific={"kind": 3.0}, max_new_tokens=8, do_sample=False)
    assert not torch.equal(strong, plain)


def test_the_general_prefix_against_itself_generates_as_it_does():
    model, ids = prefixes("general"), prompts()
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    focused = generate(model, ids, general="general", specific={"general": 2.5}, max_new_tokens=8, do_sample=False)
    assert torch.equal(focused, plain)


def padded():
    """Prompts of 4 and 6 tokens and their mask, the shorter padded on the left."""
    ids, mask = prompts(), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    return ids, mask, (ids[0, 2:], ids[1])


@pytest.mark.parametrize("beams", [1, 3])
def test_padded_prompts_and_beams_generate_what_each_prompt_does_alone(beams):
    model, (ids, mask, single) = prefixes("general", "kind"), padded()
    asked = {"general": "general", "specific": {"kind": 1.5}, "top_p": 1.0}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    alone = [generate(model, row[None], **asked, **how)[0, -5:] for row in single]
    together = generate(model, ids, mask, **asked, **how)[:, -5:]
    assert torch.equal(together, torch.stack(alone))


def test_no_prefix_reads_padding():
    model, (ids, mask, single) = prefixes("general", "kind", "topic"), padded()
    asked = {"general": "general", "specific": {"kind": 1.5, "topic": 2.0}, "top_p": 1.0}
    how = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    together = generate(model, ids, mask, **asked, **how).scores
    alone = generate(model, single[0][None], **asked, **how).scores
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[:1], one, atol=1e-4, rtol=1e-4)


def test_rows_that_were_reordered_are_read_anew():
    model = prefixes("general", "kind")
    first, other = prompts(), prompts(length=7).flip(0)
    scores = torch.zeros(2, tiny_lm.VOCABULARY)
    used, fresh = (FocusedPrefix(model, "general", {"kind": 2.0}, top_p=1.0) for _ in range(2))
    used(first, scores)
    torch.testing.assert_close(used(other, scores), fresh(other, scores))
    assert not torch.allclose(used(other, scores), fresh(first, scores))


def test_each_token_is_read_once_per_prefix():
    model, ids = prefixes("general", "kind"), prompts()
    lengths = []
    hook = model.get_base_model().register_forward_pre_hook(
        lambda module, args, keywords: lengths.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    generate(model, ids, general="general", specific={"kind": 1.5}, max_new_tokens=4, min_new_tokens=4)
    hook.remove()
    assert sorted(lengths) == [1] * 6 + [6] * 2


def test_trained_prefixes_focus_on_what_tells_the_attribute_from_the_rest():
    """Tokens 0-9 are the attribute's, 10-19 the rest's, 20-29 common to all rows: focus drops what is common."""
    generator = torch.Generator().manual_seed(2)

    def rows(low):
        own = torch.randint(low, low + 10, (8, 12), generator=generator)
        common = torch.randint(20, 30, (8, 12), generator=generator)
        ids = torch.stack([own, common], dim=2).flatten(1)
        return [{"input_ids": row, "labels": row.clone()} for row in ids]

    wanted, rest = rows(0), rows(10)
    model = prefixes("general", "kind")
    codes = {name: t.clone() for name, t in model.state_dict().items() if t.dtype == torch.uint8}
    recipe = Recipe(steps=25, batch_size=8, learning_rate=0.1, gradient_checkpointing=False)
    for name, data in (("general", wanted + rest), ("kind", wanted)):
        model.set_adapter(name)
        run(model, Examples(data), PaddingCollator(0), recipe)
    model.eval()
    assert codes
    assert all(torch.equal(model.state_dict()[name], t) for name, t in codes.items())
    ids = wanted[0]["input_ids"][None, :12]
    general, kind = (logits_of(model, name, ids)[:, -1] for name in ("general", "kind"))

    def share(alpha):
        probability = focus({"kind": (alpha, kind)}, general, 1.0).exp()[0]
        return (probability[:10].sum() / probability[10:20].sum()).item()

    assert share(1.0) > (general.softmax(-1)[0, :10].sum() / general.softmax(-1)[0, 10:20].sum()).item()
    assert share(1.0) < share(1.3) < share(2.0)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("general", "specific", "message"),
    [
        ("nothing", {"kind": 1.2}, "no adapter 'nothing'; it has general, kind"),
        ("general", {"nothing": 1.2}, "no adapter 'nothing'"),
        ("general", {}, "no attribute is wanted"),
    ],
)
def test_prefixes_that_are_not_there_are_refused(general, specific, message):
    model = prefixes("general", "kind")
    with pytest.raises(ValueError, match=message):
        generate(model, prompts(), general=general, specific=specific)
    assert model.active_adapter == "kind"


def test_the_active_adapter_must_be_a_specific_one():
    model = prefixes("kind", "general")
    with pytest.raises(ValueError, match="the active adapter is 'general', none of kind"):
        FocusedPrefix(model, "general", {"kind": 1.2})


def test_another_kind_of_adapter_is_refused():
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(qft.quantize_model(tiny_lm.model(), "nf2 g64 f16"), prompt, adapter_name="general")
    with pytest.raises(ValueError, match="adapter 'general' is PROMPT_TUNING"):
        generate(model, prompts(), general="general", specific={"general": 1.2})
