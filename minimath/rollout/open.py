"""Which engine samples: minimath's own (rollout.py), transformers' generate (rollout_hf.py) or vLLM (rollout_vllm.py).

    with open_engine(cfg, model, tokenizer) as sample:
        groups = sample(prompts, samples=8, keys=..., on_done=..., on_step=stop.check)
"""
import contextlib

from minimath.core import dist
from minimath.data.chat import eos_ids
from minimath.core.errors import UserError
from minimath.models.load import base_causal_lm
from minimath.rollout.engine import Completion, generate
from minimath.models.sharding import is_sharded
from minimath.rollout.kv_cache import NoStandardCache

OWN_ENGINE_ONLY = {"repetition_penalty": 1.0, "stop_boxed": False, "loop_guard": 0}  # and what stands for "off"


@contextlib.contextmanager
def open_engine(cfg, model, tokenizer, *, say=print, run_dir=""):
    """Yield sample(prompts, *, samples, keys, done, on_done, on_step, on_tokens, facts) -> one list of completions per
    prompt; on_tokens is heard by minimath's own engine alone.

    cfg: RLAIFConfig or EvalConfig, for its rollout and sampling options. run_dir: where vLLM finds the adapters. With
    rollout=auto, a model without a standard KV cache goes to transformers' generate, which is said once. Raises
    UserError for options that the engine does not have.
    """
    common = {"max_new_tokens": cfg.sampling.max_new_tokens, "temperature": cfg.sampling.temperature, "top_p": cfg.sampling.top_p,
              "min_p": cfg.sampling.min_p, "top_k": cfg.sampling.top_k, "eos": eos_ids(tokenizer, model), "seed": cfg.run.seed}
    own = {name: getattr(cfg, name) for name in OWN_ENGINE_ONLY}
    with contextlib.ExitStack() as stack:
        if cfg.engine.rollout == "vllm":
            if dist.world() > 1:
                raise UserError("rollout=vllm is for one training process; use rollout=auto with several")
            refuse_own_options(cfg)
            yield open_vllm_engine(cfg, model, tokenizer, run_dir, common, stack)
            return
        plain = cfg.engine.rollout == "transformers" or is_sharded(model)  # ours reads the weights of a layer by itself
        if plain:
            refuse_own_options(cfg)

        def sample(prompts, *, on_step=None, on_tokens=None, facts=None, **options) -> list[list[Completion]]:
            nonlocal plain
            if not plain:
                try:
                    return generate(model, tokenizer, prompts, slots=cfg.engine.max_num_seqs, on_step=on_step, on_tokens=on_tokens,
                                    facts=facts, say=say, **common, **own, **options)
                except NoStandardCache as error:
                    refuse_own_options(cfg)
                    say(f"{error}: rollouts go through transformers' generate, which is slower")
                    plain = True
            from minimath.rollout.transformers_engine import generate_hf
            with at_each_forward(model, on_step):
                return generate_hf(model, tokenizer, prompts, slots=cfg.engine.max_num_seqs or 64, **common, **options)

        yield sample


def open_vllm_engine(cfg, model, tokenizer, run_dir, common: dict, stack: contextlib.ExitStack):
    """The vLLM engine: the adapter as it is now is swapped in before each call, and vLLM sleeps after it."""
    from minimath.rollout.vllm import open_vllm
    vllm = stack.enter_context(contextlib.closing(open_vllm(cfg, model, tokenizer, run_dir)))
    calls = 0

    def sample(prompts, *, on_step=None, on_done=None, on_tokens=None, facts=None, **options) -> list[list[Completion]]:
        nonlocal calls
        calls += 1

        def ended(*completion):  # vLLM tells of no steps: a stop is taken when a completion ends
            for tell, about in ((on_done, completion), (on_step, ())):
                if tell is not None:
                    tell(*about)

        vllm.swap(model, calls)
        try:
            return vllm.generate(prompts, slots=cfg.engine.max_num_seqs, on_done=ended, **common, **options)
        finally:
            vllm.sleep()

    return sample


def refuse_own_options(cfg) -> None:
    for name, off in OWN_ENGINE_ONLY.items():
        if getattr(cfg, name) != off:
            raise UserError(f"{name}={getattr(cfg, name)} needs minimath's own engine; leave it out with "
                            f"rollout={cfg.engine.rollout}, or use rollout=auto with a model that has a standard KV cache")


@contextlib.contextmanager
def at_each_forward(model, on_step):
    """Inside, on_step() is called at every forward: a signal waits for one token, not for a completion."""
    if on_step is None:
        yield
        return
    hook = base_causal_lm(model).get_input_embeddings().register_forward_pre_hook(lambda *_: on_step())
    try:
        yield
    finally:
        hook.remove()
