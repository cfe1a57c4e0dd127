"""Write a causal LM as a GGUF file with a Modelfile, for llama.cpp and Ollama.

The package gguf (extra demo) has the file format, the types and the tensors' names. What it lacks, which weights turn
round, how words are cut and the numbers of the header, is here as in llama.cpp's convert_hf_to_gguf.py."""
import contextlib
import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch

from minimath.core.errors import UserError
from minimath.data.chat import turn_end

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type -> gguf's name
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
PRE_TOKENIZERS = {  # llama.cpp's name -> how text is cut, in tokenizer.json
    "gpt-2": [BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    "qwen2": [SPLIT | {"pattern": {"Regex": QWEN2_WORDS}}, BYTES],
    "llama-bpe": [SPLIT | {"pattern": {"Regex": LLAMA3_WORDS}}, BYTES]}


def reason_against(config, tokenizer) -> str:
    """Say why this module can't write the model; "" when it can."""
    if config.model_type not in ARCHITECTURES:
        return f"minimath writes GGUF of {', '.join(ARCHITECTURES)} models, not of {config.model_type}"
    if config.hidden_act != "silu":
        return f"llama.cpp computes silu for {config.model_type} models, this one has {config.hidden_act}"
    kind = config.rope_parameters["rope_type"]
    if kind != "default" and not (kind in ("llama3", "linear") and ARCHITECTURES[config.model_type] == "LLAMA"):
        return f"its position scaling, {kind}, is not one that minimath writes"
    return "" if pre_tokenizer(tokenizer) else "llama.cpp has no name for how its tokenizer cuts words"


def pre_tokenizer(tokenizer) -> str:
    """Find llama.cpp's name of how the tokenizer cuts text into words, "" for none."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = data["pre_tokenizer"] or {}
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"}  # which changes no token
             for step in steps.get("pretokenizers", [steps])]
    kinds = PRE_TOKENIZERS if data["model"]["type"] == "BPE" else {}
    return next((name for name, known in kinds.items() if steps == known), "")


def type_of(weight: torch.Tensor, kind: str) -> gguf.GGMLQuantizationType:
    """Choose the type of `weight` in the file; llama.cpp wants vectors in fp32."""
    if weight.dim() == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType["F16" if kind == "q8_0" and weight.shape[-1] % 32 else kind.upper()]


def round_as_gguf(model, kind: str) -> None:
    """Replace each weight by what the file will hold. UserError: one is too large."""
    for weight in model.parameters():
        type_ = type_of(weight, kind)
        with np.errstate(over="ignore"):
            held = gguf.dequantize(gguf.quantize(weight.detach().float().cpu().numpy(), type_), type_)
        if type_ == gguf.GGMLQuantizationType.F16 and not np.isfinite(held).all():
            raise UserError("gguf_type=f16 can't hold this model: a weight is above 65504; use gguf_type=bf16")
        weight.data.copy_(torch.from_numpy(np.ascontiguousarray(held)))


def write_gguf(model, tokenizer, path: Path, *, kind: str, name: str) -> None:
    """Write a model that round_as_gguf rounded to `kind`, one tensor at a time."""
    config, head_dim = model.config, model.base_model.layers[0].self_attn.head_dim
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    with contextlib.closing(gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])) as writer:
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        # llama.cpp has no window in these families: up to its length there is none to see
        writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config.vocab_size)
        add_tokenizer(writer, tokenizer, model.get_input_embeddings().weight.shape[0])
        add_tensors(writer, model, gguf.get_tensor_name_map(arch, config.num_hidden_layers), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer, rows: int) -> None:
    """Write a token for each row of the embedding, merges, special ids, chat template."""
    types, added = gguf.TokenType, tokenizer.added_tokens_decoder
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([types.UNUSED if i not in names else types.NORMAL if i not in added else
                            types.CONTROL if added[i].special else types.USER_DEFINED for i in range(rows)])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=True)
    special.special_token_ids["eos"] = turn_end(tokenizer)  # what ends an answer, and what was trained
    special.add_special_token = {"bos": tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id}
    special.add_to_gguf(writer, quiet=True)


def add_tensors(writer: gguf.GGUFWriter, model, name_map: gguf.TensorNameMap, kind: str) -> None:
    """Add the weights, without a tied head; each is converted when it is written."""
    config, turned = model.config, {}
    if ARCHITECTURES[config.model_type] == "LLAMA":
        turned = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = [(name_map.get_name(name, try_suffixes=(".weight", ".bias")), weight.data,
                turned.get(name.split(".")[-2], 0)) for name, weight in model.named_parameters()]
    if config.rope_parameters["rope_type"] != "default":
        scaled = model.base_model.rotary_emb.inv_freq.float().cpu()
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
        tensors.append(("rope_freqs.weight", plain / scaled, 0))  # llama.cpp divides by it
    for name, weight, heads in tensors:
        meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape(np.float32, tuple(weight.shape))
        lazy = gguf.LazyNumpyTensor(meta=meta, args=(weight, heads),
                                    func=lambda *args: rotated_in_pairs(*args).float().cpu().numpy())
        writer.add_tensor(name, gguf.quantize(lazy, type_of(weight, kind)), raw_dtype=type_of(weight, kind))


def rotated_in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head of a weight; heads=0: leave it as it is.

    transformers rotates row i of (heads * head_dim, ...) with i + head_dim / 2, llama.cpp's llama 2i with 2i + 1."""
    if not heads:
        return weight
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
