"""QLoRA with transformers, PEFT and bitsandbytes, as its users write it: python qlora.py BASE TEXT OUT"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

base, text, out = sys.argv[1:]

quantization_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)

tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.eos_token
rows = [tokenizer(line, truncation=True, max_length=64) for line in Path(text).read_text().splitlines()]

model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization_config, dtype=torch.bfloat16)
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(
    model,
    LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"),
)
model.print_trainable_parameters()

trainer = Trainer(
    model=model,
    train_dataset=rows,
    args=TrainingArguments(
        output_dir=f"{out}/checkpoints",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_steps=4,
        report_to="none",
    ),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
model.save_pretrained(f"{out}/adapter")

model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization_config, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, f"{out}/adapter")
model = model.merge_and_unload()
prompt = tokenizer("the quick", return_tensors="pt").to(model.device)
generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(generated[0], skip_special_tokens=True))
