"""Every snippet of the documentation runs, or stands in a list here with the reason why not.

The blocks of a page run in order, in one namespace and in one folder, which holds what every page may speak of:
`MODEL`, a dense language model, and `text.txt`. ```python blocks are executed. ```bash blocks run line by line where
every line is a `qft` command. Blocks without a language hold output, trees and formulas, and no command.

docs/methods.md and README's first example have tests of their own (test_methods_page.py, test_readme.py).
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_lm
import torch
from method_sections import namespace

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
ELSEWHERE = {("docs/methods.md", "python"): None, ("README.md", "python"): 1}  # how many blocks; None is all of them

# Blocks that cannot run here, by page and first command, and why.
NOT_RUN = {
    "README.md": {
        "make demo": "takes four minutes (tests/test_demo.py runs a short one), and make test is what runs this",
    },
    "docs/quickstart.md": {
        "pip install torch": "installs; tests/test_packaging.py installs the wheel",
    },
    "docs/benchmarks.md": {
        "qft bench": "takes a minute; the page's next block is a short one",
        "make bench": "takes half an hour; tests/test_bench.py runs a small part",
    },
    "docs/distributed.md": {
        "torchrun --standalone --nproc-per-node 8 train.py": "eight GPUs",
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id qft --rdzv-endpoint HOST:29500 train.py":
            "two machines",
        "accelerate launch --config_file fsdp.yaml --machine_rank 0 train.py":
            "two machines; tests/test_distributed.py reads the file",
        "torchrun --standalone --nproc-per-node 8 -m qft finetune small tuned --data text.txt --batch-size 4":
            "eight GPUs; tests/test_distributed.py runs it with two ranks",
    },
}  # fmt: skip

# Blocks that take for granted what the page speaks of: `model`, dense or packed, `rows` and `collate` of some text, a
# `weight` or `w`, a `linear`, an input `x`. Each runs in a namespace of its own. A block is named by its page and its
# number among the page's python blocks.
FRAGMENTS = {
    ("README.md", 2): "dense",
    ("README.md", 3): "packed",
    ("docs/adding-a-format.md", 1): "dense",
    ("docs/bit-plans.md", 1): "dense",
    ("docs/journey.md", 1): "dense",
    ("docs/starting-points.md", 1): "dense",
    ("docs/starting-points.md", 2): "dense",
}

SLOW = ("docs/adding-a-format.md", "docs/kernels.md", "docs/benchmarks.md")  # they compile formats; it measures


@dataclass(frozen=True)
class Block:
    """A fenced block; `number` counts the page's blocks of this language from 1."""

    page: str
    language: str
    number: int
    line: int
    code: str

    @property
    def first_command(self) -> str:
        return shlex.join(commands(self.code)[0]) if self.language == "bash" else ""


def blocks(page: str) -> Iterator[Block]:
    text, counts = (ROOT / page).read_text(), {}
    for found in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)^ *```$", text, re.M):
        language = found[2].strip()
        counts[language] = counts.get(language, 0) + 1
        code = re.sub(rf"^{found[1]}", "", found[3], flags=re.M)
        yield Block(page, language, counts[language], text[: found.start()].count("\n") + 2, code)


ALL = {page: list(blocks(page)) for page in PAGES}


def commands(code: str) -> list[list[str]]:
    """The words of each command; comments and line ends that go on are the shell's."""
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def runs(block: Block) -> bool:
    last = ELSEWHERE.get((block.page, block.language), 0)
    return block.first_command not in NOT_RUN.get(block.page, {}) and last is not None and block.number > last


RUN = {
    page: [block for block in found if block.language in ("python", "bash") and runs(block)]
    for page, found in ALL.items()
}


def given(model: str, folder: Path) -> dict:
    """What a fragment takes for granted."""
    names = namespace(folder, "cpu")
    linear = torch.nn.Linear(128, 96)
    taken = {name: names[name] for name in ("qft", "torch", "rows", "collate")}
    extra = {"linear": linear, "weight": linear.weight, "w": linear.weight, "x": torch.randn(8, 128)}
    return {**taken, **extra, "model": names["dense" if model == "dense" else "model"]}


def execute(block: Block, names: dict) -> None:
    """Run a python block; a traceback names the page and its line."""
    exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / block.page), "exec"), names)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Models of this size are slower with more."""
    threads(1)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for names it has since renamed
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page, found in RUN.items() if found]
)
def test_a_pages_snippets_run(page, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    tiny_lm.save(tmp_path / "MODEL")
    (tmp_path / "text.txt").write_text("the same few words again and again, and then some others. " * 60)
    names = {"__name__": "__main__"}
    for block in RUN[page]:
        if block.language == "python":
            fragment = FRAGMENTS.get((page, block.number))
            execute(block, given(fragment, tmp_path) if fragment else names)
        for words in commands(block.code) if block.language == "bash" else ():
            assert words[0] == "qft", f"{page}: {words} is no qft command; list its block in NOT_RUN with the reason"
            code, _, err = run(*words[1:])
            assert code == 0, f"{page}: {shlex.join(words)}: {err}"


@pytest.mark.parametrize("page", PAGES)
def test_a_block_says_what_it_is(page):
    for block in ALL[page]:
        assert block.language in ("", "python", "bash", "json", "cpp", "yaml"), f"{page}:{block.line}"
        if not block.language:
            found = re.search(r"^\$?\s*(qft|make|pip|python|torchrun|accelerate|git) [a-zA-Z./-].*", block.code, re.M)
            assert not found, f"{page}:{block.line} holds a command, {found[0]!r}; call the block bash"


def test_every_listed_block_is_there():
    for page, listed in NOT_RUN.items():
        assert set(listed) <= {block.first_command for block in ALL[page]}
        assert all(reason for reason in listed.values())
    numbered = {(page, block.number) for page, found in RUN.items() for block in found if block.language == "python"}
    assert set(FRAGMENTS) <= numbered


def test_blocks_are_found_and_broken_ones_fail(tmp_path):
    (block,) = [block for block in ALL["docs/adding-a-format.md"] if block.language == "python"]
    assert block.code == 'q = qft.quantize(weight, "[-1 -0.25 0.3 1] g64 f16")\n'
    assert (ROOT / block.page).read_text().splitlines()[block.line - 1] == block.code.strip()
    with pytest.raises(NameError, match="weight"):
        execute(block, {"qft": given("dense", tmp_path)["qft"]})
    assert commands("qft a \\\n  --b 'c d'  # why\n# nothing\n\nqft e") == [["qft", "a", "--b", "c d"], ["qft", "e"]]
