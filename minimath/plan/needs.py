"""Count what each stage needs, the most that a card holds, and what to change."""
import contextlib
import json
import os
from bisect import bisect_left

import torch
from transformers import AutoConfig

from minimath.config.load import RECIPES
from minimath.config.options import options_of
from minimath.config.schema import EvalConfig, RLAIFConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.core.files import read_json
from minimath.core.hub import without_network
from minimath.core.run_folder import find_adapter
from minimath.core.text import did_you_mean
from minimath.data.batch import tail_length
from minimath.kernels.common import tile_shape
from minimath.models.load import DTYPES, first_line
from minimath.models.memory import EXPECTED, MOST_SLOTS, cache_bytes_per_token, keeps_state, sampling_bytes, state_bytes
from minimath.models.prefix import EAGER_TOKENS, LEAST_SAVED
from minimath.models.variants import rank_of
from minimath.plan.footprint import Model
from minimath.rollout.passes import PREFILL_TOKENS
from minimath.rollout.sampling import Sampling
from minimath.train.teacher import teacher_kind, teacher_quant

GIB = 1 << 30
CONTEXT = GIB // 2  # CUDA's context, cuBLAS's workspace and kernels, outside torch's allocator: an assumption
FRAGMENTATION = 0.06  # of what torch allocates, lost between its blocks or held inside kernels: an assumption
UNIT, MOST_TOKENS = 256, 1 << 17  # micro_batch_tokens that are proposed: multiples of UNIT, up to MOST_TOKENS
PLACES = 64  # of the engine: a row takes a multiple
COUNTED_BY = ("dtype", "attn", "gradient_checkpointing", "offload", "lora_r", "lora_init", "lora_targets",
              "lora_dropout", "dora", "shard", "compile")
REMEDIES = (("attn", "eager", "sdpa"), ("gradient_checkpointing", False, True), ("optimizer", "adamw", "adamw8bit"),
            ("offload", False, True), ("quant", "none", "nf4"))  # option, its value, what takes less memory; by cost


def nf4_bytes(weights: int) -> int:
    """Count half a byte a weight, the scales of 64 weights each, and theirs."""
    scales = -(-weights // 64)  # a byte each; an fp32 for 256 of them; two code books, an offset
    return -(-weights // 2) + 16 * 4 + scales + 4 * -(-scales // 256) + 256 * 4 + 4


def adam_bytes(weights: int, optimizer: str) -> int:
    """Count two moments of each weight, in fp32 or in a byte with scales."""
    if "8bit" not in optimizer or weights < 4096:  # the state of small tensors stays in fp32; adamw counts its steps
        return 8 * weights + (4 if optimizer == "adamw" else 0)
    return 2 * (weights + 4 * -(-weights // 256))


def longest_row(cfg) -> int:
    return cfg.max_len if isinstance(cfg, SFTConfig) else cfg.prompt.max_prompt_len + cfg.sampling.max_new_tokens


def with_tokens(cfg, tokens: int):
    """Set micro_batch_tokens, and cut rows to them as far as the prompt allows."""
    if isinstance(cfg, SFTConfig):
        return cfg.replace(micro_batch_tokens=tokens, max_len=min(cfg.max_len, tokens))
    new = min(cfg.sampling.max_new_tokens, max(16, tokens - cfg.prompt.max_prompt_len))
    return cfg.replace(micro_batch_tokens=tokens, max_new_tokens=new)


def rank_in(folder: str, rank: int) -> int:
    """Read the rank of the adapter in a folder; `rank` where none is yet."""
    with contextlib.suppress(UserError):
        return read_json(find_adapter(folder) / "adapter_config.json").get("r", rank) if folder else rank
    return rank


def going_on(cfg, before: SFTConfig | None = None):
    """Give a stage the shape of the adapter that it goes on with: of adapter=, or of what the stage before leaves.

    That is a plain LoRA, whatever it began as."""
    if before:
        cfg = cfg.replace(**before.shared(type(cfg), "adapter") | {"adapter": cfg.adapter.path or before.adapter.path})
    elif not cfg.adapter.path:
        return cfg
    return cfg.replace(lora_r=rank_in(cfg.adapter.path, rank_of(cfg.adapter)), lora_init="default")


class Planner:
    """Tell what a model needs, by what it is for, and what a card holds; all in bytes."""

    def __init__(self, name: str, device: str):
        """Read the config of a folder, hub id or model in shapes.json. Raises UserError."""
        self.device = "cpu" if device == "cpu" else "cuda"
        self.models: dict[tuple, Model] = {}
        offline = "" if os.path.isdir(name) else without_network()
        try:
            self.config = AutoConfig.from_pretrained(name)
        except Exception as error:  # a config's validation has kinds of its own
            known = json.loads((RECIPES / "shapes.json").read_text(encoding="utf-8"))
            if name not in known:
                raise UserError(f"model={name!r}: its config can't be read ({offline or first_line(error)}); give a "
                                f"folder, or check the name and the network{did_you_mean(name, known)}") from None
            self.config = AutoConfig.for_model(**known[name if isinstance(known[name], dict) else known[name]])

    def dtype(self, cfg) -> torch.dtype:
        return DTYPES[{"auto": "fp32" if self.device == "cpu" else "bf16"}.get(cfg.model.dtype, cfg.model.dtype)]

    def model(self, cfg) -> Model:
        """The model to count on, made once for each set of options that bear on it."""
        key = tuple(map(cfg.value, COUNTED_BY))
        if key not in self.models:
            self.models[key] = Model(self.config, cfg, self.dtype(cfg), self.device)
        return self.models[key]

    def stays(self, cfg, *, optimizer: bool) -> dict[str, int]:
        model, nf4 = self.model(cfg), cfg.model.quant == "nf4"
        frozen = [t for t in (*model.empty.parameters(), *model.empty.buffers()) if not t.requires_grad]
        cast = model.casts + model.biases
        rows = {"embeddings, head, norms": sum(t.nbytes for t in frozen) - sum(w.nbytes for w in model.linears),
                "linear layers": sum(nf4_bytes(w.numel()) if nf4 else w.nbytes for w in model.linears),
                "adapter": sum(p.nbytes for p in model.trained)}
        rows |= {"adapter, cast": sum(cast)} if cast else {}
        if optimizer:
            rows["optimizer state"] = sum(adam_bytes(p.numel(), cfg.optimizer.name) for p in model.trained)
        return rows | (self.judge(cfg) | self.teacher(cfg) if isinstance(cfg, RLAIFConfig) else {})

    def judge(self, cfg: RLAIFConfig) -> dict[str, int]:
        """Count a judge's adapter on the policy's layers, and what refreshing it takes."""
        if not (cfg.uses_judge() and cfg.judge.adapter):
            return {}
        sizes, size = self.second_adapter(cfg, cfg.judge.adapter)
        training = sum(4 * n + adam_bytes(n, cfg.optimizer.name) for n in sizes)
        return {"judge's adapter": size} | ({"judge's gradients and state": training} if cfg.judge.refresh else {})

    def teacher(self, cfg: RLAIFConfig) -> dict[str, int]:
        """Count a teacher's adapter, or a second model in NF4; the policy's own base costs nothing."""
        kind = teacher_kind(cfg)
        if kind == "adapter":
            return {"teacher's adapter": self.second_adapter(cfg, cfg.teacher.name)[1]}
        if kind != "model":
            return {}
        other = Planner(cfg.teacher.name, self.device)
        cfg = cfg.replace(model=cfg.teacher.name, quant=teacher_quant(self.device), teacher="", reward="judge",
                          judge_adapter="")
        rows = other.stays(cfg, optimizer=False)
        return {"teacher": rows["embeddings, head, norms"] + rows["linear layers"] + sum(other.model(cfg).biases)}

    def second_adapter(self, cfg: RLAIFConfig, folder: str) -> tuple[list[int], int]:
        """Count an adapter beside the policy's: weights of each tensor, bytes with casts."""
        model, rank = self.model(cfg), rank_of(cfg.adapter)
        share = rank_in(folder, rank) / rank  # not there yet: of the policy's rank
        sizes = [int(share * p.numel()) for p in model.trained]
        return sizes, 4 * sum(sizes) + sum(int(share * size) for size in model.casts)

    def shapes(self, cfg) -> list[tuple[float, int, int, bool]]:
        """List the largest passes: rows, length, common prompt, whether behind one another."""
        sft, prompt = isinstance(cfg, SFTConfig), cfg.prompt.max_prompt_len
        budget, longest, model = cfg.optimizer.micro_batch_tokens, longest_row(cfg), self.model(cfg)
        apart = keeps_state(model.empty)  # rows stand alone
        every = cfg.batch_size if sft else cfg.prompts_per_step * cfg.group_size
        packed = not apart and (cfg.packing if sft else model.by_rows)
        tokens = min(max(budget, longest), every * longest)
        rows = (tokens + tail_length(tokens, budget)) / longest if packed else max(1, min(budget // longest, every))
        found = [(rows, longest, 0, packed)]
        if not sft and not apart and cfg.model.attn != "flash_attention_2":
            new = int(prompt * ((1 - 1 / cfg.group_size) / LEAST_SAVED - 1))  # behind longer completions they go apart
            new = min(new, cfg.sampling.max_new_tokens)
            budget = min(budget, EAGER_TOKENS) if cfg.model.attn == "eager" else budget
            if new > 0:  # nothing is predicted from a row's last token
                many = min((max(budget, prompt + new) - prompt) / new, cfg.group_size)
                total = int(prompt + many * (new - 1))
                total += tail_length(total, budget)
                found.append(((total - prompt) / new, new, prompt, True))
        return found

    def on_card(self, rows: dict[str, int]) -> dict[str, int]:
        assumed = CONTEXT + int(FRAGMENTATION * sum(rows.values()))
        return rows | ({"context and fragmentation (assumed)": assumed} if self.device != "cpu" else {})

    def training(self, cfg) -> dict[str, int]:
        rows, peak, model = self.stays(cfg, optimizer=True), 0, self.model(cfg)
        text, size = self.config.get_text_config(), self.dtype(cfg).itemsize
        for many, length, prompt, together in self.shapes(cfg):
            kept, forward, backward = model.passes(many, length, prompt, together)
            tokens = int(prompt + many * length)
            # linear_token_loss: scratch; gradient of the hidden states, twice; a chunk's logits, hidden states, sums
            chunks, columns = tile_shape(tokens, text.vocab_size, size, device=self.device)
            loss = (6 << 20) + tokens * (2 * text.hidden_size * size + 32)
            loss += max(chunks) * (columns * size + text.hidden_size * (4 + size))
            peak = max(peak, forward, backward, kept + loss)
        return self.on_card(rows | {"gradients": rows["adapter"], "activations": peak + self.dequantised(cfg)})

    def in_host_memory(self, cfg) -> int:
        """Count the bytes of all layers' inputs, which wait there by offload=true."""
        tokens = max(prompt + many * length for many, length, prompt, _ in self.shapes(cfg))
        text = self.config.get_text_config()
        return int(tokens) * text.hidden_size * self.dtype(cfg).itemsize * text.num_hidden_layers

    def dequantised(self, cfg) -> int:
        """Count a matrix that is made anew for each of its products, and its group's."""
        model = self.model(cfg)
        one = max(w.numel() for w in model.linears) + model.scratch
        return one * self.dtype(cfg).itemsize if cfg.model.quant == "nf4" else 0

    def rollout(self, base, cfg, seqs: int, card: int) -> dict[str, int]:
        """Count what sampling `seqs` sequences takes. base: options of what was trained."""
        train, model = isinstance(cfg, RLAIFConfig), self.model(base)
        rows = self.stays(base, optimizer=train)
        copies = sum(w.numel() for w in [*model.linears, model.head]) * self.dtype(base).itemsize
        if (self.device == "cpu" or base.model.quant == "nf4") and 3 * copies < card - sum(rows.values()):
            rows["weights copied for decoding"] = copies
        prompt, new = cfg.prompt.max_prompt_len, cfg.sampling.max_new_tokens
        together = max(1, min(PREFILL_TOKENS // prompt, seqs, cfg.prompts_per_step if train else seqs))
        token = cache_bytes_per_token(model.empty)
        logits = seqs * sampling_bytes(model.head.shape[0], Sampling.of(cfg.sampling), self.device)
        # first: it refuses models that nothing can be counted on; a long prompt is read in pieces, with a mask each
        piece = prompt if keeps_state(model.empty) else min(prompt, PREFILL_TOKENS)
        prefill = together * model.followed(piece, 0)[1]
        prefill += (prompt - piece) * (token + PREFILL_TOKENS)
        rows["prefill, or a step's logits"] = max(logits, prefill) + self.dequantised(base)
        fixed = seqs * (state_bytes(model.empty) + 20 * new + 8 * prompt)
        longest = -(-(prompt + new) // PLACES) * PLACES
        # the pool needs what rows hold at a time, and takes what is left of the card, up to all of them at full length
        left = card if self.device == "cpu" else int((card - CONTEXT) / (1 + FRAGMENTATION))
        left -= sum(rows.values()) + fixed
        least = max(longest, seqs * int(prompt + EXPECTED * new))
        rows["keys and values"] = fixed + max(least * token, min(seqs * longest * token, left))
        return self.on_card(rows)

    def most_tokens(self, cfg, card: int, limit: int = MOST_TOKENS) -> int:
        """Find the most micro_batch_tokens up to `limit` that fit, in UNITs; 0: none."""
        return UNIT * bisect_left(range(UNIT, max(limit, UNIT) + 1, UNIT), True, key=lambda n: (
            sum(self.training(with_tokens(cfg, n)).values()) > card))

    def most_seqs(self, base, cfg, card: int) -> int:
        """Find the most sequences side by side that fit and are asked for; 0: none."""
        limit = cfg.engine.max_num_seqs or MOST_SLOTS[self.device]
        limit = min(limit, cfg.prompts_per_step * cfg.group_size) if isinstance(cfg, RLAIFConfig) else limit
        return bisect_left(range(1, limit + 1), True, key=lambda n: (
            sum(self.rollout(base, cfg, n, card).values()) > card))

    def fitted(self, cfg, card: int):
        """Lower the tokens of a pass and the sequences to what fits; None: nothing does."""
        if sum(self.training(cfg).values()) > card:
            tokens = self.most_tokens(cfg, card, cfg.optimizer.micro_batch_tokens)
            cfg = with_tokens(cfg, tokens) if tokens else None
        if cfg is None or isinstance(cfg, SFTConfig):
            return cfg
        seqs = self.most_seqs(cfg, cfg, card)
        return cfg.replace(max_num_seqs=min(seqs, cfg.engine.max_num_seqs)) if seqs else None

    def changes(self, stages: dict, card: int) -> dict[str, dict] | None:
        """Find what makes the stages fit, {section: {option: text}}; None: nothing does.

        micro_batch_tokens changes no result, so it is lowered first; rows are cut only when every remedy is used."""
        trained, options = {name: stages[name] for name in ("sft", "rlaif")}, {}
        for key, worse, better in ((None,) * 3, *REMEDIES):
            if key and all(cfg.value(key) != worse or key == "offload" and cfg.model.compile
                           for cfg in trained.values()):
                continue
            options |= {key: better} if key else {}
            new = {name: self.fitted(cfg.replace(**options), card) for name, cfg in trained.items()}
            if all(new[name] and longest_row(new[name]) == longest_row(cfg) for name, cfg in trained.items()):
                break
        if None in new.values():
            return None
        new["eval"] = stages["eval"].replace(**{k: v for k, v in options.items() if k in options_of(EvalConfig)})
        return {name: found for name, cfg in new.items() if (found := {
            key: str(value).lower() for key, value in cfg.to_dict().items() if value != stages[name].value(key)})}
