"""Which engine samples: minimath's own, which is here, transformers' generate or vLLM."""
import contextlib
import statistics
from collections.abc import Iterator

import torch

from minimath.config.schema import EngineOptions, SamplingOptions
from minimath.core import dist
from minimath.core.errors import UserError, is_out_of_memory
from minimath.core.run_folder import say_once
from minimath.core.text import no_effect
from minimath.models.decoding import decoding_linears
from minimath.models.forward import base_causal_lm, compute_dtype, head, inference
from minimath.models.linears import copied_bytes, is_4bit, packed_product
from minimath.models.memory import EXPECTED, KEEPERS, fitting_rows, free_bytes, has_room_beside, sampling_bytes
from minimath.models.policy import Policy
from minimath.models.variants import is_sharded
from minimath.rollout.blocks import Row
from minimath.rollout.decode import Decode
from minimath.rollout.engine import Engine
from minimath.rollout.kv_cache import Fast, NoStandardCache, decoding_attention
from minimath.rollout.passes import check_model
from minimath.rollout.transformers_engine import TransformersEngine
from minimath.rollout.vllm import VLLMEngine

SHORTEST = 1 / 16  # share of the tokens that a row may sample, with which a rollout counts at least
OWN_ENGINE_ONLY = {"stop_boxed": False, "loop_guard": 0}  # and what stands for "off"


def open_engine(engine: EngineOptions, sampling: SamplingOptions, policy: Policy, *, seed: int = 0, run_dir="",
                say=print) -> Engine:
    """Open the engine that the options ask for; a context manager.

    rollout=auto says so where it falls back to transformers' generate. run_dir: where vLLM finds the adapters. Raises
    UserError for options that the engine does not have, and for a vLLM out of reach."""
    slower, cuts = "", [name for name in ("top_p", "min_p", "top_k")
                        if getattr(sampling, name) != getattr(SamplingOptions(), name)]
    if cuts and not sampling.temperature:
        say_once(no_effect(cuts, "at temperature=0, which takes the likeliest token"))
    if engine.vllm_url and engine.rollout != "vllm":
        raise UserError(f"vllm_url= would do nothing with rollout={engine.rollout}: add rollout=vllm, or leave it out")
    if engine.rollout == "auto" and not is_sharded(policy.model):  # ours reads the weights of a layer by itself
        try:
            return OwnEngine(engine, sampling, policy, seed=seed, say=say)
        except NoStandardCache as error:
            slower = f"{error}: rollouts go through transformers' generate, which is slower"
    for name, off in OWN_ENGINE_ONLY.items():
        if (value := getattr(engine, name)) != off:
            raise UserError(f"{name}={value} needs minimath's own engine; leave it out with rollout={engine.rollout}, "
                            "or use rollout=auto with a model that has a standard KV cache")
    if engine.rollout == "vllm":
        if dist.world() > 1:
            raise UserError("rollout=vllm is for one training process; use rollout=auto with several")
        return VLLMEngine(engine, sampling, policy, seed=seed, run_dir=run_dir, say=say)
    if slower:
        say(slower)
    return TransformersEngine(engine, sampling, policy, seed=seed, say=say)


class OwnEngine(Engine):
    """Decodes in this process, long prompts first; NoStandardCache for models without one."""

    def __init__(self, *options, **more):
        super().__init__(*options, **more)
        self.pads = check_model(self.policy.model)  # whether prompts of unlike length share a prefill
        self.max_num_seqs = self.options.max_num_seqs  # 0: as many as memory allows; less once it ran out
        self.most_places = 0  # of the pool, once memory ran out
        self.share = EXPECTED  # of max_new_tokens, that a row held of its samples in the last rollout
        self._batch, self._metrics = None, {}
        self._kept, self._version, self._trained = None, None, False
        self.records = True  # steps; no more once it failed
        KEEPERS.add(self)

    @torch.no_grad()  # between two yields, too, the caller has its own grad mode
    def stream(self, prompts, n=1, *, keys=None, skip=()):
        jobs = sorted(self.jobs(prompts, n, keys, skip), key=lambda job: -len(job.prompt))
        if not jobs:
            return
        model = self.policy.model
        if self._kept and self._kept.max_new_tokens != self.max_new_tokens:
            self._kept = None  # before there is another: there is no room for both
        batch, self._kept = self._kept or Decode(self), None
        longest, (copy, copied) = len(jobs[0].prompt) + self.max_new_tokens, room_for_copies(model)
        expected = int(statistics.fmean(len(job.prompt) for job in jobs) + self.share * self.max_new_tokens)
        most, places = fitting_rows(model, longest, expected, len(jobs), self.how, asked=self.max_num_seqs,
                                    held=batch.held_bytes() - copied)
        with inference(model), fast_decoding(model, most, copy) as fast:
            batch.start([Row(job) for job in jobs], most, min(places, self.most_places or places), fast)
            self._batch = batch
            try:
                while batch.queue or batch.rows:
                    yield [(*row.job.place, self.sample(row.ids, row.logp, row.boxed or row.ids[-1] in self.eos,
                                                        row.full_logp)) for row in self._advance()]
            finally:
                self._metrics, self._batch = batch.metrics(), None
                self.share = max(SHORTEST, self._metrics["sampled_places"] / self.max_new_tokens)
                batch.stop()
                self.records = batch.graphs.usable
                self._keep(batch)

    def _keep(self, batch: Decode) -> None:
        """Keep state, cache and recorded steps for the next rollout where an update has room beside them.

        What an update takes is known once there was one: before, they are given back, as they always are on a CPU."""
        version = sum(p._version for p in self.policy.model.parameters() if p.requires_grad)
        self._trained |= self._version not in (None, version)
        self._version = version
        vocab = batch.head.weight.shape[0]
        recorded = batch.slots * sampling_bytes(vocab, self.how, batch.device.type)  # in the graphs' own memory
        if self._trained and has_room_beside(batch.device, batch.held_bytes(), recorded):
            self._kept = batch

    def close(self):
        self._kept = None

    def _advance(self) -> list[Row]:
        try:
            return self._batch.advance()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        over = self._batch.halve()  # out here, where the exception no longer holds the tensors of the step
        self.max_num_seqs, self.most_places = self._batch.max_num_seqs, self._batch.places
        return over

    def running(self):
        return self._batch.running() if self._batch else []

    def metrics(self):
        return self._metrics

    def state_dict(self):
        return {"max_num_seqs": self.max_num_seqs, "most_places": self.most_places, "share": self.share,
                "learned_with": self._bears_on_memory()}

    def load_state_dict(self, state):
        """Go on with what was learned, unless an option that bears on memory has changed."""
        if state.get("learned_with") == self._bears_on_memory():
            self.max_num_seqs = state["max_num_seqs"]
            self.most_places, self.share = state.get("most_places", 0), state.get("share", EXPECTED)

    def _bears_on_memory(self) -> list:
        return [self.options.max_num_seqs, self.longest, *vars(self.policy.options).values()]


def room_for_copies(model) -> tuple[bool | int, int]:
    """Tell decoding_linears' copy=, and how many bytes copies take of a card's memory."""
    base = base_causal_lm(model)
    size, room = copied_bytes(model, base.dtype), free_bytes(base.device) // 3
    if base.device.type == "cpu":
        return size < room, 0
    room = min(size, room) if any(is_4bit(m) for m in base.modules()) else 0  # others gain nothing
    return room, room


@contextlib.contextmanager
def fast_decoding(model, rows: int, copy: bool | int) -> Iterator[Fast]:
    """Set the model up for decoding about `rows` rows; weights must not change inside."""
    with decoding_attention(model) as attends, decoding_linears(model, copy=copy, rows=rows) as every:
        lm_head = head(model)
        product = packed_product(lm_head.weight, lm_head.bias, rows) if copy is True else None
        with contextlib.nullcontext() if every else compute_dtype(model):
            yield Fast(attends, product)
