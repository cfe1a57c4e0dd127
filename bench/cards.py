"""What the vendors print about each card, and the heads (hidden size x vocabulary) that are measured and
modelled here. Plain numbers: nothing imports torch.

Tensor rates are dense and with fp32 accumulation, which is what every training GEMM uses. Two traps are
avoided: marketing figures "with sparsity" are twice these, and GeForce cards run 16-bit products with fp32
accumulation at half the rate of fp16 accumulation (RTX 3090: 71, not 142 TFLOP/s).

Sources, as Card.source names them:
  GA102    NVIDIA Ampere GA102 GPU Architecture whitepaper v2, appendix A (RTX 3090)
           nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
  ADA      NVIDIA Ada GPU Architecture whitepaper v2.01, appendix A (RTX 4090)
           images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
  BLACK    NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A (RTX 5090)
           images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
  A100     NVIDIA A100 Tensor Core GPU Architecture whitepaper, table 4; 80 GB: A100 datasheet
           images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf
  H100     NVIDIA H100 Tensor Core GPU Architecture whitepaper, table 3; nvidia.com/en-us/data-center/h100
           and /h200 (their 1,979 TFLOP/s are with sparsity)
  L4       NVIDIA L4 datasheet (242 TFLOP/s with sparsity), nvidia.com/en-us/data-center/l4
  RDNA3    AMD RX 7900 XTX page (122.8 TFLOP/s, 61.4 fp32, 960 GB/s, Infinity Cache 96 MB, up to 3,500 GB/s),
           amd.com/en/products/graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xtx.html
  CUDA     CUDA programming guide, table "technical specifications per compute capability" (shared memory,
           64k 32-bit registers per multiprocessor)
NVIDIA prints an L2 rate for the A100 only (5,120 B/clock), so L2 rates are measured ones:
  BENCHES  github.com/te42kyfo/gpu-benches, gpu-l2-cache/{a100_80,h200,l40}.txt and gpu-cache/a40.txt: A100
           5.4, H200 9.7, L40 (AD102) 5.2, A40 (GA102) 2.4 TB/s; the A100 falls off above 28 of its 40 MB
  MB4090   github.com/smallscientist1/cuda_microbenchmark, analysis_RTX4090.md: 1,945.6 B/clock, 4.9 TB/s
An L2 rate marked "scaled" is an estimate: the measured chip of the family times L2 slices and clock.
"""
import difflib
import re
from typing import NamedTuple

TERA, GIGA, MIB, KIB = 1e12, 1e9, 1 << 20, 1 << 10


class Card(NamedTuple):
    """One card; rates per second."""
    name: str
    arch: str  # as kernels.common.architecture prints it
    tensor_flops: float  # 16-bit operands, fp32 accumulation, dense
    fp32_flops: float  # outside the tensor cores
    bandwidth: float  # bytes of memory
    l2_bytes: int  # last level of cache that holds a workspace (AMD: the Infinity Cache)
    l2_bandwidth: float  # bytes
    shared_bytes: int  # per multiprocessor (AMD: per work-group processor)
    block_shared_bytes: int  # what one block may take of it
    processors: int  # multiprocessors or compute units
    memory_bytes: int
    source: str

    @property
    def ridge(self) -> float:
        """Divide flops by bytes: above it a product is bound by the tensor cores."""
        return self.tensor_flops / self.bandwidth


REGISTER_BYTES = 65_536 * 4  # register file of one multiprocessor (CUDA); AMD's is 4 x 192 KB per pair of units

CARDS = (
    Card(*("RTX 3060 12GB", "sm_86", 25.5 * TERA, 12.74 * TERA, 360 * GIGA, 3 * MIB, 1.2 * TERA),
         *(100 * KIB, 99 * KIB, 28, 12 * 10**9),
         "nvidia.com RTX 3060 page (28 SM, 1.78 GHz, 360 GB/s), tensor rate per SM and clock from GA102; "
         "L2 rate scaled from BENCHES A40 (half the slices); CUDA 8.6"),
    Card(*("RTX 3090", "sm_86", 71 * TERA, 35.6 * TERA, 936 * GIGA, 6 * MIB, 2.4 * TERA),
         *(100 * KIB, 99 * KIB, 82, 24 * 10**9),
         "GA102 (FP16 tensor with FP32 accumulate 71; 142 with sparsity); L2 rate BENCHES A40, same chip; CUDA 8.6"),
    Card(*("RTX 4090", "sm_89", 165.2 * TERA, 82.6 * TERA, 1008 * GIGA, 72 * MIB, 4.9 * TERA),
         *(100 * KIB, 99 * KIB, 128, 24 * 10**9),
         "ADA (FP16 tensor with FP32 accumulate 165.2; 330.4 with sparsity); L2 rate MB4090; CUDA 8.9"),
    Card(*("RTX 5090", "sm_120", 209.5 * TERA, 104.8 * TERA, 1792 * GIGA, 96 * MIB, 6.0 * TERA),
         *(100 * KIB, 99 * KIB, 170, 32 * 10**9),
         "BLACK (FP16 tensor with FP32 accumulate 209.5; 419 with sparsity); L2 rate scaled from BENCHES L40; "
         "CUDA 12.0"),
    Card(*("L4", "sm_89", 121 * TERA, 30.3 * TERA, 300 * GIGA, 48 * MIB, 2.1 * TERA),
         *(100 * KIB, 99 * KIB, 58, 24 * 10**9),
         "L4; 72 W keep it well below this rate in long runs; L2 rate scaled from BENCHES L40; CUDA 8.9"),
    Card(*("A100 SXM 40GB", "sm_80", 312 * TERA, 19.5 * TERA, 1555 * GIGA, 40 * MIB, 5.4 * TERA),
         *(164 * KIB, 163 * KIB, 108, 40 * 10**9),
         "A100; L2 rate BENCHES (5,120 B/clock would be 7.2 TB/s); CUDA 8.0"),
    Card(*("A100 SXM 80GB", "sm_80", 312 * TERA, 19.5 * TERA, 2039 * GIGA, 40 * MIB, 5.4 * TERA),
         *(164 * KIB, 163 * KIB, 108, 80 * 10**9),
         "A100 datasheet, 80GB SXM column (PCIe: 1,935 GB/s); L2 rate BENCHES; CUDA 8.0"),
    Card(*("H100 SXM", "sm_90", 989.4 * TERA, 66.9 * TERA, 3350 * GIGA, 50 * MIB, 9.7 * TERA),
         *(228 * KIB, 227 * KIB, 132, 80 * 10**9),
         "H100; L2 rate BENCHES H200, same chip; CUDA 9.0"),
    Card(*("H200 SXM", "sm_90", 989.4 * TERA, 66.9 * TERA, 4800 * GIGA, 50 * MIB, 9.7 * TERA),
         *(228 * KIB, 227 * KIB, 132, 141 * 10**9),
         "nvidia.com H200 page; L2 rate BENCHES; CUDA 9.0"),
    Card(*("RX 7900 XTX", "gfx1100", 122.8 * TERA, 61.4 * TERA, 960 * GIGA, 96 * MIB, 3.5 * TERA),
         *(128 * KIB, 64 * KIB, 96, 24 * 10**9),
         "RDNA3 (WMMA 512 flops per clock and unit x 96 x 2.5 GHz); cache: Infinity Cache, vendor's peak rate"),
)

# What torch.cuda.get_device_name() prints, without "NVIDIA", "GeForce", "AMD Radeon". Exact, because a Ti, a
# laptop part, an NVL or a MIG slice of the same number is another card.
DEVICE_NAMES = {
    "rtx 3060": "RTX 3060 12GB", "rtx 3090": "RTX 3090", "rtx 4090": "RTX 4090", "rtx 5090": "RTX 5090",
    "l4": "L4", "a100-sxm4-40gb": "A100 SXM 40GB", "a100-pcie-40gb": "A100 SXM 40GB",
    "a100-sxm4-80gb": "A100 SXM 80GB", "a100-sxm-80gb": "A100 SXM 80GB", "a100 80gb pcie": "A100 SXM 80GB",
    "h100 80gb hbm3": "H100 SXM", "h200": "H200 SXM", "rx 7900 xtx": "RX 7900 XTX",
}


def card_named(device_name: str) -> Card | None:
    """Find the card of a name as torch prints it, or as in CARDS.

    None for a card that is not in the table, near relatives included.
    """
    words = re.sub(r"\b(nvidia|geforce|amd|radeon|tesla)\b", " ", device_name.lower())
    short = " ".join(words.split())
    listed = DEVICE_NAMES.get(short)
    return next((card for card in CARDS if card.name == listed or card.name.lower() == short), None)


def nearest_names(name: str) -> list[str]:
    """List the at least three names of CARDS closest to one that is not there."""
    lower = {card.name.lower(): card.name for card in CARDS}
    found = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.0)
    return [lower[each] for each in found]


class Head(NamedTuple):
    """The language-model head of one model."""
    name: str
    d: int  # hidden size
    v: int  # vocabulary
    softcap: float = 0.0


# hidden_size, vocab_size (of the embedding, padding included), final_logit_softcapping of each config.json
SHAPES = (
    Head("Qwen2.5-0.5B", 896, 151_936),
    Head("Qwen2.5-1.5B", 1536, 151_936),
    Head("Gemma-2-2B", 2304, 256_000, 30.0),
    Head("Qwen2.5-7B", 3584, 152_064),
    Head("Llama-3-8B", 4096, 128_256),
    Head("Qwen2.5-14B", 5120, 152_064),
)
