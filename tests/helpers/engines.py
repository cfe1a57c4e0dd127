"""Engines around a model of the tests, and what they sample."""
from minimath.config.schema import EngineOptions, ModelOptions, PromptOptions, SamplingOptions
from minimath.models.policy import Policy
from minimath.rollout.open import OwnEngine

ENGINE = ("max_num_seqs", "stop_boxed", "loop_guard", "rollout", "vllm_url", "vllm_gpu_share")


def policy_with(model, tokenizer) -> Policy:
    """The policy of a loaded model, with default options."""
    return Policy(model, tokenizer, ModelOptions(name=model.name_or_path), PromptOptions())


def engine_of(model, tokenizer, *, kind=OwnEngine, seed: int = 0, eos=None, say=print, **options):
    """An engine of that kind; options: flat, of EngineOptions and SamplingOptions. eos: in place of the model's own."""
    engine = EngineOptions(**{name: value for name, value in options.items() if name in ENGINE})
    sampling = SamplingOptions(**{name: value for name, value in options.items() if name not in ENGINE})
    made = kind(engine, sampling, policy_with(model, tokenizer), seed=seed, say=say)
    made.eos = made.eos if eos is None else list(eos)
    return made


def generate(model, tokenizer, prompts, *, samples: int = 1, keys=None, **options):
    """`samples` completions of each prompt, one list per prompt."""
    return engine_of(model, tokenizer, **options).generate(prompts, samples, keys)


def facts(sample) -> tuple:
    """What an engine decides of a sample."""
    return sample.ids, sample.logp, sample.finished, sample.full_logp, sample.text


def all_facts(groups) -> list:
    return [[facts(sample) for sample in group] for group in groups]
