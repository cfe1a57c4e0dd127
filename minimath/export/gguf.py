"""Write a causal LM as a GGUF file with a Modelfile, for llama.cpp and Ollama.

Families: llama, mistral, qwen2, qwen3. The package gguf (extra demo) has the file format, the types and the tensors'
names. What it lacks, which weights turn round, how words are cut and the numbers of the header, is here as in
llama.cpp's convert_hf_to_gguf.py. Every other family goes through that script where one is found.
"""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from minimath.core.errors import UserError
from minimath.data.chat import turn_end
from minimath.export.model_card import modelfile
from minimath.models.policy import Policy

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

def find_writer(config, tokenizer) -> Path | None:
    """Find llama.cpp's script for the model; None: minimath writes it. UserError."""
    if not (why_not := reason_against(config, tokenizer)):
        return None
    place = Path(os.environ["LLAMA_CPP"]) if os.environ.get("LLAMA_CPP") else None
    if place and place.is_file():
        return place
    found = [place / name for name in SCRIPTS if place and (place / name).is_file()]
    found += [Path(path) for name in SCRIPTS if (path := shutil.which(name))]
    if not found:
        raise UserError(f"to=gguf: {why_not}. Use to=safetensors, then llama.cpp's convert_hf_to_gguf.py on that "
                        "folder; with LLAMA_CPP set to a checkout of llama.cpp this command runs it")
    return found[0]


def reason_against(config, tokenizer) -> str:
    """Say why this module can't write the model; "" when it can."""
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


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pre_tokenizer(tokenizer) -> str:
    """Find llama.cpp's name of how the tokenizer cuts text into words.

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


# ---- rounding, as the file will hold it

def type_of(weight: torch.Tensor, kind: str) -> gguf.GGMLQuantizationType:
    """Choose the type of `weight` in the file; llama.cpp wants vectors in fp32."""
    types = gguf.GGMLQuantizationType
    if weight.dim() == 1:
        return types.F32
    return types.F16 if kind == "q8_0" and weight.shape[-1] % 32 else types[FILE_TYPES[kind]]


def quantised(weight: torch.Tensor, type_: gguf.GGMLQuantizationType) -> np.ndarray:
    """Convert a weight to its bytes in the file. UserError: a number is too large."""
    with np.errstate(over="ignore"):
        out = gguf.quants.quantize(weight.detach().float().cpu().numpy(), type_)
    if out.dtype == np.float16 and not np.isfinite(out).all():
        raise UserError("gguf_type=f16 can't hold this model: a weight is above 65504; use gguf_type=bf16")
    return out


def round_as_gguf(model, kind: str) -> None:
    """Replace every weight by what the file will hold; a second time changes nothing."""
    for weight in model.parameters():
        type_ = type_of(weight, kind)
        held = gguf.quants.dequantize(quantised(weight, type_), type_)
        weight.data.copy_(torch.from_numpy(np.ascontiguousarray(held)))


# ---- writing

def write_folder(policy: Policy, folder: Path, name: str, kind: str, script: Path | None,
                 save: Callable[[Path], object]) -> str:
    """Write file and Modelfile; returns how to use them, {folder} for their place.

    script: of find_writer, run on the model as save(folder) writes it for transformers. Raises OSError, UserError.
    """
    file = folder / f"{name}-{kind}.gguf"
    if script:
        with tempfile.TemporaryDirectory(dir=folder) as plain:
            save(Path(plain))
            run_script(script, plain, file, kind)
    else:
        write_gguf(policy.model, policy.tokenizer, file, kind=kind, name=name)
    text = modelfile(policy.tokenizer, file.name, policy.prompt)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return f"cd {{folder}} && ollama create {name} -f Modelfile && ollama run {name} \"PROBLEM\"\n" \
           f"llama-server -m {{folder}}/{file.name}   # or llama.cpp alone"


def run_script(script: Path, folder: str, path: Path, kind: str) -> None:
    """Convert the model in `folder` with llama.cpp's script. UserError: its last line."""
    start = [sys.executable] if script.suffix == ".py" else []
    done = subprocess.run([*start, str(script), folder, "--outfile", str(path), "--outtype", kind],
                          capture_output=True, text=True, errors="replace")
    if done.returncode or not path.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        raise UserError(f"{script} ended with status {done.returncode}: {said[:300]}; use to=safetensors, and run it "
                        "by hand")


def write_gguf(model, tokenizer, path: Path, *, kind: str, name: str) -> None:
    """Write a plain model and its tokenizer, one tensor in memory at a time.

    kind: f16, bf16 or q8_0 for the matrices. Ask find_writer first. Raises OSError, UserError.
    """
    config = model.config
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    tensors = named_tensors(model, gguf.get_tensor_name_map(arch, config.num_hidden_layers))
    with contextlib.closing(gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])) as writer:
        add_options(writer, config, name, gguf.LlamaFileType[f"MOSTLY_{FILE_TYPES[kind]}"])
        add_tokenizer(writer, tokenizer, model.get_input_embeddings().weight.shape[0])
        for tensor_name, weight in tensors.items():
            type_ = type_of(weight, kind)
            block, size = gguf.GGML_QUANT_SIZES[type_]
            writer.add_tensor_info(tensor_name, weight.shape, np.dtype(np.float32), weight.numel() // block * size,
                                   type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, weight in tensors.items():
            part = tensor_name.split(".")[2:3]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(*part or [""])
            if heads and ARCHITECTURES[config.model_type] == "LLAMA":
                weight = rotated_in_pairs(weight, heads)
            writer.write_tensor_data(quantised(weight, type_of(weight, kind)))


def add_options(writer: gguf.GGUFWriter, config, name: str, file_type: gguf.LlamaFileType) -> None:
    """Write the numbers that llama.cpp builds the model from."""
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
    bos = tokenizer.bos_token_id
    special.special_token_ids["eos"] = turn_end(tokenizer)  # what ends an answer, and what was trained
    special.add_special_token = {"bos": bos is not None and tokenizer("a")["input_ids"][0] == bos}
    special.add_to_gguf(writer, quiet=True)


def named_tensors(model, name_map: gguf.TensorNameMap) -> dict[str, torch.Tensor]:
    """Map GGUF names to weights in transformers' layout, without a tied head."""
    out = {}
    for name, weight in model.named_parameters():
        if (gguf_name := name_map.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise UserError(f"to=gguf: llama.cpp has no place for the weight {name} in a {model.config.model_type} "
                            "model; use to=safetensors and llama.cpp's convert_hf_to_gguf.py")
        out[gguf_name] = weight
    if rope(model.config).get("rope_type", "default") != "default":
        dim = head_dim_of(model.config)
        plain = rope(model.config)["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        embedding = model.base_model.rotary_emb
        out["rope_freqs.weight"] = plain / embedding.inv_freq.float().cpu()  # llama.cpp divides by it
    return out


def rotated_in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head.

    weight: (heads * head_dim, ...). transformers rotates row i with row i + head_dim / 2, llama.cpp for its llama
    architecture 2i with 2i + 1.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
