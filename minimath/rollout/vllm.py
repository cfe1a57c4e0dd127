"""Rollouts by vLLM (rollout=vllm), on a server (vllm_url=) or in this process, with the adapter that trains.

    vllm = open_vllm(cfg, model, tokenizer, run_dir)     # once a run
    vllm.swap(model, step)                               # each step: the adapter as it is now is served from here on
    groups = vllm.generate(prompts, samples=8, ...)      # as rollout.generate
    vllm.sleep()                                         # before the update: gives this process its memory back

A server runs beside the trainer, on its own card, and must find the adapters under the same path:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 16 \\
        --logprobs-mode processed_logprobs

Each step's adapter is loaded under a new name, then the old one is unloaded: vLLM's prefix cache goes by the name.
Each completion is a request with the seed that rollout.py gives it, so that it does not depend on its batch (up to
rounding); its tokens are others than rollout.py's, for vLLM draws otherwise.

Log-probs: vLLM's processed_logprobs are those of the distribution sampled from (after temperature, min-p, top-k,
top-p, in vLLM's order); its default, raw_logprobs, leaves temperature out too. A server is asked which it gives. What
a token had before truncation is not told: full_logp is None. Each swap compares a few tokens with the training
forward, so that another base model or an adapter that is not applied does not go unnoticed. vLLM serves the base in 16
bits where quant=nf4 trains on 4: the samples are then a little off-policy.
"""
import contextlib
import gc
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from minimath.core.checkpoint import save_adapter
from minimath.core.files import discard
from minimath.core.errors import UserError
from minimath.models.load import base_causal_lm, inference
from minimath.rollout.engine import Completion
from minimath.rollout.transformers_engine import logp_difference
from minimath.rollout.sampling import Sampling, stream_seed
from minimath.core.state import restore_rng, rng_state
from minimath.rollout.vllm_client import Job, Server, completion_of

SERVED_TOLERANCE = 0.3  # median difference of log-probs between vLLM and the training forward
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM makes room
PROBE = "Tom has 12 apples and buys 7 more. How many apples does he have now?"


def open_vllm(cfg, model, tokenizer, run_dir) -> "VLLM":
    """Connect to cfg.engine.vllm_url, or start vLLM in this process where it is empty.

    Reads of cfg: model, seed, trust_remote_code, max_prompt_len, max_new_tokens, temperature, top_p, min_p, top_k;
    vllm_url, vllm_model, vllm_key_env, vllm_timeout_s, vllm_adapter_dir, vllm_gpu_share. UserError with what to do if
    the server is out of reach, serves another model, does not tell token ids or the log-probs that cfg's sampling
    needs, or if vllm is not installed or does not start; also for adapters that vLLM cannot serve.
    """
    check_adapter_is_servable(model)
    longest = max(128, cfg.prompt.max_prompt_len + cfg.sampling.max_new_tokens)  # room for the probe, too
    probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    backend = Server(cfg, longest, probe) if cfg.engine.vllm_url else Colocated(cfg, model, longest)
    tag = f"minimath-{uuid.uuid4().hex[:8]}"  # other runs may share the server and the folder
    vllm = VLLM(backend, tag, Path(cfg.vllm_adapter_dir or Path(run_dir) / "vllm").absolute() / tag, probe)
    vllm.check_sampling(Sampling(cfg.sampling.temperature, cfg.sampling.top_p, cfg.sampling.min_p, cfg.sampling.top_k))
    return vllm


def generate_vllm(vllm: "VLLM", tokenizer, prompts: list[list[int]], **options) -> list[list[Completion]]:
    """VLLM.generate in the call shape of rollout.generate, with the handle in the model's place."""
    return vllm.generate(prompts, **options)


@dataclass
class VLLM:
    """vLLM for one run: what is served, and where its adapters lie."""
    backend: "Server | Colocated"
    tag: str
    folder: Path
    probe: list[int]
    adapter: str = ""  # name of the adapter served; empty: the base model
    swaps: int = 0

    def generate(self, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int, temperature: float = 1.0,
                 top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0, eos: list[int], seed: int = 0,
                 slots: int = 0, keys: list[int] | None = None, done: dict | None = None,
                 on_done=None) -> list[list[Completion]]:
        """Sample `samples` completions of each prompt; arguments and result as in rollout.generate.

        slots: most requests in flight at a server, 0 for 256; vLLM in this process decides itself, and tells of
        on_done at the end. full_logp is None: where top_k, top_p or min_p are on it is not known.
        """
        how = Sampling(temperature, top_p, min_p, top_k)
        self.check_sampling(how)
        keys = list(range(len(prompts))) if keys is None else keys
        done = dict(done or {})
        places = [(p, s) for p in range(len(prompts)) for s in range(samples) if (p, s) not in done]
        jobs = [Job(prompts[p], stream_seed(seed, keys[p], s)) for p, s in places]
        with contextlib.closing(self.backend.complete(jobs, how, max_new_tokens, list(eos), slots or 256)) as ended:
            for index, completion in ended:
                done[places[index]] = completion
                if on_done is not None:
                    on_done(*places[index], completion)
        return [[done[p, s] for s in range(samples)] for p in range(len(prompts))]

    def swap(self, model, step: int) -> None:
        """Serve the adapter as it is now; the last one is unloaded. A model without an adapter: only the check.

        UserError if the adapter cannot be written or loaded, or if vLLM's log-probs are not those of `model`.
        """
        if isinstance(model, PeftModel):
            self.swaps += 1
            name, old = f"{self.tag}-{self.swaps}-step-{step}", self.adapter
            self.backend.load(name, self.swaps, save_adapter(model, self.folder / name))
            self.adapter = name
            if old:
                self.backend.unload(old, self.swaps - 1)
                discard(self.folder / old)
        how, new = Sampling(), 32
        [(_, completion)] = self.backend.complete([Job(self.probe, 0)], how, new, [], 1)
        with inference(model):
            difference = logp_difference(model, self.probe, completion, how.temperature)
        if not difference <= SERVED_TOLERANCE:
            raise UserError(f"vLLM's log-probs at step {step} are {difference:.2g} away from this model's: "
                            f"{self.backend.where} has another base model or does not apply the adapter; check that "
                            "it serves the same weights, or leave out rollout=vllm")

    def sleep(self) -> None:
        """Free the card for the update, where vLLM is in this process; the next swap or generate wakes it."""
        self.backend.sleep()

    def close(self) -> None:
        """Unload the adapter and remove its folder. Never raises for what a server does."""
        if self.adapter:
            with contextlib.suppress(UserError):
                self.backend.unload(self.adapter, self.swaps)
            discard(self.folder / self.adapter)
            self.adapter = ""
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        self.backend.close()

    def check_sampling(self, how: Sampling) -> None:
        """UserError if the log-probs given are not those of this sampling."""
        changed = how.temperature not in (0, 1) or (how.temperature and (how.top_p < 1 or how.min_p or how.top_k))
        if changed and not self.backend.processed:
            raise UserError(f"{self.backend.where} tells log-probs from before temperature, top-p, min-p and top-k, "
                            "which training cannot use: start it with --logprobs-mode processed_logprobs, or use "
                            "temperature=1 top_p=1 min_p=0 top_k=0")


def check_adapter_is_servable(model) -> None:
    """UserError for adapters that vLLM refuses, or that were made for a changed base model."""
    if not isinstance(model, PeftModel):
        return
    lora = model.peft_config["default"]
    init = str(lora.init_lora_weights).lower()
    reason = ("dora=true" if lora.use_dora else f"lora_init={init}, which changes the base model,"
              if init.startswith(("pissa", "olora", "corda", "loftq")) else
              "trained whole modules (modules_to_save)" if lora.modules_to_save else "")
    if reason:
        raise UserError(f"rollout=vllm cannot serve an adapter with {reason}; use a plain LoRA, or another rollout=")


class Colocated:
    """vLLM in this process, asleep while the model trains."""

    where, processed = "vLLM in this process", True

    def __init__(self, cfg, model, longest: int):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no second process on the card
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UserError(f"rollout=vllm without vllm_url= needs vllm in this environment ({first_line(error)}): pip "
                            "install vllm (it brings its own torch), or start a server in another environment and "
                            "give its vllm_url=") from None
        self.vllm, self.request, self.lora = vllm, LoRARequest, None
        self.sleeps = torch.cuda.is_available()  # elsewhere vLLM has no sleep mode
        options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank_of(model)} \
            if isinstance(model, PeftModel) else {}
        rng = rng_state()  # vLLM seeds all generators of the process
        try:
            self.llm = vllm.LLM(model=cfg.model.name, trust_remote_code=cfg.model.trust_remote_code, seed=cfg.run.seed,
                                dtype=str(base_causal_lm(model).dtype).removeprefix("torch."),
                                max_model_len=longest, gpu_memory_utilization=cfg.engine.vllm_gpu_share,
                                enable_sleep_mode=self.sleeps, logprobs_mode="processed_logprobs",
                                generation_config="vllm",  # not the model's own temperature and top-k
                                **options)
        except Exception as error:  # vLLM has many kinds of its own
            raise UserError(f"vLLM does not start with {cfg.model.name} ({first_line(error)}); try another vllm_gpu_share= "
                            f"(now {cfg.engine.vllm_gpu_share}), or leave out rollout=vllm") from None
        finally:
            restore_rng(*rng)
        self.asleep = False

    def complete(self, jobs: list[Job], how: Sampling, max_new_tokens: int, eos: list[int], most: int):
        """Yield (index of the job, Completion), all at the end."""
        self._wake()
        params = [self.vllm.SamplingParams(
            n=1, seed=job.seed, temperature=how.temperature, top_p=how.top_p, min_p=how.min_p, top_k=how.top_k or -1,
            max_tokens=max_new_tokens, stop_token_ids=eos, ignore_eos=True, logprobs=0, detokenize=False)
            for job in jobs]
        try:
            outputs = self.llm.generate([{"prompt_token_ids": job.prompt} for job in jobs], params, use_tqdm=False,
                                        lora_request=self.lora) if jobs else []
        except Exception as error:
            raise UserError(f"vLLM cannot sample ({first_line(error)}); leave out rollout=vllm") from None
        if len(outputs) != len(jobs) or any(len(output.outputs) != 1 for output in outputs):
            raise UserError(f"{self.where} answered with another number of completions than {len(jobs)}")
        for index, output in enumerate(outputs):
            best = output.outputs[0]
            ids = list(best.token_ids)
            logp = [step[token].logprob for token, step in zip(ids, best.logprobs or [])]
            yield index, completion_of(self.where, ids, logp, best.finish_reason, max_new_tokens, eos)

    def load(self, name: str, number: int, folder: Path) -> None:
        self.lora = self.request(name, number, str(folder))  # read at the next completion

    def unload(self, name: str, number: int) -> None:
        self._wake()
        self.llm.llm_engine.remove_lora(number)
        self.lora = None if self.lora is not None and self.lora.lora_name == name else self.lora

    def sleep(self) -> None:
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=1)  # weights to the CPU, keys and values dropped
            self.asleep = True

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        self.llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rank_of(model) -> int:
    """The smallest rank for which vLLM can make room that holds the adapter's."""
    lora = model.peft_config["default"]
    rank = max([lora.r, *(lora.rank_pattern or {}).values()])
    if rank > RANKS[-1]:
        raise UserError(f"rollout=vllm serves adapters of rank {RANKS[-1]} at most, not {rank}; use a smaller lora_r")
    return next(r for r in RANKS if r >= rank)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
