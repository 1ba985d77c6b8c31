"""The page about a model: its numbers are the model's, it stands alone, and a browser shows it."""

import copy
import html
import json
import re
from html.parser import HTMLParser

import browser
import pytest
import tiny_lm
import torch
import transformers

import qft
from qft import reference
from qft.analysis import charts
from qft.analysis.report_page import block_of, parts_of, report_page
from qft.analysis.weight_errors import start_errors, weight_errors
from qft.exchange import bitsandbytes

FORMATS = {"*.mlp.*": "nf4 g64 dq", "*.1.self_attn.*": "int3 g64 f16 zero"}
LOSSES = [(step, 5.0 / step) for step in range(1, 41)]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """A model of this size is slower with more."""
    threads(1)


@pytest.fixture(scope="module")
def dense():
    return tiny_lm.model()


@pytest.fixture(scope="module")
def model(dense):
    return qft.quantize_model(copy.deepcopy(dense), "nf2 g64 f16", init="loftq", rank=4, formats=FORMATS)


@pytest.fixture(scope="module")
def page(model, dense):
    return report_page(model, "a <model>", dense, LOSSES)


class Elements(HTMLParser):
    """The elements of a page, as (tag, attributes), and its text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def section(page, name):
    return Elements(re.search(rf'<section id="{name}">.*?</section>', page, re.S)[0])


# ------------------------------------------------------------------------------------------------ the numbers


def test_errors_are_those_of_the_packed_weights(model, dense):
    measured = weight_errors(model, dense)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, qft.QuantLinear)}
    assert measured.relative.keys() == layers.keys()
    for path, layer in layers.items():
        was = dense.get_submodule(path).weight
        q = layer.quant_tensor
        expected = (was - reference.dequantize(q.unpack(), q.scales, q.zeros, q.format)).norm() / was.norm()
        assert measured.relative[path] == pytest.approx(expected.item(), rel=1e-5)
    weights = {}
    for layer in layers.values():
        weights[str(layer.format)] = weights.get(str(layer.format), 0) + layer.in_features * layer.out_features
    assert {fmt: drawn.total for fmt, drawn in measured.histograms.items()} == weights


@pytest.mark.parametrize("spread", [1e-4, 0.1, 0.6])
def test_a_histogram_holds_every_error_where_it_is(spread):
    torch.manual_seed(1)
    was = torch.randn(64, 512)
    layer = torch.nn.Linear(512, 64, bias=False)
    layer.weight = torch.nn.Parameter(was)
    packed = qft.QuantLinear.from_linear(layer, "int8 g64 f32")
    layer.weight = torch.nn.Parameter(packed.dequantize() + spread * torch.randn(64, 512))
    (drawn,) = weight_errors(packed, layer).histograms.values()
    errors = (layer.weight - packed.dequantize()) / layer.weight.square().mean().sqrt()
    centres = torch.tensor([drawn.first + i * drawn.width for i in range(len(drawn.counts))])
    nearest = torch.bucketize(errors.detach().flatten(), (centres[1:] + centres[:-1]) / 2)
    expected = torch.bincount(nearest, minlength=len(centres))
    moved = (expected - torch.tensor(drawn.counts)).abs().sum() / 2
    assert drawn.total == errors.numel()
    assert moved <= 0.02 * errors.numel()  # those within a fine bin of a shown bin's edge
    assert centres[-1] == pytest.approx(-drawn.first)
    assert errors.abs().quantile(0.99) <= centres[-1] + drawn.width


def test_a_layer_of_zeros_has_no_error(dense):
    layer = torch.nn.Linear(64, 32)
    torch.nn.init.zeros_(layer.weight)
    measured = weight_errors(qft.QuantLinear.from_linear(layer, "nf4 g64"), layer)
    assert (measured.relative, measured.histograms) == ({"": 0.0}, {})


def test_another_dense_model_is_refused(model):
    other = tiny_lm.model()
    other.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 95)
    with pytest.raises(ValueError, match=r"up_proj is \[96, 64\] here and \[95, 64\] in the dense model; give"):
        weight_errors(model, other)
    with pytest.raises(ValueError, match=r"no dense weight at model.layers.0.self_attn.q_proj"):
        weight_errors(model, model)
    with pytest.raises(ValueError, match="a name holds no quantized layer"):
        report_page(tiny_lm.model(), "a name")


def test_a_models_bytes_are_its_parts(model, dense):
    parts = {part.kind: part for part in parts_of(model, qft.report(model))}
    assert sum(part.stored for part in parts.values()) == qft.report(model).nbytes
    assert sum(part.dense for part in parts.values()) == qft.report(dense).nbytes
    assert parts["codes"].stored == sum(m.weight.nbytes for m in model.modules() if isinstance(m, qft.QuantLinear))
    assert parts["adapters"].stored == sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    assert parts["embeddings"].stored == parts["embeddings"].dense == dense.model.embed_tokens.weight.nbytes


EXTRA = {"embed_tokens": "int8 g64", "lm_head": "int8 g64"}


def mixture():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=3, **sizes)
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("dense", [tiny_lm.model(), mixture()], ids=["tied", "experts"])
def test_embeddings_experts_and_shared_weights_are_counted_once(dense):
    model = qft.quantize_model(copy.deepcopy(dense), "nf4 g64 f16", formats=EXTRA)
    made, parts = qft.report(model), parts_of(model, qft.report(model))
    assert sum(part.stored for part in parts) == made.nbytes
    assert sum(part.dense for part in parts) == qft.report(dense).nbytes
    measured = weight_errors(model, dense)
    assert measured.relative.keys() == {layer.path for layer in made.quantized}
    assert max(measured.relative.values()) < 0.12  # nf4's error of normal weights is 0.09
    assert sum(drawn.total for drawn in measured.histograms.values()) == made.quantized_parameters
    page = report_page(model, "m", dense)
    assert all(f"<code>{layer.path}</code>" in page for layer in made.quantized)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 4.5, [0, 2, 4]), (0, 0.6, [0, 0.2, 0.4, 0.6]), (3.1, 4.2, [3.5, 4]), (-1.3, 1.3, [-1, 0, 1]), (7, 7, [7])],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_the_smoothed_curve_starts_where_the_curve_does_and_follows_it():
    assert charts.smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    smooth = charts.smoothed([float(step) for step in range(300)])
    assert smooth[0] == 0
    assert 299 - 25 < smooth[-1] < 299  # it lags by about a fifteenth of the run
    assert charts.smoothed([1.0]) == [1.0]


def test_many_steps_are_drawn_as_means():
    points = [(step, float(step % 2)) for step in range(1, 10001)]
    chart = charts.curve(points, charts.smoothed([loss for _, loss in points]))
    assert len(chart.lines[0].points.split()) <= 800
    assert charts.curve([(1, 2.0)], [2.0]).lines[0].points == "0.00,50.00"


def test_layers_are_counted_by_their_error():
    drawn = start_errors([0.1, 0.6, 0.6], bins=6)
    assert (drawn.counts, drawn.width) == ((0, 1, 0, 0, 0, 2), pytest.approx(0.1))


def test_the_block_is_the_first_number_of_a_path():
    paths = {"model.layers.11.mlp.up_proj": 11, "lm_head": None, "0": 0, "h.3.attn.1": 3}
    assert {path: block_of(path) for path in paths} == paths


# ------------------------------------------------------------------------------------------------ the page


def test_bars_are_as_high_as_the_layers_bits_and_errors(page, model, dense):
    made = qft.report(model).quantized
    errors = weight_errors(model, dense).relative
    for name, values in (("bits", [y.bits_per_weight for y in made]), ("error", [errors[y.path] for y in made])):
        bars = [rect for rect in section(page, name).of("rect") if rect["class"].startswith("bits")]
        heights = torch.tensor([float(bar["height"]) for bar in bars])
        assert [int(bar["class"][4:]) for bar in bars] == [layer.format.bits for layer in made]
        assert heights / heights.max() == pytest.approx(torch.tensor(values) / max(values), abs=1e-4)
        assert [float(bar["x"]) for bar in bars] == sorted(float(bar["x"]) for bar in bars)


def test_nothing_is_drawn_outside_its_plot(page):
    rects = Elements(page).of("rect")
    assert len(rects) > 100
    for rect in rects:
        x, y, width, height = (float(rect[name]) for name in ("x", "y", "width", "height"))
        assert -1e-2 <= x <= x + width <= 100.01
        assert -1e-2 <= y <= y + height <= 100.01
    for line in Elements(page).of("polyline"):
        places = [tuple(map(float, point.split(","))) for point in line["points"].split()]
        assert len(places) == len(LOSSES)
        assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in places)


def test_the_page_says_the_models_numbers(page, model):
    text = Elements(page).text
    made = qft.report(model)
    assert f"{made.nbytes / 1e6:,.2f} MB" in text
    assert f"{made.bits_per_weight:.3f}" in text
    assert {str(layer.format) for layer in made.quantized} <= set(re.findall(r"[ni][a-z]+\d g\d+ \w+(?: zero)?", text))
    assert all(layer.path in text for layer in made.layers)
    assert "5.000 at the first step" in text


def test_the_page_stands_alone_and_keeps_strange_names_as_text(page):
    elements = Elements(page)
    assert not {"script", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in elements.found}
    links = [value for _, found in elements.found for name, value in found.items() if name in ("href", "src", "srcset")]
    assert links == ["data:,"]
    assert not re.search(r"https?:|//|@import|url\(", page)
    assert elements.text.count("a <model>") == 2  # title and heading


def test_without_a_dense_model_the_errors_are_the_starts(model):
    text = Elements(report_page(model, "m")).text
    least = {layer.path: min(layer.errors) for layer in qft.report(model).quantized}
    assert f"{max(least.values()):.4f}" in section(report_page(model, "m"), "error").text
    assert "No run has left its losses" in text
    bare = copy.deepcopy(model)
    for layer in bare.modules():
        if isinstance(layer, qft.QuantLinear):
            layer.init_errors = ()
    page = report_page(bare, "m")
    assert "--dense DIR" in section(page, "error").text
    assert 'id="histograms"' not in page


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def saved(model, dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    dense.save_pretrained(folder / "dense")
    qft.save(model, folder / "packed")
    (folder / "packed" / "losses.csv").write_text("step,loss\n1,3.25\n2,3.0\n")
    return folder


def test_the_command_writes_the_page(saved, tmp_path, result, run):
    done = result("report", saved / "packed", tmp_path / "a.html", "--dense", saved / "dense")
    page = (tmp_path / "a.html").read_text()
    assert done["bytes"] == len(page.encode())
    assert "3.250 at the first step" in page
    assert "<h1>packed</h1>" in page
    assert 'id="histograms"' in page
    assert run("report", saved / "packed", tmp_path / "b.html")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "b.html"}


def test_files_of_another_library_have_a_page_too(saved, dense, tmp_path, result):
    packed = qft.quantize_model(copy.deepcopy(dense), "nf4 g32 f32")
    bitsandbytes.write(packed, tmp_path / "theirs")
    result("report", tmp_path / "theirs", tmp_path / "page.html", "--dense", saved / "dense")
    page = (tmp_path / "page.html").read_text()
    measured = weight_errors(packed, dense).relative
    assert f"{max(measured.values()):.4f}" in section(page, "error").text


BAD = {
    "no model": ("{tmp}/none", "{tmp}/a.html", (), "none"),
    "a dense model": ("{saved}/dense", "{tmp}/a.html", (), "quantize"),
    "a folder": ("{saved}/packed", "{tmp}", (), "cannot be a file"),
    "no such folder": ("{saved}/packed", "{tmp}/b/a.html", (), "cannot be a file"),
    "a quantized dense": ("{saved}/packed", "{tmp}/a.html", ("--dense", "{saved}/packed"), "is quantized"),
    "no dense": ("{saved}/packed", "{tmp}/a.html", ("--dense", "{tmp}/none"), "is no directory"),
}


@pytest.mark.parametrize(("source", "out", "more", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_nothing(saved, tmp_path, run, source, out, more, message):
    words = [word.format(tmp=tmp_path, saved=saved) for word in (source, out, *more)]
    code, printed, err = run("report", *words)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_page_that_fails_leaves_the_older_one(saved, tmp_path, run, monkeypatch):
    (tmp_path / "a.html").write_text("older")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    assert run("report", saved / "packed", tmp_path / "a.html") == (2, "", "qft: the disk is full\n")
    assert (tmp_path / "a.html").read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------------ the browser

needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium")

MEASURE = """
const inside = frame.contentDocument, root = inside.documentElement;
const plots = [...inside.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
const marks = [...inside.querySelectorAll(".xs span, .ys span")].map(mark => getComputedStyle(mark).fontSize);
document.title = JSON.stringify({
  across: root.scrollWidth, plots: plots.length, narrowest: Math.min(...plots.map(plot => plot.width)),
  lowest: Math.min(...plots.map(plot => plot.height)), smallest: Math.min(...marks.map(parseFloat)),
  background: getComputedStyle(inside.body).backgroundColor});
"""


def shown(page, folder, width, *options):
    """What a browser makes of the page in a frame of this width."""
    frame = f'<iframe id="frame" style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    script = f"<script>frame.onload = () => {{{MEASURE}}}</script>"
    (folder / "frame.html").write_text(f'<!doctype html><meta charset="utf-8">{frame}{script}', encoding="utf-8")
    dom, console = browser.visit(folder / "frame.html", *options)
    assert not console
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_on_a_phone_and_a_desk(page, tmp_path, width):
    seen = shown(page, tmp_path, width)
    assert seen["across"] <= width  # nothing to scroll sideways
    assert seen["plots"] == 6  # bits, errors, three histograms, losses
    assert seen["narrowest"] >= 240
    assert seen["lowest"] >= 100
    assert seen["smallest"] >= 12  # pixels


@needs_browser
def test_it_follows_the_readers_colours(page, tmp_path):
    light = shown(page, tmp_path, 800)["background"]
    dark = shown(page, tmp_path, 800, "--blink-settings=preferredColorScheme=0")["background"]
    assert light == "rgb(245, 245, 242)"
    assert dark == "rgb(17, 19, 23)"


@needs_browser
def test_a_browser_finds_nothing_to_complain_of(page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    dom, console = browser.visit(tmp_path / "page.html")
    assert not console
    seen, sent = Elements(dom), Elements(page)
    for tag in ("section", "svg", "rect", "polyline", "title", "table", "tr", "td", "figure"):
        assert len(seen.of(tag)) == len(sent.of(tag)) > 0, tag
    (tmp_path / "broken.html").write_text("<script>throw Error('seen')</script>")
    assert "seen" in "".join(browser.visit(tmp_path / "broken.html")[1])  # so that silence means something
