"""Which engine samples: minimath's own, transformers' generate or vLLM.

    with open_engine(cfg.engine, cfg.sampling, policy, seed=cfg.run.seed) as engine:
        groups = engine.generate(prompts, 8)
"""
from minimath.config.schema import EngineOptions, SamplingOptions
from minimath.core import dist
from minimath.core.errors import UserError
from minimath.models.policy import Policy
from minimath.models.sharding import is_sharded
from minimath.rollout.engine import Engine
from minimath.rollout.kv_cache import NoStandardCache
from minimath.rollout.own_engine import OwnEngine
from minimath.rollout.transformers_engine import TransformersEngine
from minimath.rollout.vllm import VLLMEngine

OWN_ENGINE_ONLY = {"stop_boxed": False, "loop_guard": 0}  # and what stands for "off"


def open_engine(engine: EngineOptions, sampling: SamplingOptions, policy: Policy, *, seed: int = 0, run_dir="",
                say=print) -> Engine:
    """Open the engine that the options ask for; a context manager.

    rollout=auto says so where it falls back to transformers' generate. run_dir: where vLLM finds the adapters. Raises
    UserError for options that the engine does not have, and for a vLLM out of reach.
    """
    slower = ""
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
