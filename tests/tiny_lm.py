"""A language model small enough for a test: bytes for tokens, two layers, random weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 257  # every byte, and the end token
END = 256


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, in the order of the byte-level alphabet; id 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def model(vocabulary: int = VOCABULARY, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of two layers, 64 features, fp32."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save(directory: Path, vocabulary: int = VOCABULARY) -> Path:
    """The model and its tokenizer as transformers writes them."""
    model(vocabulary).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory
