"""Load a causal LM for training or inference, with its adapter, on its device."""
import contextlib
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimath.config.schema import ModelOptions
from minimath.core import dist
from minimath.core.errors import UserError, is_out_of_memory
from minimath.core.files import read_json
from minimath.core.hub import without_network
from minimath.core.run_folder import find_adapter, say_once
from minimath.kernels.common import runs_triton
from minimath.models import variants
from minimath.models.block_attention import without_cudnn
from minimath.models.forward import base_causal_lm, head_module
from minimath.models.fused import fuse, fused_layers, unfusable
from minimath.models.offload import offload_inputs

MORE_THAN_LORA = ("bias", "modules_to_save", "trainable_token_indices", "layer_replication")  # in an adapter's config
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Find the device that an option names. Raises UserError for one that is not there.

    auto: cuda (also ROCm), else mps, else cpu; of several processes each its own. A card becomes the current one."""
    if name == "auto":
        name = dist.local_card() or ("cuda" if torch.cuda.is_available() else
                                     "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} cannot be used here ({first_line(error)}); "
                        "use device=auto or device=cpu") from None
    if device.type != "cuda" and dist.local_card():
        raise UserError(f"device={name} with several processes on a machine with cards: set ACCELERATE_USE_CPU=1")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Find the compute type and the reason for it, in words.

    auto: bf16 where the hardware computes it (Turing, sm_75, only emulates it), else fp16 on CUDA, else fp32."""
    if name != "auto":
        return DTYPES[name], "as configured"
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the card computes bf16") if bf16 else (torch.float16, "the card does not compute bf16")
    # the flag first: builds without oneDNN (some for ARM) have no such operator
    if device.type == "cpu" and _cpu_flag("avx512_bf16", "amx_bf16") and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16, "the processor computes bf16"
    return torch.float32, f"no fast bf16 on this {device.type}"


def _cpu_flag(*names: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and any(name in cpuinfo.read_text() for name in names)


def load_tokenizer(cfg):
    """Load the tokenizer of cfg.model, with a pad token. Raises UserError."""
    with _load_errors(cfg.model.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{cfg.model.name}: the tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(cfg, *, train: bool):
    """Load model and tokenizer of a stage's config, with the adapter. Raises UserError.

    train=True: a trainable LoRA adapter (new, or the one in cfg.adapter.path) in fp32 over frozen weights; needs the
    groups AdapterOptions and OptimizerOptions. train=False: cfg.adapter.path if given, everything frozen."""
    options = cfg.model
    if options.shard and options.quant == "nf4":
        raise UserError("shard=true splits plain 16- and 32-bit layers: leave shard away, or quant=nf4 (a quarter of "
                        "the size on every card)")
    if train and cfg.optimizer.offload and (options.compile or not cfg.optimizer.gradient_checkpointing):
        raise UserError("offload=true moves what gradient checkpointing keeps: set gradient_checkpointing=true, and "
                        "leave compile=true away")
    tokenizer, device = load_tokenizer(cfg), pick_device(options.device)
    without_cudnn(device)
    model = _load_base(options, device)
    if len(tokenizer) > (rows := len(model.get_input_embeddings().weight)) and dist.is_main():
        names = [token for token, i in tokenizer.get_vocab().items() if i >= rows]
        print(f"{options.name}: the embedding has no row for {len(names)} tokens of the tokenizer ({names[0]}, ...): "
              "texts with them are refused", file=sys.stderr)
    if cfg.adapter.path:
        model = _load_adapter(model, find_adapter(cfg.adapter.path), train=train)
    elif train:
        model = _new_adapter(model, cfg)
    if options.shard:
        variants.shard(model, base_causal_lm(model), device)
    if train and cfg.optimizer.gradient_checkpointing:
        checkpoint_activations(model)
    if train and cfg.optimizer.offload:
        offload_inputs(model, device)
    cast_adapters_down(model)
    if options.compile and train:
        variants.compile_layers(base_causal_lm(model))
    elif why := "its weights are split between processes" if options.shard else fuse(base_causal_lm(model)):
        say_once(f"{options.name}: its decoder layers run as transformers and peft have them, which is slower ({why})")
    model.train(train)
    return model, tokenizer


def _load_base(options: ModelOptions, device: torch.device):
    """Load the frozen base to the device; one that will be sharded stays on the CPU."""
    dtype, _ = pick_dtype(options.dtype, device)
    nf4 = options.quant == "nf4"
    place = {"quantization_config": variants.nf4_config(dtype), "device_map": {"": device}} if nf4 else {}
    transformers.utils.logging.disable_progress_bar()
    with _load_errors(options.name, "model"):
        index = Path(options.name, "model.safetensors.index.json")  # its shards may be files that would be unpickled
        for shard_name in read_json(index)["weight_map"].values() if index.is_file() else ():
            if not str(shard_name).endswith(".safetensors"):
                raise ValueError(f"{index.name} names {shard_name!r}: only safetensors files are read")
        model, info = AutoModelForCausalLM.from_pretrained(
            options.name, dtype=dtype, attn_implementation=options.attn, trust_remote_code=options.trust_remote_code,
            use_safetensors=True, output_loading_info=True, **place)
        if lacking := sorted(info["missing_keys"]):  # transformers makes them up
            raise ValueError(f"its files lack {len(lacking)} of a causal LM's weights, such as {lacking[0]}")
    if not place and not options.shard:
        model.to(device)
    variants.keep_4bit_weights_trainable(model)
    model.config.use_cache = False
    return model.requires_grad_(False)


def checkpoint_activations(model, **kwargs) -> None:
    """Recompute each layer's activations in backward; kwargs: of torch's checkpoint."""
    base = base_causal_lm(model)
    # the name since transformers 5.23, which warns about the old one; 6 drops that
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False, **kwargs})
    model.enable_input_require_grads()


@contextlib.contextmanager
def _quiet():
    """Silence warnings of peft about transformers: a user can do nothing about those."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@_quiet()
def _new_adapter(model, cfg):
    """Add a LoRA adapter in fp32: in bf16 it loses updates below 1/256 of a weight."""
    options = cfg.adapter
    targets = options.lora_targets.replace(" ", "")
    rank, alpha, init = variants.rank_of(options), options.lora_alpha, variants.PLAIN.get(options.lora_init, True)
    if principal := rank > options.lora_r:  # at the same scale
        alpha *= 2 ** 0.5 if options.rslora else 2
    # Mamba's fused training kernel reads this weight past its adapter, and peft refuses it in some families
    mamba = targets == "all-linear" and any(hasattr(m, "A_log") and hasattr(m, "D") for m in model.modules())
    left_out = ["out_proj"] if mamba else None
    try:
        model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=options.lora_dropout, exclude_modules=left_out,
            target_modules=targets if targets == "all-linear" else targets.split(","), use_rslora=options.rslora,
            use_dora=options.dora, init_lora_weights=init, task_type="CAUSAL_LM"))
    except ValueError as error:
        names = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        raise UserError(f"lora_targets={options.lora_targets!r}, lora_init={options.lora_init!r}: {first_line(error)} "
                        f"Linear layers of this model: {', '.join(sorted(names))}; or all-linear") from None
    if principal:
        variants.begin_at_principal(model, options.lora_init)
    _refuse_head(model, f"lora_targets={options.lora_targets!r}")
    return model


def _refuse_head(model, what: str, name: str = "default") -> None:
    """Raise UserError when an adapter is on the LM head, or the embedding that is also the head."""
    base = base_causal_lm(model)
    parts = [("LM head, which the fused kernels keep frozen", head_module(model))]
    if base.config.get_text_config().tie_word_embeddings:
        parts.append(("embedding, which is tied to the head: no merged model can hold it", base.get_input_embeddings()))
    for part, module in parts:
        if any(p.requires_grad or f".{name}." in f".{path}." for path, p in module.named_parameters()):
            raise UserError(f"{what} includes the {part}; leave it out, or use all-linear")


@_quiet()
def _load_adapter(model, folder: Path, name: str = "default", *, train: bool):
    """Load a saved adapter into a model that has others or none; return the peft model."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no adapter_model.safetensors (pickled adapters are never loaded); "
                        "give a run folder, a checkpoint or a peft adapter folder")
    try:
        config = read_json(folder / "adapter_config.json")
        more = [f"{key}={config[key]!r}" for key in MORE_THAN_LORA if config.get(key) not in (None, "none", [], {})]
        if name != "default" and more:
            raise UserError(f"{folder}: its {more[0]} is more than LoRA layers, which alone can stand beside another "
                            "adapter; train it again without")
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.startswith(variants.CHANGE_THE_BASE):
            raise UserError(f"{folder}: its init_lora_weights={init!r} changed the base model, which is reference and "
                            "judge here; save it again by peft with path_initial_model_for_weight_conversion")
        how = {"adapter_name": name, "is_trainable": train, "torch_device": str(base_causal_lm(model).device)}
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), **how)
        else:
            model = PeftModel.from_pretrained(model, str(folder), **how)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{folder}: the adapter cannot be loaded into this model ({first_line(error)}); was it "
                        "trained on another base model?") from None
    if train or name != "default":
        _refuse_head(model, f"the adapter in {folder}", name)
    return model


def add_adapter(model, folder: Path, name: str):
    """Load a saved LoRA adapter, frozen, beside what a model has; return the model.

    Nothing else changes: neither what is active (of a plain model, the base stays) and what trains, nor random numbers.
    Raises UserError where it can't stand there; the model is of no use then."""
    if any(name in other or other in name for other in getattr(model, "peft_config", {})):  # peft looks for parts
        raise ValueError(f"the model has an adapter with a name like {name!r}")
    if variants.is_sharded(model):
        raise UserError(f"{folder}: a second adapter does not go with shard=true; leave shard away, or use quant=nf4")
    was_training, device = model.training, base_causal_lm(model).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # peft draws initial values
        loaded = _load_adapter(model, folder, name, train=False)
    if loaded is not model:
        loaded.base_model.disable_adapter_layers()
    cast_adapters_down(loaded)
    if fused_layers(base := base_causal_lm(loaded)) and (why := unfusable(base)):
        raise UserError(f"{folder}: beside this adapter the layers of the model could not stay fused ({why}); train it "
                        "again as a plain LoRA, dora=false, on linear layers of the decoder")
    return loaded.train(was_training)  # peft leaves eval mode behind


def first_line(error: BaseException) -> str:
    return (str(error).strip().replace(":\n    ", ": ").splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _load_errors(name: str, what: str):
    """Turn the ways in which a model fails to load into one line that helps."""
    hint = "check the name and the network, or give the folder of a model on this disk"
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        hint = "check the folder"
        if not Path(name, "config.json").is_file():
            raise UserError(f"model={name!r}: no such model folder (a config.json is expected in it); "
                            "give a folder saved by save_pretrained, or a hub id like owner/name")
    elif offline := without_network():
        hint = f"{offline}; {hint}"
    try:
        yield
    except Exception as error:  # a config's validation and the tokenizers have kinds of their own
        if is_out_of_memory(error):
            raise
        kind = "no sound safetensors file, " if isinstance(error, SafetensorError) else ""
        raise UserError(f"cannot load the {what} of model={name!r}: {kind}{first_line(error)} ({hint})") from None


def cast_adapters_down(model) -> None:
    """Stop peft from casting activations up to fp32: `compute_dtype` casts the adapter down instead."""
    if base_causal_lm(model).dtype != torch.float32:
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False


def describe(model, cfg) -> str:
    """Say device, dtype, quantisation and sizes of a stage's model on one line.

    On a second one, that rows may be longer than the model was made for."""
    options = cfg.model
    dtype, reason = pick_dtype(options.dtype, device := pick_device(options.device))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    quant = ", NF4 weights with double quantisation" if options.quant == "nf4" else ""
    kernels = "Triton kernels" if runs_triton(torch.empty(0, device=device)) else "chunked torch kernels"
    return (f"{options.name}: {device} ({card}), {str(dtype).removeprefix('torch.')} ({reason}){quant}, "
            f"{stored / 1e6:.0f} MB of weights, {trained / 1e6:.2f} M trained, attention {options.attn}, {kernels}"
            f"{beyond_context(model, cfg)}")


def beyond_context(model, cfg) -> str:
    """Warn, on a line of its own, of rows beyond the model's context; "" for none."""
    most = getattr(base_causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    sampled = cfg.prompt.max_prompt_len + cfg.sampling.max_new_tokens if hasattr(cfg, "sampling") else 0
    if not most or (longest := max(sampled, getattr(cfg, "max_len", 0))) <= most:
        return ""
    which = "max_prompt_len= and max_new_tokens=" if longest == sampled else "max_len="
    return f"\nwarning: {which} allow rows of {longest} tokens, and {cfg.model.name} was made for {most}; " \
        "what is behind that is mostly noise"
