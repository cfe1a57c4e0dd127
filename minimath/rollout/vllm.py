"""Rollouts by vLLM (rollout=vllm), on a server (vllm_url=) or in this process, with the adapter that trains.

Before each rollout the adapter as it is now is loaded under a new name: vLLM's prefix cache goes by the name. Log-probs
are vLLM's processed_logprobs, of the distribution sampled from; what a token had before truncation is not told. vLLM
serves the base in 16 bits where quant=nf4 trains on 4: the samples are then a little off-policy."""
import contextlib
import gc
import os
import tempfile
import uuid
from pathlib import Path

import torch

from minimath.core.checkpoint import save_adapter
from minimath.core.errors import UserError
from minimath.core.files import discard
from minimath.core.segments import fix_segments
from minimath.core.state import restore_rng, rng_state
from minimath.models.forward import base_causal_lm, inference
from minimath.models.load import first_line
from minimath.models.policy import Policy
from minimath.models.variants import CHANGE_THE_BASE
from minimath.rollout.engine import Engine, Job
from minimath.rollout.sampling import Sampling
from minimath.rollout.transformers_engine import logp_difference
from minimath.rollout.vllm_client import Server, answer_of

IN_FLIGHT = 256  # requests, with max_num_seqs=0
SERVED_TOLERANCE = 0.3  # median difference of log-probs between vLLM and the training forward
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM makes room
PROBE = "Tom has 12 apples and buys 7 more. How many apples does he have now?"


class VLLMEngine(Engine):
    """vLLM for one run: serves the adapter as it is at each call, then sleeps.

    Raises UserError for a server of no use, a vllm that does not start, and adapters that vLLM cannot serve."""

    def __init__(self, engine, sampling, policy, *, seed=0, run_dir="", say=print):
        super().__init__(engine, sampling, policy, seed=seed, say=say)
        rank = servable_rank(policy.model)
        longest = max(128, policy.prompt.max_prompt_len + self.max_new_tokens)  # room for the probe, too
        self.probe = Job((0, 0), policy.tokenizer(PROBE, add_special_tokens=False)["input_ids"], 0)
        self.backend = Server(engine.vllm_url, policy.options.name, longest, self.probe, self.how) \
            if engine.vllm_url else Colocated(policy, longest, seed, engine.vllm_gpu_share, rank)
        self.tag = f"minimath-{uuid.uuid4().hex[:8]}"  # other runs may share the server and the folder
        self.folder = Path(run_dir or tempfile.gettempdir(), "vllm", self.tag).absolute()
        self.adapter, self.swaps = "", 0  # name of the adapter served, "": the base model; swaps so far

    def stream(self, prompts, n=1, *, keys=None, skip=()):
        jobs = self.jobs(prompts, n, keys, skip)
        if not jobs:
            return
        self.swap()
        try:
            most = self.options.max_num_seqs or IN_FLIGHT  # at a server; vLLM in this process decides itself
            replies = self.backend.complete(jobs, self.how, self.max_new_tokens, self.eos, most)
            with contextlib.closing(replies) as parts:
                for part in parts:
                    yield [(*jobs[index].place, self.sample(*answer)) for index, answer in part]
        finally:
            self.backend.sleep()

    def swap(self) -> None:
        """Serve the adapter as it is now, if any, in place of the last one.

        Raises UserError if vLLM's log-probs of a few tokens are not those of the training forward."""
        model = self.policy.model
        if has_adapter(model):
            self.swaps += 1
            old, name = self.adapter, f"{self.tag}-{self.swaps}"
            self.backend.load(name, save_adapter(model, self.folder / name))
            self.adapter = name
            if old:
                self.backend.unload(old)
                discard(self.folder / old)
        [answer] = [a for part in self.backend.complete([self.probe], Sampling(), 32, [], 1) for _, a in part]
        with inference(model):
            difference = logp_difference(model, self.probe.prompt, self.sample(*answer), 1.0)
        if not difference <= SERVED_TOLERANCE:
            raise UserError(f"vLLM's log-probs are {difference:.2g} away from this model's: {self.backend.where} has "
                            "another base model or does not apply the adapter; serve the same weights")

    def close(self) -> None:
        """Unload the adapter and remove its folder; what a server does raises nothing."""
        if self.adapter:
            with contextlib.suppress(UserError):
                self.backend.unload(self.adapter)
            self.adapter = ""
        discard(self.folder)
        self.backend.close()


def has_adapter(model) -> bool:
    """Tell whether the policy is more than its base; a judge's adapter is not served."""
    return "default" in getattr(model, "peft_config", {})


def servable_rank(model) -> int:
    """Find the rank that vLLM makes room for, 0 without an adapter; UserError if none holds it."""
    if not has_adapter(model):
        return 0
    lora = model.peft_config["default"]
    init, rank = str(lora.init_lora_weights).lower(), max([lora.r, *(lora.rank_pattern or {}).values()])
    for fault, what in ((lora.use_dora, "dora=true"),
                        (init.startswith(CHANGE_THE_BASE), f"lora_init={init}, which changes the base model"),
                        (lora.modules_to_save, "whole trained modules (modules_to_save)"),
                        (rank > RANKS[-1], f"rank {rank}, above lora_r={RANKS[-1]}")):
        if fault:
            raise UserError(f"rollout=vllm cannot serve an adapter of {what}; use a plain LoRA, or another rollout=")
    return next(room for room in RANKS if room >= rank)


class Colocated:
    """vLLM in this process, asleep while the model trains."""

    where = "vLLM in this process"

    def __init__(self, policy: Policy, longest: int, seed: int, gpu_share: float, rank: int):
        name = policy.options.name
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no second process on the card
        fix_segments()
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UserError(f"rollout=vllm without vllm_url= needs vllm ({first_line(error)}): pip install vllm (it "
                            "brings its torch), or give the vllm_url= of a server in another environment") from None
        self.vllm, self.request, self.lora, self.swaps, self.asleep = vllm, LoRARequest, None, 0, False
        self.sleeps = torch.cuda.is_available()  # elsewhere vLLM has no sleep mode
        options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank} if rank else {}
        rng = rng_state()  # vLLM seeds all generators of the process
        try:
            self.llm = vllm.LLM(
                model=name, trust_remote_code=policy.options.trust_remote_code, seed=seed, max_model_len=longest,
                dtype=str(base_causal_lm(policy.model).dtype).removeprefix("torch."), enable_sleep_mode=self.sleeps,
                gpu_memory_utilization=gpu_share, logprobs_mode="processed_logprobs",
                generation_config="vllm", **options)  # not the model's own temperature and top-k
        except Exception as error:  # vLLM has many kinds of its own
            raise UserError(f"vLLM does not start with {name} ({first_line(error)}); try another vllm_gpu_share= "
                            f"(now {gpu_share}), or leave out rollout=vllm") from None
        finally:
            restore_rng(*rng)

    def complete(self, jobs: list[Job], how: Sampling, max_new_tokens: int, eos: list[int], most: int):
        """Yield the index of each job and its answer, all at the end."""
        params = [self.vllm.SamplingParams(
            n=1, seed=job.seed, temperature=how.temperature, top_p=how.top_p, min_p=how.min_p, top_k=how.top_k or -1,
            max_tokens=max_new_tokens, stop_token_ids=eos, ignore_eos=True, logprobs=0, detokenize=False)
            for job in jobs]
        try:
            self._wake()
            outputs = self.llm.generate([{"prompt_token_ids": job.prompt} for job in jobs], params, use_tqdm=False,
                                        lora_request=self.lora)
        except Exception as error:
            raise UserError(f"vLLM cannot sample ({first_line(error)}); leave out rollout=vllm") from None
        if len(outputs) != len(jobs) or any(len(output.outputs) != 1 for output in outputs):
            raise UserError(f"{self.where} answered with another number of completions than {len(jobs)}")
        ended = [output.outputs[0] for output in outputs]
        logps = [[step[token].logprob for token, step in zip(best.token_ids, best.logprobs or [])] for best in ended]
        yield [(i, answer_of(self.where, list(best.token_ids), logp, best.finish_reason, max_new_tokens, eos))
               for i, (best, logp) in enumerate(zip(ended, logps))]

    def load(self, name: str, folder: Path) -> None:
        """Serve the adapter in a folder in place of the last one."""
        if self.swaps:
            self._wake()
            self.llm.llm_engine.remove_lora(self.swaps)
        self.swaps += 1
        self.lora = self.request(name, self.swaps, str(folder))  # read at the next completion

    def unload(self, name: str) -> None:
        """Do nothing: load has done it, or close does."""

    def sleep(self) -> None:
        """Free the card for the update; the next completion wakes vLLM."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=1)  # weights to the CPU, keys and values dropped
            self.asleep = True

    def _wake(self) -> None:
        if self.asleep:
            torch.cuda.empty_cache()  # it maps memory anew, beside torch, which holds what the update has freed
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        """Free the memory."""
        self.llm = None
        gc.collect()
        torch.cuda.empty_cache()
