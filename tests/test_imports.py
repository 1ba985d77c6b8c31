"""Importing is free and runs one way."""

import ast
import importlib.util
from pathlib import Path

import pytest

import qft

PACKAGE = Path(qft.__file__).parent

# A module may import those before it, never one after: a new module takes its place here.
ORDER = (
    "qft.notices",
    "qft.disk",
    "qft.disk.files",
    "qft.import_hook",
    "qft.format",
    "qft.compiler",
    "qft.compiler.emit",
    "qft.compiler.jit",
    "qft.compiler.__main__",
    "qft.reference",
    "qft.double_quant",
    "qft.native",
    "qft.crossovers",
    "qft.kernels",
    "qft.tensor",
    "qft.stack",
    "qft.nn",
    "qft.nn.casts",
    "qft.ops",
    "qft.nn.fused_lora",
    "qft.nn.packed",
    "qft.nn.linear",
    "qft.nn.embedding",
    "qft.nn.experts",
    "qft.disk.tensor_file",
    "qft.adapters",
    "qft.adapters.scales",
    "qft.adapters.shared_input",
    "qft.adapters.pooled",
    "qft.adapters.adapted",
    "qft.adapters.glora",
    "qft.adapters.glora_search",
    "qft.adapters.glora_file",
    "qft.adapters.multilora",
    "qft.adapters.peft_format",
    "qft.init.svd",
    "qft.init.factors",
    "qft.init.second_moment",
    "qft.init.weighted",
    "qft.init.plain",
    "qft.init.uniform",
    "qft.init.quantizers",
    "qft.init.search",
    "qft.init.loftq",
    "qft.init.qera_diag",
    "qft.init.qera_exact",
    "qft.init.lqlora",
    "qft.init.gptq",
    "qft.init.cloq",
    "qft.init",
    "qft.measure",
    "qft.measure.plan",
    "qft.model",
    "qft.model.progress",
    "qft.model.targets",
    "qft.model.layer_report",
    "qft.model.surgery",
    "qft.model.prepare",
    "qft.disk.manifest",
    "qft.disk.skeleton",
    "qft.disk.described",
    "qft.disk.io",
    "qft.disk.read_ahead",
    "qft.disk.dense_checkpoint",
    "qft.disk.shards",
    "qft.disk.checkpoint",
    "qft.training",
    "qft.training.ranks",
    "qft.exchange",
    "qft.exchange.words",
    "qft.exchange.integer_grid",
    "qft.exchange.checkpoint_tensors",
    "qft.exchange.directory_writer",
    "qft.exchange.integer_layers",
    "qft.exchange.gptq",
    "qft.exchange.compressed_tensors",
    "qft.exchange.dense",
    "qft.exchange.checkpoint_files",
    "qft.exchange.bitsandbytes_weight",
    "qft.exchange.loader",
    "qft.exchange.bitsandbytes_experts",
    "qft.exchange.bitsandbytes",
    "qft.disk.directory",
    "qft.training.losses",
    "qft.training.data",
    "qft.training.evaluate",
    "qft.measure.activations",
    "qft.measure.calibration",
    "qft.disk.streaming",
    "qft.measure.measured_plan",
    "qft.disk.pretrained",
    "qft.training.finetune",
    "qft.analysis.cost",
    "qft.recipes",
    "qft.recipes.rilq",
    "qft.recipes.longlora",
    "qft.recipes.online",
    "qft.recipes.focused_prefix",
    "qft.recipes.rank_sweep",
    "qft.compose.library",
    "qft.compose.pairs",
    "qft.compose.lorahub",
    "qft.compose.ziplora",
    "qft.compose",
    "qft.analysis.intruder",
    "qft.analysis.intrinsic",
    "qft.analysis.weight_errors",
    "qft.analysis.charts",
    "qft.analysis.report_page",
    "qft.analysis",
    "qft.integrations",
    "qft.integrations.peft_weight",
    "qft.integrations.peft_start",
    "qft.integrations.peft_dora",
    "qft.integrations.peft_embedding",
    "qft.integrations.peft",
    "qft.integrations.peft_merge",
    "qft.integrations.fsdp",
    "qft.integrations.gather",
    "qft.integrations.sharded_checkpoint",
    "qft.integrations.transformers_config",
    "qft.integrations.transformers",
    "qft.integrations.transformers_model",
    "qft.machine",
    "qft.speed",
    "qft.speed.limits",
    "qft.speed.clock",
    "qft.speed.roofline",
    "qft.speed.check",
    "qft.speed.verbs",
    "qft.speed.short_table",
    "qft.training.job",
    "qft.figure",
    "qft.measure.plan_figure",
    "qft.demo",
    "qft.cli.app",
    "qft.cli.options",
    "qft.cli.output",
    "qft.cli.models",
    "qft.cli.calibrate",
    "qft.cli.adapter",
    "qft.cli.bench",
    "qft.cli.compose",
    "qft.cli.demo",
    "qft.cli.evaluate",
    "qft.cli.explain",
    "qft.cli.export",
    "qft.cli.finetune",
    "qft.cli.generate",
    "qft.cli.info",
    "qft.cli.merge",
    "qft.cli.plan",
    "qft.cli.quantize",
    "qft.cli.report",
    "qft.cli.sweep",
    "qft.cli",
    "qft.__main__",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


class Imports(ast.NodeVisitor):
    """The qft modules a file imports, inside functions too; what only a type checker reads is left out."""

    def __init__(self, module: str):
        self.package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        self.found: set[str] = set()

    def visit_If(self, node):
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "qft"}

    def visit_ImportFrom(self, node):
        name = importlib.util.resolve_name("." * node.level + (node.module or ""), self.package)
        if name.split(".")[0] == "qft":
            inner = {f"{name}.{alias.name}" for alias in node.names}
            self.found |= {module for module in inner if module in MODULES} or {name}


def imports_of(module: str) -> set[str]:
    visitor = Imports(module)
    visitor.visit(ast.parse(MODULES[module].read_text()))
    return visitor.found - {"qft", "qft._native"}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "qft"])
def test_imports_run_one_way(module):
    assert module in ORDER, f"{module} has no place in ORDER yet"
    before = ORDER[: ORDER.index(module)]
    assert imports_of(module) <= set(before)


def test_the_order_is_seen_to_be_broken():
    assert imports_of("qft.tensor") >= {"qft.kernels", "qft.reference", "qft.double_quant", "qft.format"}
    assert "qft.tensor" not in imports_of("qft.kernels")  # only its type checker reads it
    assert imports_of("qft.compiler.emit") == {"qft.format"}


def test_files_are_named_for_what_they_hold():
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


@pytest.mark.parametrize("module", MODULES)
def test_one_environment_variable_and_no_other(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            assert module == "qft.compiler.jit"
    if module == "qft.compiler.jit":
        assert MODULES[module].read_text().count("environ") == MODULES[module].read_text().count(
            'environ.get("QFT_CACHE")'
        )


@pytest.mark.parametrize("module", MODULES)
def test_bad_input_is_never_an_assertion_or_a_runtime_error(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno} asserts"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "RuntimeError" not in ast.unparse(node.exc), f"line {node.lineno} raises RuntimeError"


LOADED = "print(sorted({'torch', 'numpy', 'transformers', 'peft', 'matplotlib'} & {*sys.modules}))"


@pytest.mark.parametrize(
    ("program", "loaded"),
    [
        ("import qft", []),
        ("import qft; qft.Format.parse('nf4 g64')", []),
        ("import qft; dir(qft)", []),
        ("import qft; qft.QuantLinear; qft.quantize", ["numpy", "torch"]),
    ],
)
def test_importing_loads_nothing_before_its_time(python, program, loaded):
    assert python(f"import sys; {program}; {LOADED}") == f"{loaded}\n"


def test_importing_leaves_the_gpu_alone(python):
    assert python("import qft, torch; qft.quantize; qft.QuantLinear; print(torch.cuda.is_initialized())") == "False\n"


@pytest.mark.parametrize("name", qft.__all__)
def test_every_public_name_is_there_and_explained(name):
    assert getattr(qft, name).__doc__
    assert name in dir(qft)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'qft' has no attribute 'quantise'"):
        _ = qft.quantise
