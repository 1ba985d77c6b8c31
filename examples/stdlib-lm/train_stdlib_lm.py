"""Train the small base language model: a Llama with a 4096-entry BPE vocabulary on the standard library's sources.

pydoc_data (the language reference, English prose) is left out: it is the fine-tuning domain.
Usage: python train_stdlib_lm.py OUT_DIR MINUTES
"""

import math
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT, MINUTES = Path(sys.argv[1]), float(sys.argv[2])
torch.manual_seed(0)
random.seed(0)
root = Path(sysconfig.get_path("stdlib"))
files = sorted(
    p
    for p in root.rglob("*.py")
    if "site-packages" not in p.parts
    and "pydoc_data" not in p.parts
    and "lib2to3/tests" not in str(p)
    and p.stat().st_size < 400_000
)
texts = [p.read_text(encoding="utf-8", errors="ignore") for p in files]
order = list(range(len(texts)))
random.shuffle(order)
held = set(order[: len(order) // 50])
train = [texts[i] for i in order if i not in held]
valid = [texts[i] for i in sorted(held)]
print(len(files), "files", sum(map(len, texts)) / 1e6, "MB", flush=True)

tok = Tokenizer(models.BPE())
tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tok.decoder = decoders.ByteLevel()
tok.train_from_iterator(
    train[::2],
    trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    ),
)
hf = PreTrainedTokenizerFast(
    tokenizer_object=tok, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=512
)


def ids(ts):
    return torch.tensor([t for e in tok.encode_batch(ts) for t in (*e.ids, 0)], dtype=torch.int32)


tr, va = ids(train), ids(valid)
print("tokens", len(tr), len(va), "bytes/token", sum(len(t.encode()) for t in valid) / len(va), flush=True)

cfg = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    rope_theta=10000.0,
)
model = LlamaForCausalLM(cfg)
print("params", sum(p.numel() for p in model.parameters()), flush=True)
decay = [p for p in model.parameters() if p.ndim > 1]
rest = [p for p in model.parameters() if p.ndim < 2]
opt = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=2e-3, betas=(0.9, 0.95)
)
B, T, peak = 16, 256, 2e-3


def loss_of(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=x, labels=x).loss


@torch.no_grad()
def evaluate(n=40):
    model.eval()
    g = torch.Generator().manual_seed(1)
    losses = [
        loss_of(torch.stack([va[i : i + T] for i in torch.randint(0, len(va) - T, (8,), generator=g)]).long()).item()
        for _ in range(n)
    ]
    model.train()
    return sum(losses) / n


def save():
    OUT.mkdir(parents=True, exist_ok=True)
    m = LlamaForCausalLM(cfg)
    m.load_state_dict(model.state_dict())
    m.to(torch.bfloat16).save_pretrained(OUT)
    hf.save_pretrained(OUT)


start, step = time.time(), 0
budget = MINUTES * 60
last = start
while True:
    frac = (time.time() - start) / budget
    if frac >= 1:
        break
    lr = peak * min(1, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * frac)))
    for g in opt.param_groups:
        g["lr"] = lr
    x = torch.stack([tr[i : i + T] for i in torch.randint(0, len(tr) - T, (B,))]).long()
    loss = loss_of(x)
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    step += 1
    if time.time() - last > 120:
        last = time.time()
        print(f"{(last - start) / 60:.1f} min step {step} train {loss.item():.3f} valid {evaluate():.3f}", flush=True)
        save()
print("final", step, "valid", evaluate(100), flush=True)
save()
