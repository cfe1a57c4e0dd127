"""The groups of options of stage 2 alone: judge, reward, brevity, teacher, loss. schema.py says how to read them."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from minimath.config.options import Count, Main, Positive, Share


@dataclass
class JudgeOptions:
    prefix = "judge_"
    name: Annotated[Literal["self", "openai", "heuristic"], Main] = "self"
    """self (this model, adapter off or judge_adapter), openai (an endpoint) or heuristic (right steps, then shorter)"""
    adapter: str = ""
    """run folder of `minimath judge train`: the adapter that judges, beside the policy's on the same base"""
    form: Literal["auto", "pair", "single", "steps"] = "auto"
    """pair (the better of two), single (is one right and sound), steps (its worst step); auto: as trained, or pair"""
    url: str = ""
    """base URL of an OpenAI-compatible server, for judge=openai"""
    model: str = ""
    """model name asked for at judge_url"""
    key_env: str = "OPENAI_API_KEY"
    """NAME of the environment variable that holds the key; empty: no key"""
    timeout_s: Positive = 30.0
    """seconds before a judge request is given up; all requests of a rollout round get 20 times as long"""
    concurrency: Count = 8
    """judge requests in flight"""
    max_tokens: Count = 16
    """longest reply of judge_url in tokens; a model that thinks first needs thousands"""
    fallback: Literal["none", "heuristic", "stop"] = "none"
    """pairs left without votes: they count nothing, get the heuristic judge's vote, or stop (save and end)"""
    pairs: int = 0
    """comparisons per candidate, the others from a Bradley-Terry fit; 0: all pairs"""
    rubric: str = "maths"
    """what judges self and openai go by: maths, code, law, medicine, readability, or a file of yours"""
    canary_every: int = 0
    """judge pairs of known order every N steps, to see whether the judge is being fooled; 0: never"""
    refresh: int = 0
    """train judge_adapter on the newest rollouts every N steps, as the verifier marks them; 0: never"""
    refresh_steps: Count = 4
    """optimizer steps of a refresh"""
    refresh_lr: Positive = 1e-4
    """learning rate of a refresh"""


@dataclass
class RewardOptions:
    name: Annotated[Literal["judge", "paper", "none"] | Callable, Main] = "judge"
    """judge (correct, judge wins, brevity), paper (the authors' stage 2), none (a teacher alone) or python:module.fn"""
    judge_weight: Share = 0.25
    """weight of judge wins; judge_weight + brevity_weight <= 0.5, so that correct always beats wrong"""
    format_weight: float = 0.0
    """weight of a well-formed final answer"""
    step_weight: Share = 0.0
    """taken off where an equation of the solution does not hold (17 + 5 = 23), be its answer correct or not"""
    overlong: Literal["mask", "penalty", "none"] = "mask"
    """completions that did not finish: left out, DAPO's soft penalty over the last fifth, or like others"""


@dataclass
class BrevityOptions:
    prefix = "brevity_"
    name: Annotated[Literal["ratio", "log", "cosine", "minmax", "alp", "truncate"], Main] = "ratio"
    """how the length of a correct sample is scored (train/brevity.py), or truncate: not, but max_new_tokens falls"""
    weight: Share = 1.0
    """weight of brevity among correct answers, of reward=judge; with brevity_control the most that it rises to"""
    counts: Literal["all", "thought"] = "all"
    """tokens that are a sample's length: all of them, or those of its thought alone"""
    yardstick: Literal["mean", "shortest"] = "mean"
    """the length of a group's correct samples that each is held against; shortest: for ratio alone"""
    limit: int = 0
    """truncate: max_new_tokens of the last step, to which it falls evenly"""
    scale: Literal["together", "apart"] = "apart"
    """in the reward, and scaled with it; or added to the advantage undivided, so that a token more is a token more"""
    control: Literal["none", "accuracy"] = "accuracy"
    """constant weight; or one that rises while accuracy holds, falls when it drops, and is 0 for hard problems"""


@dataclass
class TeacherOptions:
    prefix = "teacher_"
    name: Annotated[str, Main] = ""
    """learn its log-probs: base, policy, a run folder, a model, http://.../v1 (vLLM; key: $TEACHER_API_KEY)"""
    system: str = ""
    """system message of the teacher's prompt ("Be concise."); empty: that of the policy"""
    weight: Positive = 1.0
    """weight of log p_teacher - log p_policy, per token, in nats, beside the advantage"""
    kl: Literal["sampled", "full"] = "sampled"
    """of the sampled token; or the reverse KL over the vocabulary, for a teacher on the same base"""


@dataclass
class LossOptions:
    name: Annotated[Literal["dapo", "grpo", "dr_grpo", "cispo", "gspo"], Main] = "dapo"
    """policy loss"""
    clip_low: Share = 0.2
    """the ratio is clipped below at 1 - clip_low; gspo's is a mean over the completion: its paper takes 0.0003"""
    clip_high: Positive = 0.28
    """the ratio is clipped above at 1 + clip_high; gspo's paper takes 0.0004"""
    kl_coef: float = 0.0
    """weight of the KL to the base model; 0: none"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    importance_cap: float = 2.0
    """cap of the importance weights between training and sampling log-probs; 0: no weights"""
    scale_advantage: Literal["group", "none", "rloo", "maxrl"] = "group"
    """advantages: by the group's deviation, undivided, with a leave-one-out baseline, or by the group's mean"""
