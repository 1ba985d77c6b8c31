"""LoftQ in two bits with transformers, PEFT and Trainer: python trainer.py BASE TEXT OUT"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import qft

base, text, out = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.eos_token
rows = [tokenizer(line, truncation=True, max_length=64) for line in Path(text).read_text().splitlines()]

quantization_config = qft.QftConfig("nf2 g64 f16", init="loftq", rank=8, alpha=16)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization_config)
model.save_pretrained(f"{out}/base")  # the packed base and its starting factors
tokenizer.save_pretrained(f"{out}/base")

model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

trainer = Trainer(
    model=model,
    train_dataset=rows,
    eval_dataset=rows[:8],
    args=TrainingArguments(
        output_dir=f"{out}/checkpoints",
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=4,
        logging_steps=1,
        save_steps=4,
        report_to="none",
    ),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model(f"{out}/adapter")

again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{out}/base"), f"{out}/adapter")
