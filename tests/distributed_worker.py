"""Two ranks on the CPU, for tests/test_distributed.py: `python distributed_worker.py FOLDER CASE[,CASE...]...`.

One process imports everything and forks the ranks, a new pair for each argument, which meet over a file in FOLDER. In
FOLDER/results.json are, by name, what a case returned on the first rank, or its error; and the exit codes of each pair.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
import weakref
from pathlib import Path

import peft
import tiny_lm
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint import filesystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import qft
import qft.disk.checkpoint
import qft.notices

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
RANKS = 2
LIMIT = 80  # seconds for the cases of a pair of ranks
STEPS = 2
IDS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(2))


MOE = transformers.MixtralConfig(
    vocab_size=257,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=3,
    max_position_embeddings=64,
)
T5 = transformers.T5Config(
    vocab_size=257, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
)


def lora(fmt="nf4 g64 f32", rank=3, formats=None, **arguments):
    """A quantized Llama whose LoRA trains: 3 rows of A over 2 ranks, and 257 of the head where `formats` names it."""
    torch.manual_seed(0)
    model = qft.quantize_model(tiny_lm.model(), fmt, rank=rank, formats=formats, **arguments)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    return qft.train_only(model, "lora").train()


def scales(fmt="nf4 g64 f32", **arguments):
    return qft.train_only(qft.quantize_model(tiny_lm.model(), fmt, **arguments), "scales").train()


def experts():
    """3 experts over 2 ranks."""
    torch.manual_seed(0)
    model = qft.quantize_model(transformers.MixtralForCausalLM(MOE), "nf4 g64 f32", rank=2)
    return qft.train_only(model, "scales").train()


def with_peft(fmt="nf4 g64 f32"):
    torch.manual_seed(0)
    model = qft.quantize_model(tiny_lm.model(), fmt)
    config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def with_checkpointing(model):
    return qft.prepare_for_training(model, gradient_checkpointing=True)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


def train(model, batches, steps=STEPS, optimizer=None):
    """Losses `[steps]`, each the mean over the batches, whose gradients are averaged."""
    optimizer = optimizer or optimizer_of(model)
    losses = torch.zeros(steps)
    for step in range(steps):
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
            losses[step] += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def mine():
    """This rank's half of the batch."""
    return [IDS.chunk(RANKS)[dist.get_rank()]]


def averaged(losses):
    dist.all_reduce(losses)
    return losses / RANKS


def difference(one, sharded, batches=(IDS,)):
    """The largest difference of losses between one process and the ranks."""
    return (train(one, batches) - averaged(train(sharded, mine()))).abs().max().item()


def said(function):
    """What qft warns of while `function` runs."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("qft").addHandler(handler)
    qft.notices.say_once.cache_clear()
    try:
        function()
    finally:
        logging.getLogger("qft").removeHandler(handler)
    return lines


def most_held(gather):
    """How many whole tensors the second rank has at once at most, and what `gather` returns."""
    whole, counts, full_tensor = [], [0], DTensor.full_tensor

    def counted(self):
        counts.append(1 + sum(reference() is not None for reference in whole))
        made = full_tensor(self)
        whole.append(weakref.ref(made))
        return made

    DTensor.full_tensor = counted
    try:
        gathered = gather()
    finally:
        DTensor.full_tensor = full_tensor
    most = torch.tensor(max(counts))
    dist.broadcast(most, src=1)
    return most.item(), gathered


def message(function):
    try:
        function()
    except (ValueError, TypeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def dense_in_bf16(model):
    """What FSDP2 computes with under bf16: dense modules' Parameters in bf16, packed modules' as they are."""
    for module in model.modules():
        for parameter in module._parameters.values() if not isinstance(module, qft.QuantLinear) else ():
            if parameter is not None:
                parameter.data = parameter.data.bfloat16()
    return model


# ------------------------------------------------------------------------------------------------------------- cases


def same_loss(folder):
    int4 = {"fmt": "int4 g32 f16 zero"}
    head = {"formats": {"lm_head": "int8 g32 f32"}}
    return {
        "qlora": difference(lora(), qft.fully_shard(lora())),
        "qlora, double quantization": difference(lora("nf4 g64 dq"), qft.fully_shard(lora("nf4 g64 dq"))),
        "qlora, zero points": difference(lora(**int4), qft.fully_shard(lora(**int4))),
        "qlora, 257 rows": difference(lora(**head), qft.fully_shard(lora(**head))),
        "qlora, peft": difference(with_peft(), qft.fully_shard(with_peft())),
        "qlora, ddp": difference(lora(), DistributedDataParallel(lora())),
        "peqa": difference(scales(), qft.fully_shard(scales())),
        "peqa, double quantization": difference(scales("nf4 g64 dq"), qft.fully_shard(scales("nf4 g64 dq"))),
        "peqa, 257 rows": difference(scales(**head), qft.fully_shard(scales(**head))),
        "peqa, ddp": difference(scales(), DistributedDataParallel(scales())),
    }


def same_loss_in_bf16(folder):
    """Against one process that computes each half of the batch as its rank does."""
    halves = IDS.chunk(RANKS)
    return {
        "qlora": difference(dense_in_bf16(lora()), qft.fully_shard(lora(), mp_policy=BF16), halves),
        "qlora, f16 scales": difference(
            dense_in_bf16(lora("int4 g32 f16 zero")), qft.fully_shard(lora("int4 g32 f16 zero"), mp_policy=BF16), halves
        ),
        "peqa": difference(dense_in_bf16(scales()), qft.fully_shard(scales(), mp_policy=BF16), halves),
        "rounded": difference(lora(), qft.fully_shard(lora(), mp_policy=BF16)),
    }


def kept_dtypes(folder):
    """What forward sees, under qft's fully_shard and under torch's."""
    seen = {}

    def look(layer, args):
        seen["scales"] = str(layer.weight_scales.dtype)
        seen["rows"] = len(layer.weight)

    def forward(model):
        model.model.layers[0].mlp.up_proj.register_forward_pre_hook(look)
        model(input_ids=IDS)
        return dict(seen)

    def torchs(model):
        for block in model.model.layers:
            torch_fully_shard(block, mp_policy=BF16)
        return torch_fully_shard(model, mp_policy=BF16)

    ours, theirs = qft.fully_shard(lora(), mp_policy=BF16), torchs(lora())
    codes = ours.model.layers[0].mlp.up_proj.weight
    blocks = [type(m).__name__ for m in ours.modules() if isinstance(m, FSDPModule)]
    return {
        "sharded": [str(codes.dtype), list(codes.shape), list(codes.to_local().shape)],
        "groups": blocks,
        "qft": forward(ours),
        "qft says": said(lambda: ours(input_ids=IDS)),
        "torch": forward(theirs),
        "torch says": said(lambda: [theirs(input_ids=IDS) for _ in range(2)]),
        "torch says of dq": said(lambda: torchs(lora("nf4 g64 dq"))(input_ids=IDS)),
        "torch trains": train(torchs(scales()), mine()).isfinite().all().item(),
    }


def take_fsdp(accelerator, plugin):
    """accelerate takes FSDP2 on GPUs alone: tell it that it has chosen it."""
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def through_accelerate(folder):
    def prepared(model, mixed_precision="no", **arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **arguments)
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=mixed_precision)
        take_fsdp(accelerator, plugin)
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
        return accelerator.prepare(model, optimizer_of(model))

    def its_own(model, mixed_precision="no"):
        wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
        return prepared(model, mixed_precision, **wrap)

    def after_ours(model, **arguments):
        return prepared(qft.fully_shard(model, **arguments), auto_wrap_policy="no_wrap")

    def apart(make, how, one=None, batches=(IDS,), **arguments):
        model, optimizer = how(make(), **arguments)
        losses = averaged(train(model, mine(), optimizer=optimizer))
        return (train(one or make(), batches) - losses).abs().max().item()

    return {
        "peft": apart(with_peft, its_own),
        "peqa": apart(scales, its_own),
        "ours, peft": apart(with_peft, after_ours),
        "ours, peqa": apart(scales, after_ours),
        "ours, in bf16": apart(lora, after_ours, dense_in_bf16(lora()), IDS.chunk(RANKS), mp_policy=BF16),
        "bf16 says": said(lambda: train(its_own(with_peft(), "bf16")[0], mine())),
    }


def through_trainer(folder):
    """transformers' Trainer, whose accelerate finds a sharded model; then once more from its first checkpoint."""
    init = Accelerator.__init__

    def with_fsdp(self, *args, **kwargs):
        init(self, *args, **kwargs)
        take_fsdp(self, FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT"))

    arguments = transformers.TrainingArguments(
        output_dir=folder / "trainer",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_steps=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    losses = []
    Accelerator.__init__ = with_fsdp
    try:
        for start in (None, folder / "trainer" / "checkpoint-1"):
            model = qft.fully_shard(with_peft(), mp_policy=BF16)
            trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
            trainer.train(resume_from_checkpoint=start and str(start))
            arguments.save_strategy = "no"  # the second run would write over the first's
            losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    finally:
        Accelerator.__init__ = init
    return {"losses": losses, "sharded": isinstance(trainer.model_wrapped, FSDPModule)}


def saved_and_loaded(folder):
    (folder / "file").write_text("no directory")
    one, sharded = lora(), qft.fully_shard(lora())
    optimizer = optimizer_of(sharded)
    train(one, [IDS], 2 * STEPS)
    train(sharded, mine(), optimizer=optimizer)
    qft.save_sharded(sharded, folder / "run", 1, optimizer)
    qft.save_sharded(sharded, folder / "run", STEPS, optimizer)
    qft.save_sharded(sharded, folder / "frozen", STEPS, frozen=True)
    again = qft.fully_shard(lora())
    its_optimizer = optimizer_of(again)
    its_optimizer.param_groups[0]["lr"] = 0.5  # the checkpoint knows better
    step = qft.load_sharded(again, folder / "run", its_optimizer)
    train(again, mine(), optimizer=its_optimizer)
    most, whole = most_held(lambda: qft.gather_model(again))
    results = {
        "held by the second rank": most,
        "step": step,
        "of nothing": qft.load_sharded(again, folder / "nothing", its_optimizer),
        "frozen": qft.load_sharded(qft.fully_shard(lora()), folder / "frozen"),
        "another model": message(lambda: qft.load_sharded(qft.fully_shard(scales()), folder / "run")),
        "no place": message(lambda: qft.save_sharded(again, folder / "file", 1)),
        "keep": message(lambda: qft.save_sharded(again, folder / "run", 1, keep=0)),
        "whole on": dist.get_rank() if whole is not None else None,
    }
    if whole is not None:
        qft.save(whole, folder / "model")
        loaded = qft.load(folder / "model")
        results["class"] = f"{type(whole).__name__} {type(whole.model.layers[0]).__name__}"
        results["trained"] = max(
            (a - b).abs().max().item()
            for a, b in zip(one.parameters(), whole.parameters(), strict=True)
            if a.requires_grad and b.requires_grad
        )
        results["frozen ones"] = all(
            torch.equal(a, b)
            for a, b in zip(one.parameters(), whole.parameters(), strict=True)
            if not a.requires_grad and not b.requires_grad
        )
        results["reloaded"] = torch.equal(loaded(input_ids=IDS).logits, whole.eval()(input_ids=IDS).logits)
        results["hooks"] = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in whole.modules())
    return results


def unusual_models(folder):
    results = {"checkpointing": difference(lora(), qft.fully_shard(with_checkpointing(lora())))}

    def shared_blocks():
        torch.manual_seed(0)
        model = lora()
        model.model.layers[1] = model.model.layers[0]  # one module twice, as in Albert
        return model

    def tied_blocks():
        model = lora()
        model.model.layers[1].mlp.up_proj.lora_A = model.model.layers[0].mlp.up_proj.lora_A
        return model

    def tied_to_the_rest():
        model = lora()
        model.model.norm.weight = model.model.layers[0].input_layernorm.weight
        return model

    def tied_packed():
        formats = {"embed_tokens": "int8 g32 f32", "lm_head": "int8 g32 f32"}
        return scales(formats=formats)

    def sharing():
        model = lora()
        qft.share_inputs(model, input_ids=IDS)
        return model

    sharded = qft.fully_shard(sharing())
    results["shared inputs"] = difference(sharing(), sharded)
    results["share still"] = sharded.model.layers[0].self_attn.q_proj.shared_input is not None
    results["shared blocks"] = difference(shared_blocks(), qft.fully_shard(shared_blocks()))
    tied = qft.fully_shard(tied_blocks())
    results["tied blocks"] = difference(tied_blocks(), tied)
    results["tied still"] = tied.model.layers[0].mlp.up_proj.lora_A is tied.model.layers[1].mlp.up_proj.lora_A
    results["tied, in bf16"] = difference(
        dense_in_bf16(tied_blocks()), qft.fully_shard(tied_blocks(), mp_policy=BF16), IDS.chunk(RANKS)
    )
    results["tied to the rest"] = difference(tied_to_the_rest(), qft.fully_shard(tied_to_the_rest()))
    results["tied packed"] = difference(tied_packed(), qft.fully_shard(tied_packed()))
    results["experts"] = difference(experts(), qft.fully_shard(experts()))
    results["experts, in bf16"] = str(qft.fully_shard(experts(), mp_policy=BF16)(input_ids=IDS).logits.dtype)
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("replicate", "shard"))
    results["two-dimensional mesh"] = difference(lora(), qft.fully_shard(lora(), mesh))
    return results


def an_encoder_and_decoder(folder):
    """T5 reads wo.weight.dtype, and gives each block of its decoder the same encoder states."""

    def make():
        torch.manual_seed(0)
        model = qft.quantize_model(transformers.T5ForConditionalGeneration(T5), "nf4 g64 f32", rank=2)
        return qft.train_only(model, "lora").train()

    def shared():
        model = make()
        qft.share_inputs(model, input_ids=IDS, labels=IDS)
        return model

    results = {"says": said(lambda: qft.fully_shard(shared()))}
    return {**results, "difference": difference(make(), qft.fully_shard(shared()))}


def refusals(folder):
    model = qft.fully_shard(lora())
    layer = model.model.layers[0].mlp.up_proj
    mixed = lora()
    mixed.model.layers[0].input_layernorm.to(torch.bfloat16).requires_grad_()
    return {
        "twice": message(lambda: qft.fully_shard(model)),
        "mixed": message(lambda: qft.fully_shard(mixed)),
        "dequantize": message(layer.dequantize),
        "save": message(lambda: qft.save(model, folder / "sharded")),
    }


def trained_a_step():
    model = qft.fully_shard(lora())
    optimizer = optimizer_of(model)
    train(model, mine(), 1, optimizer)
    return model, optimizer


def killed_while_it_writes(folder):
    """The second rank, after three of the tensors of its second checkpoint."""
    model, optimizer = trained_a_step()
    qft.save_sharded(model, folder / "writing", 1, optimizer)
    train(model, mine(), 1, optimizer)
    write, written = filesystem._write_item, []

    def write_and_die(*args):
        written.append(write(*args))
        if len(written) == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return written[-1]

    filesystem._write_item = write_and_die
    qft.save_sharded(model, folder / "writing", 2, optimizer)


def killed_before_the_seal(folder):
    """The first rank, when every rank has written its second checkpoint."""
    model, optimizer = trained_a_step()
    qft.save_sharded(model, folder / "sealing", 1, optimizer)
    train(model, mine(), 1, optimizer)
    qft.disk.checkpoint.seal = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    qft.save_sharded(model, folder / "sealing", 2, optimizer)


def after_the_kills(folder):
    expected = train(*trained_a_step_and_go_on())
    results = {}
    for name in ("writing", "sealing"):
        model = qft.fully_shard(lora())
        optimizer = optimizer_of(model)
        steps = []

        def load(name=name, model=model, optimizer=optimizer, steps=steps):
            steps.append(qft.load_sharded(model, folder / name, optimizer))

        says = said(load)
        losses = train(model, mine(), optimizer=optimizer)
        results[name] = {"step": steps[0], "says": says, "goes on": torch.equal(losses, expected)}
        results[name]["files"] = sorted(path.name for path in (folder / name / "checkpoint-2").iterdir())
    return results


def trained_a_step_and_go_on():
    model, optimizer = trained_a_step()
    return model, mine(), STEPS, optimizer


CASES = [
    same_loss,
    same_loss_in_bf16,
    kept_dtypes,
    through_accelerate,
    through_trainer,
    saved_and_loaded,
    unusual_models,
    an_encoder_and_decoder,
    refusals,
    killed_while_it_writes,
    killed_before_the_seal,
    after_the_kills,
]


def rank(at, folder, pair, names):
    signal.alarm(LIMIT)  # ranks that wait for each other for ever
    named = {"RANK": str(at), "LOCAL_RANK": str(at), "WORLD_SIZE": str(RANKS)}
    os.environ.update(named, MASTER_ADDR="localhost", MASTER_PORT="0")  # as torchrun does; accelerate reads them
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{pair}", rank=at, world_size=RANKS)
    results, failed = {}, False
    for case in CASES:
        if case.__name__ in names and not failed:  # after a failure the other rank may be elsewhere
            try:
                results[case.__name__] = case(folder)
            except BaseException:  # torch's CheckpointException is no Exception
                results[case.__name__], failed = traceback.format_exc(), True
                traceback.print_exc()
    if at == 0:
        (folder / f"results-{pair}.json").write_text(json.dumps(results))
    if failed:
        os._exit(1)  # without the farewell that the other rank may not return
    dist.destroy_process_group()


def run_pair(folder, pair, names):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=(at, folder, pair, names)) for at in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


if __name__ == "__main__":
    torch.set_num_threads(1)
    # PEFT reads it
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    place = Path(sys.argv[1])
    everything = {"exit codes": [run_pair(place, *pair) for pair in enumerate(arg.split(",") for arg in sys.argv[2:])]}
    for part in sorted(place.glob("results-*.json")):
        everything.update(json.loads(part.read_text()))
    (place / "results.json").write_text(json.dumps(everything))
