"""What all parts share: findings on disk, clocks, memory, a model made there."""
import contextlib
import gc
import importlib.util
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import minimath.core.entry  # noqa: F401  before torch: it sets how threads and allocators work
from bench.measure import ROOT, machine, peak_bytes, reset_peak

PACKAGES = ("triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "cut-cross-entropy")
SHAPE = "Qwen/Qwen2.5-0.5B"  # in minimath/recipes/shapes.json
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512}
OF_THE_CARD = ("CUDA error", "HIP error", "Triton Error")  # after these a process can use the card no more
STD = 1.0  # of random weights, over the root of the hidden size: logits and attention are neither flat nor sharp

if importlib.util.find_spec("minimath.kernels") is None:  # not installed: the folder beside minimath/ is that package
    spec = importlib.util.spec_from_file_location("minimath.kernels", ROOT / "kernels" / "__init__.py",
                                                  submodule_search_locations=[str(ROOT / "kernels")])
    sys.modules["minimath.kernels"] = kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)


class Found:
    """What a part finds, on disk after every line, lest it dies."""

    def __init__(self, spec: dict):
        self.device, self.tiny, self.path = spec["device"], spec["tiny"], Path(spec["found"])
        self.all = {"checks": 0, "wrong": 0, "failed": [], "skipped": [], "figures": [], "rows": []}
        self.write()

    def write(self) -> None:
        if "torch" in sys.modules and "machine" not in self.all and not self.all["failed"]:
            self.all = {"machine": machine(self.device, PACKAGES)} | self.all
        self.path.write_text(json.dumps(self.all, default=str))

    def row(self, what: str, **figures) -> None:
        """Keep raw figures."""
        self.all["rows"].append({"what": what, **figures})
        print(self.all["rows"][-1], flush=True)
        self.write()

    def figure(self, words: str) -> None:
        """Keep a line for the table."""
        self.all["figures"].append(words)
        self.write()

    def check(self, what: str, right: bool, words: str) -> None:
        """Count a claim of correctness; words: what was seen."""
        self.all["checks"] += 1
        if not right:
            self.all["wrong"] += 1
            self.fail(f"{what}: {words}")

    def fail(self, words: str) -> None:
        self.all["failed"].append(words)
        self.write()

    def skip(self, words: str) -> None:
        self.all["skipped"].append(words)
        self.write()

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Take an exception inside for a failed check, but not an error of the card."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.check(what, False, f"{type(error).__name__}: {error}"[:400])
            if any(words in str(error) for words in OF_THE_CARD):
                raise

    def end(self) -> None:
        self.all["ended"] = True
        self.write()


def has_device(found: Found) -> bool:
    """Tell whether the device is there; a fault if not."""
    if found.device == "cpu":
        return True
    import torch
    if not torch.cuda.is_available():
        found.fail(f"torch {torch.__version__} sees no card here (CUDA {torch.version.cuda}, HIP {torch.version.hip}); "
                   "--device cpu --tiny tries the command without one")
    return torch.cuda.is_available()


def env(found: Found) -> None:
    """Tell the card and what is installed; run the self test of `minimath doctor`."""
    import torch

    from minimath.commands.doctor import KERNELS, machine_findings, tested
    from minimath.models.load import pick_device, pick_dtype
    device = pick_device(found.device)
    dtype, why = pick_dtype("auto", device)
    facts = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"capability": torch.cuda.get_device_capability(device), "cudnn": torch.backends.cudnn.version(),
                  "free bytes": free, "total bytes": total}
    found.row("machine", **facts, **{f.what: f.words for f in machine_findings(device, dtype, why)})
    versions = found.all["machine"]["versions"]
    found.figure(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    for test in (tested(name, device, dtype) for name in KERNELS):
        found.check(test.what, test.state == "ok", test.words)
        found.figure(f"{test.what}: {test.words}")


# ---- clocks and memory

def sync(device: str) -> None:
    if device == "cuda":
        import torch
        torch.cuda.synchronize()


def seconds(function: Callable, device: str, *, rounds: int = 5, calls: int = 1) -> float:
    """Measure a call: median seconds of rounds of `calls`, after one that warms up."""
    taken = []
    function()
    for _ in range(rounds):
        sync(device)
        started = time.perf_counter()
        for _ in range(calls):
            function()
        sync(device)
        taken.append((time.perf_counter() - started) / calls)
    return statistics.median(taken)


@contextlib.contextmanager
def peak_into(device: str, row: dict) -> Iterator[None]:
    """Put the most bytes allocated inside into row; None on a CPU.

    All of them, and those above what was held before."""
    row |= {"peak bytes": None, "peak bytes above": None, "reserved bytes": None}
    if device != "cuda":
        yield
        return
    import torch
    gc.collect()  # a model that was used before hangs in circles
    before = reset_peak(device)
    yield
    peak = peak_bytes(device)
    row |= {"peak bytes": peak, "peak bytes above": peak - before, "reserved bytes": torch.cuda.max_memory_reserved()}


# ---- the model

def byte_tokenizer():
    """Make a tokenizer whose tokens are bytes: it is trained on nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def model_folder(found: Found) -> str:
    """Write the random model once for all parts -> its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from minimath.config.load import RECIPES
    folder = found.path.parent / "model"
    if folder.exists():
        return str(folder)
    shape = json.loads((RECIPES / "shapes.json").read_text(encoding="utf-8"))[SHAPE] | (TINY if found.tiny else {})
    config = AutoConfig.for_model(**shape, max_position_embeddings=8192, bos_token_id=None, eos_token_id=1,
                                  pad_token_id=0, initializer_range=STD / shape["hidden_size"] ** 0.5)
    torch.manual_seed(0)
    with torch.device(found.device):  # drawn on the card: in seconds
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if found.tiny else torch.bfloat16)
    new = folder.with_suffix(".new")  # a part that is killed here leaves no half of a model to the next
    model.save_pretrained(new)
    byte_tokenizer().save_pretrained(new)
    new.rename(folder)
    return str(folder)


def config_of(found: Found, kind, **options):
    """Make the options of a stage on that model."""
    common = {"model": model_folder(found), "device": found.device, "lr": 1e-3, "lr_schedule": "constant",
              "warmup": 0.0, "save_every": 0}
    return kind(**common | ({"dtype": "fp32"} if found.device == "cpu" else {}) | options)


def policy_of(cfg, *, fused: bool = True):
    """Load a policy with an adapter that does something, the same each time.

    fused=False: with transformers' and peft's layers. Raises RuntimeError where layers that should be are not fused."""
    from unittest import mock

    import torch

    from minimath.models import load
    from minimath.models.forward import base_causal_lm
    from minimath.models.fused import fused_layers
    from minimath.models.policy import load_policy
    gc.collect()
    with contextlib.nullcontext() if fused else mock.patch.object(load, "fuse", lambda model: "for the comparison"):
        policy = load_policy(cfg, train=True)
    if (fused_layers(base_causal_lm(policy.model)) is not None) != fused:
        raise RuntimeError("the model's layers could not be fused")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(policy.model.named_parameters()):
            if p.requires_grad:
                std = 0.02 if "lora_B" in name else p.shape[-1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=draw) * std)
    return policy


def drawn_ids(count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Draw token ids of unlike lengths."""
    import random
    draw = random.Random(seed)
    return [[draw.randrange(2, 258) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]
