"""Tiny random models and a tiny tokenizer, made in-process from a seed: no download, about 0.2 s each.

`write_tiny(dir)` works from scripts too: `from tiny import write_tiny` with tests/ on sys.path.
The tokenizer is byte-level BPE (every text encodes and decodes) with a ChatML template like SmolLM2's.
"""
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Tom has 12 apples and buys 7 more. How many apples does he have now?",
    "12 + 7 = 19. The final answer is \\boxed{19}.",
    "A box holds 6 pens. There are 5 boxes, so 6 * 5 = 30 pens in total.",
    "First we subtract: 30 - 8 = 22. Then we divide: 22 / 2 = 11.",
    "Put the final answer in \\boxed{}. Each child gets the same number of marbles, so the answer is 4.",
    "user assistant system problem solution step total left each bought gave away",
]
FAMILIES = {  # what each adds to a plain Llama: the head, bias and attention variants to get right
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "qwen2": {},  # bias on q, k, v
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},  # in the second layer
    "qwen3": {"head_dim": 8},  # q and k norms
    "mistral": {"sliding_window": None},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
               "sliding_window": 64, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8, "layer_types":
                    ["sliding_attention", "full_attention"]},  # a window and another rope base by layer
    "phi3": {"rope_scaling": None, "original_max_position_embeddings": 4096},  # q, k, v in one layer, as gate and up
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
STATEFUL = {  # those that keep state beside keys and values, or in place of them
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "qwen3_next": {**DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16},
    "qwen3_5_text": DELTA,
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 0,
                         "num_experts_per_tok": 0, "shared_intermediate_size": 32},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8},  # both in every layer
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "nemotron_h": {"layer_types": ["linear_attention", "full_attention", "mlp"], "head_dim": 8, "ssm_state_size": 8,
                   "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "olmo_hybrid": {**DELTA, "linear_num_key_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "num_experts": 2},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 16},
}


def tiny_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer with ChatML template, eos <|im_end|>, pad <pad>, no bos."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML, clean_up_tokenization_spaces=False,
        model_max_length=4096)


def _save_model(folder: Path, tokenizer: PreTrainedTokenizerBase, family: str, seed: int) -> None:
    """Write config, generation config and safetensors of a seeded random fp32 model into `folder`."""
    kind = family.split("-")[0]
    fields = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "use_cache": True,
        "initializer_range": 0.2,  # at the usual 0.02 logits are almost uniform, and tests could not fail
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(kind, **{**fields, **(FAMILIES | STATEFUL)[family]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


def tiny_model(folder: str | Path, family: str = "llama", seed: int = 0) -> Path:
    """Write a tiny model (hidden 32, 2 layers, 4 heads, 2 kv heads) of `family` and its tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    _save_model(folder, tokenizer, family, seed)
    return folder


def write_tiny(folder: str | Path) -> Path:
    """Write the default tiny model, a Llama with tied embeddings."""
    return tiny_model(folder, "llama")
