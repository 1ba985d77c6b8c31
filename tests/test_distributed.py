"""Two ranks train what one process trains: FSDP2, DDP, accelerate, sharded checkpoints, and `qft finetune`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_lm
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from accelerate.utils.constants import FSDP_AUTO_WRAP_POLICY
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

import qft
from qft.nn.casts import in_stored_dtypes

WORKER = Path(__file__).with_name("distributed_worker.py")
PAIRS = (
    "killed_while_it_writes",
    "killed_before_the_seal",
    "after_the_kills,same_loss,same_loss_in_bf16,kept_dtypes,through_accelerate,through_trainer,saved_and_loaded,unusual_models,"
    "an_encoder_and_decoder,refusals",
)
CLOSE = 1e-5  # nats per token, between one process and two


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "error", str(WORKER), str(folder), *PAIRS]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return {"stderr": ended.stderr, **json.loads((folder / "results.json").read_text())}


@pytest.fixture
def of(results):
    def case(name):
        found = results.get(name, results["stderr"])
        assert isinstance(found, dict), found  # a traceback
        return found

    return case


SETTINGS = [
    *(f"qlora, {what}" for what in ("double quantization", "zero points", "257 rows", "peft", "ddp")),
    *(f"peqa, {what}" for what in ("double quantization", "257 rows", "ddp")),
]


@pytest.mark.parametrize("setting", ["qlora", "peqa", *SETTINGS])
def test_two_ranks_train_to_the_loss_of_one_process(of, setting):
    assert of("same_loss")[setting] <= CLOSE
    assert of("same_loss").keys() == {"qlora", "peqa", *SETTINGS}


@pytest.mark.parametrize("setting", ["qlora", "qlora, f16 scales", "peqa"])
def test_under_a_bf16_policy_what_is_packed_stays_as_stored(of, setting):
    found = of("same_loss_in_bf16")
    assert found[setting] <= CLOSE  # to one process whose dense modules alone are in bf16
    assert found["rounded"] > CLOSE  # so the policy did something


def test_codes_are_sharded_by_rows_and_gathered_with_scales_in_their_dtype(of):
    found = of("kept_dtypes")
    assert found["sharded"] == ["torch.uint8", [96, 32], [48, 32]]
    assert found["qft"] == {"scales": "torch.float32", "rows": 96}
    assert found["qft says"] == []
    assert found["groups"].count("FSDPLlamaDecoderLayer") == 2
    assert found["groups"].count("FSDPLlamaRMSNorm") == 4  # the dense modules of the two blocks, in the other dtype


def test_a_policy_that_casts_scales_is_said_once(of):
    found = of("kept_dtypes")
    assert found["torch"] == {"scales": "torch.bfloat16", "rows": 96}
    (sentence,) = found["torch says"]
    assert sentence.startswith("weight_scales of nf4 g64 f32 is torch.float32 and was cast to torch.bfloat16")
    (sentence,) = found["torch says of dq"]
    assert sentence.startswith("weight_scales_absmax of nf4 g64 dq is torch.float32 and was cast to torch.bfloat16")
    assert found["torch trains"]


@pytest.mark.parametrize("setting", ["peft", "peqa", "ours, peft", "ours, peqa", "ours, in bf16"])
def test_accelerate_shards_a_model_and_takes_one_that_is_sharded(of, setting):
    assert of("through_accelerate")[setting] <= CLOSE


def test_accelerates_own_bf16_casts_the_scales_which_is_said(of):
    assert ["was cast to torch.bfloat16" in sentence for sentence in of("through_accelerate")["bf16 says"]] == [True]


def test_trainer_takes_a_sharded_model_and_goes_on_from_its_checkpoint(of):
    found = of("through_trainer")
    assert found["sharded"]
    whole, resumed = found["losses"]
    assert len(whole) == 2
    assert resumed == whole


def test_a_sharded_run_goes_on_from_its_checkpoint(of):
    found = of("saved_and_loaded")
    assert (found["step"], found["of nothing"], found["frozen"]) == (2, 0, 2)
    assert found["trained"] <= CLOSE  # four steps of one process, two and two of two


def test_a_gathered_model_is_the_model(of):
    found = of("saved_and_loaded")
    assert found["whole on"] == 0
    assert found["class"] == "LlamaForCausalLM LlamaDecoderLayer"
    assert found["frozen ones"]
    assert found["reloaded"]
    assert found["hooks"] == 0
    assert found["held by the second rank"] == 1


def test_a_checkpoint_that_does_not_fit_or_cannot_be_written(of):
    found = of("saved_and_loaded")
    assert found["another model"].startswith("FormatError: ")
    assert "weight_scales" in found["another model"]
    assert found["no place"].startswith("OSError: ")
    assert found["keep"] == "ValueError: keep=0 would delete the checkpoint just written; use 1 or more"


@pytest.mark.parametrize(("place", "killed"), [("writing", [1, -9]), ("sealing", [-9, 1])])
def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(of, results, place, killed):
    assert killed in results["exit codes"]
    found = of("after_the_kills")[place]
    assert "__1_0.distcp" in found["files"]  # it had begun
    assert found["step"] == 1
    assert found["goes on"]
    (sentence,) = found["says"]
    assert "checkpoint-2 is incomplete and was skipped" in sentence


@pytest.mark.parametrize(
    "what",
    [
        "checkpointing",
        "shared inputs",
        "shared blocks",
        "tied blocks",
        "tied to the rest",
        "tied packed",
        "experts",
        "two-dimensional mesh",
    ],
)
def test_models_of_unusual_shapes(of, what):
    assert of("unusual_models")[what] <= CLOSE


def test_what_is_shared_stays_shared(of):
    found = of("unusual_models")
    assert found["share still"]
    assert found["tied still"]
    assert found["tied, in bf16"] <= CLOSE
    assert found["experts, in bf16"] == "torch.bfloat16"


def test_codes_that_torch_cannot_find_stay_whole_and_inputs_shared_across_blocks_part(of):
    found = of("an_encoder_and_decoder")
    parted, whole = found["says"]
    assert parted.startswith("layers of several blocks shared their LoRA's input")
    assert whole.startswith("encoder.block.0.layer.1.DenseReluDense.wo, ")
    assert found["difference"] <= CLOSE


def test_refusals_name_the_way_out(of):
    found = of("refusals")
    assert found["twice"].endswith("call fully_shard once, on the whole model")
    assert "lora_A in torch.float32 and model.layers.0.input_layernorm.weight in torch.bfloat16" in found["mixed"]
    for call in ("dequantize", "save"):
        assert found[call].startswith("ValueError: ")
        assert "qft.gather_model(model)" in found[call]


# ------------------------------------------------------------------------------------------------- in this process


def test_the_pages_configuration_is_one_that_accelerate_reads(tmp_path):
    page = (WORKER.parent.parent / "docs" / "distributed.md").read_text()
    path = tmp_path / "fsdp.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    config = load_config_from_file(str(path))
    assert config.fsdp_config["fsdp_auto_wrap_policy"] in FSDP_AUTO_WRAP_POLICY
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == (DistributedType.FSDP, "no", 16)


def test_without_a_process_group(tmp_path):
    model = qft.quantize_model(tiny_lm.model(), "nf4 g64", rank=2)
    for call in (
        lambda: qft.fully_shard(model),
        lambda: qft.save_sharded(model, tmp_path, 1),
        lambda: qft.load_sharded(model, tmp_path),
    ):
        with pytest.raises(ValueError, match="there is no process group; start with torchrun"):
            call()
    whole = qft.gather_model(model)
    assert whole is not model
    assert all(torch.equal(a, b) and a is not b for a, b in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_blocks_are_members_of_module_lists_however_deep(one_rank):
    """Those of a list in a list too; a list of single layers is no list of blocks."""

    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])])
            self.heads = nn.ModuleList([nn.Linear(64, 8), nn.Linear(64, 8)])

        def forward(self, x):
            for stage in self.stages:
                for block in stage:
                    x = block(x)
            return [head(x) for head in self.heads]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU())])

        def forward(self, x):
            return self.inner[0](x)

    model = qft.quantize_model(Lists(), "nf4 g64 f32")
    x = torch.randn(2, 64)
    expected = model(x)
    qft.fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
    groups = [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]
    assert groups == ["FSDPLists", "FSDPBlock", "FSDPBlock", "FSDPBlock"]
    assert all(map(torch.equal, model(x), expected))


def test_checkpoints_of_one_rank(one_rank, tmp_path):
    model = qft.train_only(qft.quantize_model(tiny_lm.model(), "nf4 g64", rank=2), "lora")
    layer = model.model.layers[0].self_attn.q_proj
    path = qft.save_sharded(model, tmp_path, 7)
    before = layer.lora_A.detach().clone()
    for step in (8, 9):
        nn.init.zeros_(layer.lora_A)
        qft.save_sharded(model, tmp_path, step)
    assert not path.exists()  # two are kept
    assert qft.load_sharded(model, tmp_path) == 9
    (tmp_path / "checkpoint-9" / "complete.json").unlink()
    with torch.no_grad():
        layer.lora_A.copy_(before)
    assert qft.load_sharded(model, tmp_path) == 8
    assert not layer.lora_A.any()


def test_what_does_not_train_is_not_in_a_checkpoint(one_rank, tmp_path):
    """Not under its second name either: the head is tied to the embedding."""
    model = qft.train_only(qft.quantize_model(tiny_lm.model(), "nf4 g64", rank=2), "lora")
    trained = {f"model.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}

    def names(**options):
        path = qft.save_sharded(model, tmp_path, 1, **options)
        return set(FileSystemReader(path).read_metadata().state_dict_metadata)

    assert {name for name in names() if not name.endswith("weight_format")} == trained
    assert {"model.lm_head.weight", "model.model.layers.0.self_attn.q_proj.weight"} < names(frozen=True)


@pytest.mark.parametrize("fmt", ["nf4 g64 f32", "int4 g32 f16 zero", "nf4 g64 dq"])
def test_stored_tensors_in_the_formats_dtypes_are_taken_as_they_are(fmt):
    q = qft.quantize(torch.randn(8, 64), fmt)
    assert in_stored_dtypes(q) is q


def test_a_cast_that_rounds_nothing_is_undone_without_a_word(caplog):
    layer = qft.QuantLinear.from_linear(nn.Linear(64, 8), "int4 g32 f16 zero")
    x = torch.randn(2, 64)
    expected = layer(x)
    for name in ("weight_scales", "weight_zeros"):
        layer._parameters[name].data = layer._parameters[name].data.float()
    assert torch.equal(layer(x), expected)
    assert not caplog.records


def test_scales_that_were_cast_compile_in_one_graph():
    layer = qft.QuantLinear.from_linear(nn.Linear(64, 8), "nf4 g64 f32")
    layer._parameters["weight_scales"].data = layer._parameters["weight_scales"].data.bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64)
    assert torch.allclose(compiled(x), layer(x))


def test_a_layers_output_is_no_view():
    """FSDP2 warns of views, and an operation in place on one would go past its hooks."""
    x = torch.randn(2, 3, 64)
    assert qft.QuantLinear.from_linear(nn.Linear(64, 8), "nf4 g64")(x)._base is None


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qft"]


@pytest.fixture
def finetune(tmp_path):
    """The command that tunes a small model, after the words that start qft."""
    dense, data = tiny_lm.save(tmp_path / "dense"), tmp_path / "text.txt"
    data.write_text("the same few words again and again, and then some others. " * 60)

    def command(start, out, rows, *more):
        words = ["--data", str(data), "--format", "nf4 g64 f32", "--learning-rate", "1e-3", "--block-size", "32"]
        return [*start, "finetune", str(dense), str(out), *words, "--json", "--batch-size", str(rows), *more]

    return command


def ended(command):
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # said by the first rank alone


@pytest.mark.slow
def test_finetune_under_torchrun_trains_as_one_process(finetune, tmp_path):
    losses, models = {}, {}
    for name, start, rows in (("one", [sys.executable, "-m", "qft"], 4), ("two", TORCHRUN, 2)):
        out = tmp_path / name
        assert ended(finetune(start, out, rows, "--steps", "4", "--save-every", "2"))["steps"] == 4
        losses[name] = [float(line.split(",")[1]) for line in (out / "losses.csv").read_text().splitlines()[1:]]
        models[name] = qft.load(out)
    assert len(losses["one"]) == 4
    assert losses["two"] == pytest.approx(losses["one"], abs=CLOSE)
    ids = torch.randint(0, 256, (2, 16))
    assert torch.allclose(models["one"](ids).logits, models["two"](ids).logits, atol=1e-4)


@pytest.mark.slow
def test_finetune_goes_on_after_a_rank_was_killed(finetune, tmp_path):
    more = ("--steps", "60", "--save-every", "20")
    ended(finetune(TORCHRUN, tmp_path / "whole", 2, *more))
    command = finetune(TORCHRUN, tmp_path / "killed", 2, *more)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as torchrun:
        while not (tmp_path / "killed" / "run" / "checkpoints" / "checkpoint-20" / "complete.json").exists():
            assert torchrun.poll() is None, torchrun.stderr.read()
            time.sleep(0.01)
        ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        torchrun.communicate(timeout=100)
    assert torchrun.returncode != 0
    assert ended(command)["resumed from step"] >= 20
    for name in ("model.safetensors", "losses.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
