"""A causal LM as a GGUF file, which llama.cpp and Ollama run. Families: llama, mistral, qwen2, qwen3.

Names, layout and metadata are those that llama.cpp's convert_hf_to_gguf.py writes. Every other family goes through that
script where one is found. Needs the package gguf (extra demo).
"""
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from minimath.data.chat import turn_end
from minimath.core.errors import UserError

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type -> gguf's name
FILE_TYPES = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # gguf_type -> gguf's name of the type of the matrices
SCRIPTS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf.py", "convert_hf_to_gguf")
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {  # the regex that cuts text into words -> the name by which llama.cpp knows it
    QWEN2_WORDS: "qwen2",
    QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
}


# ---- what can be written

def reason_against(config, tokenizer) -> str:
    """Why this module can't write the model; "" when it can."""
    if config.model_type not in ARCHITECTURES:
        return f"minimath writes GGUF of {', '.join(ARCHITECTURES)} models, not of {config.model_type}"
    if config.hidden_act != "silu":
        return f"llama.cpp computes silu for {config.model_type} models, this one has {config.hidden_act}"
    kind = rope(config).get("rope_type", "default")
    if kind != "default" and not (kind in ("llama3", "linear") and ARCHITECTURES[config.model_type] == "LLAMA"):
        return f"its position scaling, {kind}, is not one that minimath writes"
    try:
        pre_tokenizer(tokenizer)
    except ValueError as error:
        return str(error)
    return ""


def rope(config) -> dict:
    return getattr(config, "rope_parameters", None) or {}


def pre_tokenizer(tokenizer) -> str:
    """llama.cpp's name of how the tokenizer cuts text into words, before byte pairs are merged.

    Raises ValueError when there is none: a wrong name gives other tokens than in training, without any message.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = data["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    last = steps[-1]
    if data["model"]["type"] != "BPE" or last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        raise ValueError("its tokenizer is not byte-level BPE")
    first = steps[0] if len(steps) == 2 else {}
    if last["use_regex"]:
        if len(steps) == 1:
            return "gpt-2"
        if first == {"type": "Digits", "individual_digits": True}:
            return "smollm"
    elif first.get("type") == "Split" and first["behavior"] == "Isolated" and not first["invert"] and \
            (name := PRE_TOKENIZERS.get(first["pattern"].get("Regex"))):
        return name
    raise ValueError("its tokenizer cuts words in a way that minimath has no name of llama.cpp's for")


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise UserError("to=gguf needs the package gguf: pip install -e '.[demo]', or use to=safetensors") from None
    return gguf


# ---- rounding, as the file will hold it

def type_of(weight: torch.Tensor, kind: str):
    """The GGML type that `weight` gets in a file of gguf_type=kind: vectors stay fp32, as llama.cpp wants them."""
    types = import_gguf().GGMLQuantizationType
    if weight.dim() == 1:
        return types.F32
    return types.F16 if kind == "q8_0" and weight.shape[-1] % 32 else types[FILE_TYPES[kind]]


def quantised(weight: torch.Tensor, type_) -> np.ndarray:
    """fp32 (or narrower) weight -> its bytes in the file. Raises UserError when a number is too large for the type."""
    array = weight.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):
        out = import_gguf().quants.quantize(array, type_)
    if out.dtype == np.float16 and not np.isfinite(out).all():
        raise UserError("gguf_type=f16 can't hold this model: a weight is above 65504; use gguf_type=bf16")
    return out


def round_as_gguf(model, kind: str) -> None:
    """Replace every weight by what a file of gguf_type=kind will hold, in place; writing it again changes nothing."""
    dequantize = import_gguf().quants.dequantize
    for weight in model.parameters():
        type_ = type_of(weight, kind)
        weight.data.copy_(torch.from_numpy(np.ascontiguousarray(dequantize(quantised(weight, type_), type_))))


# ---- the file

def write_gguf(model, tokenizer, path: Path, *, kind: str, name: str) -> None:
    """Write `model` (a plain transformers model, any float dtype) and its tokenizer, one tensor in memory at a time.

    kind: f16, bf16 or q8_0 for the matrices. Ask reason_against first. Raises OSError, UserError.
    """
    gguf = import_gguf()
    config = model.config
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    add_options(writer, config, name, gguf.LlamaFileType[f"MOSTLY_{FILE_TYPES[kind]}"], gguf)
    add_tokenizer(writer, tokenizer, model.get_input_embeddings().weight.shape[0], gguf)
    tensors = named_tensors(model, gguf.get_tensor_name_map(arch, config.num_hidden_layers))
    for tensor_name, weight in tensors.items():
        type_ = type_of(weight, kind)
        block, size = gguf.GGML_QUANT_SIZES[type_]
        writer.add_tensor_info(tensor_name, weight.shape, np.dtype(np.float32), weight.numel() // block * size, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with contextlib.closing(writer):
        for tensor_name, weight in tensors.items():
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(rope_part(tensor_name))
            if heads and ARCHITECTURES[config.model_type] == "LLAMA":
                weight = rotated_in_pairs(weight, heads)
            writer.write_tensor_data(quantised(weight, type_of(weight, kind)))


def add_options(writer, config, name: str, file_type, gguf) -> None:
    """The numbers that llama.cpp builds the model from."""
    head_dim = head_dim_of(config)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
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
    writer.add_rope_freq_base(rope(config).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_tokenizer(writer, tokenizer, rows: int, gguf) -> None:
    """Tokens (as many as the embedding has rows), merges, special ids and the chat template."""
    types, added = gguf.TokenType, tokenizer.added_tokens_decoder
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    kinds = [types.UNUSED if i not in names else types.NORMAL if i not in added else
             types.CONTROL if added[i].special else types.USER_DEFINED for i in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    bos = tokenizer.bos_token_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(bos is not None and tokenizer("a")["input_ids"][0] == bos)
    writer.add_eos_token_id(turn_end(tokenizer))  # what ends an answer, and what was trained
    for add, i in ((writer.add_unk_token_id, tokenizer.unk_token_id),
                   (writer.add_pad_token_id, tokenizer.pad_token_id)):
        if i is not None:
            add(i)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def named_tensors(model, name_map) -> dict[str, torch.Tensor]:
    """GGUF name -> weight in transformers' layout; a tied head is left out, llama.cpp takes the embedding for it."""
    out = {}
    for name, weight in model.named_parameters():
        if (gguf_name := name_map.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise UserError(f"to=gguf: llama.cpp has no place for the weight {name} in a {model.config.model_type} "
                            "model; use to=safetensors and llama.cpp's convert_hf_to_gguf.py")
        out[gguf_name] = weight
    if rope(model.config).get("rope_type", "default") != "default":
        embedding = model.base_model.rotary_emb
        dim = head_dim_of(model.config)
        plain = rope(model.config)["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        out["rope_freqs.weight"] = plain / embedding.inv_freq.float().cpu()  # llama.cpp divides by it
    return out


def rope_part(name: str) -> str:
    """"q" or "k" for the weights and biases that make rotated vectors (blk.3.attn_q.weight), else ""."""
    part = name.split(".")[2:3]
    return part[0].removeprefix("attn_") if part in (["attn_q"], ["attn_k"]) else ""


def rotated_in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows (heads * head_dim, ...) of each head: transformers rotates row i with row i + head_dim / 2, and
    llama.cpp, for its llama architecture, row 2i with row 2i + 1."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


# ---- llama.cpp's own script

def find_script() -> Path | None:
    """llama.cpp's convert script: $LLAMA_CPP (the script, or a checkout that holds it), else one on PATH."""
    place = Path(os.environ["LLAMA_CPP"]) if os.environ.get("LLAMA_CPP") else None
    if place and place.is_file():
        return place
    found = [place / name for name in SCRIPTS if place and (place / name).is_file()]
    found += [Path(path) for name in SCRIPTS if (path := shutil.which(name))]
    return found[0] if found else None


def run_script(script: Path, folder: Path, path: Path, kind: str) -> None:
    """Convert the transformers model in `folder` with llama.cpp's script. Raises UserError with its last line."""
    start = [sys.executable] if script.suffix == ".py" else []
    done = subprocess.run([*start, str(script), str(folder), "--outfile", str(path), "--outtype", kind],
                          capture_output=True, text=True, errors="replace")
    if done.returncode or not path.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        raise UserError(f"{script} ended with status {done.returncode}: {said[:300]}; use to=safetensors, and run it "
                        "by hand")
