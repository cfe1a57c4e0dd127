"""What two optional libraries do to a model: 4-bit weights by bitsandbytes, layers by liger-kernel."""
import torch
from transformers import BitsAndBytesConfig

from minimath.core.errors import UserError


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Configure NF4 weights with quantised scales; UserError without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("quant=nf4 needs bitsandbytes: pip install bitsandbytes, or use quant=none") from None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                              bnb_4bit_use_double_quant=True)


def patch_with_liger(model) -> None:
    """Put liger-kernel's RMSNorm, RoPE and SwiGLU into `model`, but not its losses.

    RoPE changes for every model of the family in this process. Raises UserError without a GPU, without the package, for
    a family that it does not know."""
    if model.device.type != "cuda":
        raise UserError(f"liger=true needs a GPU, and the model is on {model.device.type}: use liger=false here")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as families
    except ImportError:
        raise UserError("liger=true needs liger-kernel: pip install -e '.[liger]', or use liger=false") from None
    if model.config.model_type not in families:
        raise UserError(f"liger=true: liger-kernel has no kernels for {model.config.model_type} models "
                        f"(it has {', '.join(sorted(families))}); use liger=false")
    _apply_liger_kernel_to_instance(model=model, rope=True, rms_norm=True, swiglu=True, geglu=True,
                                    cross_entropy=False, fused_linear_cross_entropy=False)


def keep_4bit_weights_trainable(model) -> int:
    """Stop bitsandbytes from repacking 4-bit weights; returns the number of layers.

    On CPUs with avx512_bf16 one no-grad forward in eval mode repacks Linear4bit weights for good; LoRA gradients after
    that are wrong by 77-99% with a normal-looking loss."""
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
