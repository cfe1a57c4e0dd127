"""Bytes that each stage needs, the most that a card holds, and what to change so that it holds a recipe."""
import json
from bisect import bisect_left
from collections.abc import Callable

import torch
from transformers import AutoConfig

from minimath.config.load import RECIPES
from minimath.config.options import options_of
from minimath.config.schema import EvalConfig, RLAIFConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.core.text import did_you_mean
from minimath.kernels.common import WORKSPACE_BYTES
from minimath.models.load import DTYPES, base_causal_lm, head_module
from minimath.models.memory import cache_bytes_per_token
from minimath.models.prefix import EAGER_TOKENS
from minimath.plan.footprint import Passes, empty_model

GIB = 1 << 30
CONTEXT = GIB // 2  # CUDA's context, cuBLAS's workspace and kernels, outside torch's allocator: an assumption
FRAGMENTATION = 0.06  # of what torch allocates, lost between its blocks or held inside kernels: an assumption
UNIT, MOST_TOKENS = 256, 1 << 17  # micro_batch_tokens that are proposed: multiples of UNIT, up to MOST_TOKENS
PREFILL_TOKENS, PLACES, MOST_SEQS = 4096, 64, {"cpu": 128, "cuda": 512}  # of the engine: a prefill, a length, a batch
LOSS_SCRATCH = 6 << 20  # of the fused loss beside its logits
BEAR_ON_SHAPES = ("dtype", "lora_r", "lora_targets", "dora")
BEAR_ON_PASSES = (*BEAR_ON_SHAPES, "attn", "gradient_checkpointing", "lora_dropout")
REMEDIES = (("attn", "eager", "sdpa"), ("gradient_checkpointing", False, True), ("optimizer", "adamw", "adamw8bit"),
            ("quant", "none", "nf4"))  # option, its value, what takes less memory; what costs least comes first


def model_config(name: str):
    """The config of a folder or a hub id, else of a model whose shapes ship with minimath. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        shapes = json.loads((RECIPES / "shapes.json").read_text(encoding="utf-8"))
        if name in shapes:
            return AutoConfig.for_model(**(shapes[name] if isinstance(shapes[name], dict) else shapes[shapes[name]]))
        raise UserError(f"model={name!r}: its config can't be read ({str(error).strip().splitlines()[0][:200]}); give "
                        f"a folder, or check the name and the network{did_you_mean(name, shapes)}") from None


def frozen_linears(model) -> list[torch.nn.Linear]:
    """The layers that quant=nf4 quantises: every linear layer but the head and the adapter's own."""
    lm_head = head_module(model)
    return [m for m in base_causal_lm(model).modules() if isinstance(m, torch.nn.Linear) and m is not lm_head
            and not any(p.requires_grad for p in m.parameters())]


def nf4_bytes(weights: int) -> int:
    """Half a byte a weight; a byte for the scale of each 64; an fp32 for 256 of those; two code books, an offset."""
    scales = -(-weights // 64)
    return -(-weights // 2) + 16 * 4 + scales + 4 * -(-scales // 256) + 256 * 4 + 4


def adam_bytes(weights: int, optimizer: str) -> int:
    """Of two moments: in fp32, for adamw with a count of steps; or a byte each and an fp32 for 256 of them."""
    if "8bit" not in optimizer or weights < 4096:  # the state of small tensors stays in fp32
        return 8 * weights + (4 if optimizer == "adamw" else 0)
    return 2 * (weights + 4 * -(-weights // 256))


def longest_row(cfg) -> int:
    return cfg.max_len if isinstance(cfg, SFTConfig) else cfg.prompt.max_prompt_len + cfg.sampling.max_new_tokens


def shapes(cfg) -> list[tuple[str, int, int]]:
    """(kind, rows, length) of the largest forward passes: of micro_batch_tokens, or of one longer row. A group's
    completions go padded or behind their prompt, as their lengths will decide."""
    budget, longest, sft = cfg.optimizer.micro_batch_tokens, longest_row(cfg), isinstance(cfg, SFTConfig)
    if sft and cfg.packing:
        return [("row", 1, min(max(budget, longest), cfg.batch_size * longest))]
    rows = max(1, min(budget // longest, cfg.batch_size if sft else cfg.prompts_per_step * cfg.group_size))
    if sft or cfg.model.attn == "flash_attention_2":
        return [("row", rows, longest)]
    budget = min(budget, EAGER_TOKENS) if cfg.model.attn == "eager" else budget
    whole = longest + (cfg.group_size - 1) * cfg.sampling.max_new_tokens
    return [("row", rows, longest), ("shared", 1, min(max(budget, longest), whole))]


def with_tokens(cfg, tokens: int):
    """cfg with micro_batch_tokens=tokens and no row that is longer, as far as its prompt allows."""
    if isinstance(cfg, SFTConfig):
        return cfg.replace(micro_batch_tokens=tokens, max_len=min(cfg.max_len, tokens))
    new = min(cfg.sampling.max_new_tokens, max(16, tokens - cfg.prompt.max_prompt_len))
    return cfg.replace(micro_batch_tokens=tokens, max_new_tokens=new)


def most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to limit that fits, where what fits with n fits with fewer; 0: not even 1."""
    return bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))


class Planner:
    """What a model needs and what fits, on a card (device "cuda") or a CPU, by the options of the stages."""

    def __init__(self, name: str, device: str):
        self.config = model_config(name)
        self.device = "cpu" if device == "cpu" else "cuda"
        self.counted: dict[tuple, object] = {}

    def dtype(self, cfg) -> torch.dtype:
        auto = "fp32" if self.device == "cpu" else "bf16"
        return DTYPES[auto if cfg.model.dtype == "auto" else cfg.model.dtype]

    def once(self, make: Callable, cfg, names: tuple[str, ...]):
        """make(config, cfg, dtype), once for each set of values of the options `names`."""
        key = make, *map(cfg.value, names)
        if key not in self.counted:
            self.counted[key] = make(self.config, cfg, self.dtype(cfg))
        return self.counted[key]

    def passes(self, cfg, *shape) -> tuple[int, ...]:
        """Passes.of(*shape). Raises UserError where code looks at its numbers, as that of mixtures of experts does."""
        try:
            return self.once(Passes, cfg, BEAR_ON_PASSES).of(*shape)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"this model's passes can't be followed without its numbers ({str(error)[:200]!r}); try "
                            "another attn=, or plan with a model of like size") from None

    # ---- what a stage needs: bytes by what they are for

    def stays(self, cfg, *, optimizer: bool) -> dict[str, int]:
        model, nf4 = self.once(empty_model, cfg, BEAR_ON_SHAPES), cfg.model.quant == "nf4"
        linear = {id(m.weight): m.weight for m in frozen_linears(model)}
        trained = [p for p in model.parameters() if p.requires_grad]
        rest = [p for p in model.parameters() if not p.requires_grad and id(p) not in linear] + list(model.buffers())
        state = sum(adam_bytes(p.numel(), cfg.optimizer.name) for p in trained)
        return {"embeddings, head, norms": sum(t.nbytes for t in rest),
                "linear layers": sum(nf4_bytes(w.numel()) if nf4 else w.nbytes for w in linear.values()),
                "adapter": sum(p.nbytes for p in trained)} | ({"optimizer state": state} if optimizer else {})

    def with_margin(self, rows: dict[str, int]) -> dict[str, int]:
        assumed = CONTEXT + int(FRAGMENTATION * sum(rows.values()))
        return rows | ({"context and fragmentation (assumed)": assumed} if self.device != "cpu" else {})

    def training(self, cfg) -> dict[str, int]:
        """Of a training stage."""
        rows, peak = self.stays(cfg, optimizer=True), 0
        text, size = self.config.get_text_config(), self.dtype(cfg).itemsize
        for kind, count, length in shapes(cfg):
            kept, forward, backward = self.passes(cfg, kind, count, length)
            # linear_token_loss: a tile's logits; sums and gradient of the hidden states with their copies
            loss = LOSS_SCRATCH + min(WORKSPACE_BYTES[self.device], count * length * text.vocab_size * size)
            loss += count * length * (text.hidden_size * (4 + 3 * size) + 32)
            peak = max(peak, forward, backward, kept + loss)
        if cfg.model.quant == "nf4":  # a matrix is made anew for each of its products
            peak += text.hidden_size * text.intermediate_size * size
        return self.with_margin(rows | {"gradients": rows["adapter"], "activations": peak})

    def rollout(self, base, cfg, seqs: int, card: int) -> dict[str, int]:
        """Of sampling `seqs` sequences side by side on a card of `card` bytes. base: options of what was trained."""
        train, model = isinstance(cfg, RLAIFConfig), self.once(empty_model, base, BEAR_ON_SHAPES)
        rows, lm_head = self.stays(base, optimizer=train), head_module(model).weight
        copies = (sum(m.weight.numel() for m in frozen_linears(model)) + lm_head.numel()) * self.dtype(base).itemsize
        if (self.device == "cpu" or base.model.quant == "nf4") and 3 * copies < card - sum(rows.values()):
            rows["weights copied for decoding"] = copies
        prompt, new = cfg.prompt.max_prompt_len, cfg.sampling.max_new_tokens
        together = max(1, min(PREFILL_TOKENS // prompt, seqs, cfg.prompts_per_step if train else seqs))
        # a step's logits in fp32 and their softmax; top-p sorts them, with the places that they came from
        logits = seqs * lm_head.shape[0] * (28 if cfg.sampling.top_p < 1 else 12)
        keys = -(-(prompt + new) // PLACES) * PLACES * cache_bytes_per_token(model)
        return self.with_margin(rows | {
            "keys and values": seqs * (keys + 20 * new + 8 * prompt),
            "prefill, or a step's logits": max(logits, *self.passes(base, "prefill", together, prompt))})

    # ---- what fits a card of `card` bytes

    def most_tokens(self, cfg, card: int, limit: int = MOST_TOKENS) -> int:
        """The most micro_batch_tokens up to `limit`, in UNITs, with which a training stage fits; 0: none."""
        return UNIT * most(max(1, limit // UNIT), lambda n: sum(self.training(with_tokens(cfg, n * UNIT)).values()) <= card)

    def most_seqs(self, base, cfg, card: int) -> int:
        """The most sequences side by side, no more than the options ask for; 0: not even one."""
        limit = cfg.engine.max_num_seqs or MOST_SEQS[self.device]
        limit = min(limit, cfg.prompts_per_step * cfg.group_size) if isinstance(cfg, RLAIFConfig) else limit
        return most(limit, lambda n: sum(self.rollout(base, cfg, n, card).values()) <= card)

    def fitted(self, cfg, card: int):
        """cfg with no more tokens in a pass and a row, and sequences, than fit; None where nothing does."""
        if sum(self.training(cfg).values()) > card:
            tokens = self.most_tokens(cfg, card, cfg.optimizer.micro_batch_tokens)
            cfg = with_tokens(cfg, tokens) if tokens else None
        if cfg is None or isinstance(cfg, SFTConfig):
            return cfg
        seqs = self.most_seqs(cfg, cfg, card)
        return cfg.replace(max_num_seqs=min(seqs, cfg.engine.max_num_seqs)) if seqs else None

    def changes(self, stages: dict, card: int) -> dict[str, dict] | None:
        """{section: {option: text of its value}} that make the stages fit; None where nothing does.

        micro_batch_tokens changes no result, so it is lowered first; rows are cut only when every remedy is used.
        """
        trained, options = {name: stages[name] for name in ("sft", "rlaif")}, {}
        for key, worse, better in ((None,) * 3, *REMEDIES):
            if key and all(cfg.value(key) != worse for cfg in trained.values()):
                continue
            options |= {key: better} if key else {}
            new = {name: self.fitted(cfg.replace(**options), card) for name, cfg in trained.items()}
            if all(new[name] and longest_row(new[name]) == longest_row(cfg) for name, cfg in trained.items()):
                break
        if None in new.values():
            return None
        new["eval"] = stages["eval"].replace(**{k: v for k, v in options.items() if k in options_of(EvalConfig)})
        found = {name: {key: str(value).lower() for key, value in cfg.to_dict().items()
                        if value != stages[name].value(key)} for name, cfg in new.items()}
        return {name: values for name, values in found.items() if values}
