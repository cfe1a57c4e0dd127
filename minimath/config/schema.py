r"""Every option, declared once: groups of options, and the stages that are made of them.

A field is an option: its annotation gives type, choices and bounds, the text below it the help. An option goes by the
name of its field (`lr=1e-4`), the `Main` field of a group by the group (`judge=self`), and the fields of a group with a
`prefix` start with it (`judge_url=...`), on the command line, in recipes and in Python.

    cfg = RLAIFConfig(model="Qwen/Qwen2.5-0.5B-Instruct", lr=1e-5, judge="heuristic")
    cfg.optimizer.lr, cfg.judge.name
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from minimath.config.options import Bound, Count, Fraction, Main, Positive, Share, Stage
from minimath.config.rl_options import BrevityOptions, JudgeOptions, LossOptions, RewardOptions, TeacherOptions

BY_JUDGE = ("judge", "majority+judge")  # verifiers


@dataclass
class ModelOptions:
    name: Annotated[str, Main] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """base model: a folder or a hub id"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """compute type"""
    quant: Literal["none", "nf4"] = "none"
    """weights of the frozen base: as they are, or nf4 (4 bit, bitsandbytes)"""
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """attention"""
    trust_remote_code: bool = False
    """run Python code that ships with the model; only for models you trust"""
    compile: bool = False
    """train through transformers' decoder layers, compiled by torch.compile (a minute at the start), not minimath's"""
    shard: bool = False
    """split the frozen base over the processes that were started (FSDP2), for models that no single card holds"""


@dataclass
class PromptOptions:
    system: str = ""
    """system message; empty: none"""
    prompt_template: str = "{problem}\nPut the final answer in \\boxed{{}}."
    """user message; {problem} is replaced, other braces are doubled"""
    max_prompt_len: Count = 1024
    """longest prompt in tokens, longer problems are left out (and wrong in an evaluation)"""
    thinking: Literal["auto", "on", "off"] = "auto"
    """whether the model thinks before it answers, by the switch of its chat template; auto: as that has it"""
    template_args: str = ""
    """comma list of NAME=VALUE for the chat template (reasoning_effort=high); date=YYYY-MM-DD: the one it writes"""

    def asked(self) -> dict:
        """What makes a prompt what it is."""
        return {name: value for name, value in vars(self).items() if name != "max_prompt_len"}


@dataclass
class AdapterPath:
    path: Annotated[str, Main] = ""
    """adapter or run folder to start from; empty: none"""


@dataclass
class AdapterOptions(AdapterPath):
    lora_r: Count = 16
    """rank of the adapter"""
    lora_alpha: Positive = 32.0
    """adapter scale: the update is multiplied by alpha / r (alpha / sqrt(r) with rslora)"""
    lora_dropout: Fraction = 0.0
    """dropout on the adapter's input"""
    lora_targets: str = "all-linear"
    """adapted layers: all-linear (all but the head) or a comma list of module names"""
    rslora: bool = False
    """rank-stabilised scale alpha / sqrt(r)"""
    dora: bool = False
    """weight-decomposed LoRA (slower, a little better at low rank)"""
    lora_init: str = "default"
    """adapter initialisation: default, gaussian, orthogonal; pissa, pissa_niter_4, olora (of twice the rank)"""


@dataclass
class OptimizerOptions:
    name: Annotated[Literal["adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw32bit"], Main] = "adamw"
    """AdamW, with 8-bit or paged states by bitsandbytes"""
    lr: Positive = 2e-4
    """peak learning rate"""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """learning rate after warm-up"""
    warmup: float = 0.03
    """warm-up: below 1 a share of the steps, from 1 on a number of steps"""
    weight_decay: float = 0.0
    """decoupled weight decay on the adapter"""
    max_grad_norm: float = 1.0
    """gradient norm is clipped to this; 0: no clipping"""
    micro_batch_tokens: Count = 4096
    """tokens per forward pass; changes memory only, never the result"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, about a third slower"""
    offload: bool = False
    """with gradient_checkpointing, what it keeps waits in host memory: for rows of 16,000 tokens and more on a card"""


@dataclass
class DataOptions:
    source: Annotated[str | list, Main] = ""
    """problems: a file, a folder or a datasets name; in Python also a list of dicts"""
    split: str = "train"
    """split of a datasets name"""
    limit: int = 0
    """use at most N examples; 0: all"""
    strict: bool = False
    """a bad row stops the run instead of being skipped and counted"""


@dataclass
class RunOptions:
    seed: Annotated[int, Bound(below=2**32)] = 0
    """seed of data order, adapter initialisation and sampling"""
    out: str = ""
    """run folder; empty: runs/<command>-<timestamp>"""
    resume: bool = False
    """go on with the run in the folder `out`"""
    deterministic: bool = False
    """the same bits again on a card, at some speed; a CPU gives them anyway, with the same number of threads"""


@dataclass
class TrainRunOptions(RunOptions):
    save_every: int = 50
    """checkpoint every N steps; 0: only at the end. The three newest and the best one are kept"""
    max_minutes: float = 0.0
    """stop cleanly, with a checkpoint, after this many minutes; lr decays by the clock if it is short; 0: no limit"""
    sample_every: int = 0
    """print a sampled solution every N steps; 0: never"""
    trackers: Annotated[str, Literal["wandb", "tensorboard", "trackio"]] = ""
    """comma list of wandb, tensorboard, trackio"""


@dataclass
class EvaluationOptions:
    eval_data: str | list = ""
    """held-out problems evaluated during training; empty: none"""
    eval_every: int = 0
    """evaluate every N steps; 0: never"""
    eval_limit: Count = 64
    """problems per evaluation"""
    eval_max_new_tokens: Count = 512
    """longest completion in an evaluation, in tokens"""
    final: Literal["last", "best"] = "last"
    """adapter left at the end; best: the evaluation with fewest tokens within a standard error of the best accuracy"""


@dataclass
class EngineOptions:
    rollout: Literal["auto", "transformers", "vllm"] = "auto"
    """what samples: minimath's engine (transformers' generate for models it can't serve), transformers or vllm"""
    max_num_seqs: int = 0
    """sequences decoded side by side; 0: as many as memory allows"""
    stop_boxed: bool = False
    """a closed \\boxed{...} behind the thought ends a completion, as the end token does"""
    loop_guard: int = 0
    """cut a completion whose last N tokens repeat a piece four times or more; 0: off"""
    vllm_url: str = ""
    """base URL of a vLLM server, for rollout=vllm; empty: vLLM in this process. Its key: $VLLM_API_KEY"""
    vllm_gpu_share: Annotated[float, Bound(above=0, most=1)] = 0.4
    """share of the card's memory that vLLM takes in this process"""


@dataclass
class SamplingOptions:
    max_new_tokens: Count = 512
    """longest completion in tokens"""
    temperature: float = 1.0
    """sampling temperature; 0: greedy"""
    top_p: Annotated[float, Bound(above=0, most=1)] = 1.0
    """nucleus sampling: smallest set of tokens with this mass; 1: off"""
    min_p: Share = 0.0
    """drop tokens below this share of the likeliest one; 0: off"""
    top_k: int = 0
    """only the k likeliest tokens; 0: off"""


class SFTConfig(Stage):
    """Stage 1: supervised fine-tuning on worked solutions."""
    model: ModelOptions
    prompt: PromptOptions
    adapter: AdapterOptions
    optimizer: OptimizerOptions
    data: DataOptions
    run: TrainRunOptions
    evaluation: EvaluationOptions
    engine: EngineOptions
    epochs: Positive = 1.0
    """passes over the data (when steps is 0)"""
    steps: int = 0
    """optimizer steps; 0: from epochs"""
    batch_size: Count = 16
    """examples per optimizer step"""
    max_len: Count = 2048
    """longest example in tokens, longer ones are cut"""
    packing: bool = True
    """several examples per row, without attention between them"""


class RLAIFConfig(Stage):
    """Stage 2: on-policy RL with an AI judge."""
    model: ModelOptions
    prompt: PromptOptions
    adapter: AdapterOptions
    optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(lr=1e-5, lr_schedule="constant"))
    data: DataOptions
    run: TrainRunOptions = field(default_factory=lambda: TrainRunOptions(sample_every=10))
    evaluation: EvaluationOptions = field(default_factory=lambda: EvaluationOptions(final="best"))
    engine: EngineOptions
    sampling: SamplingOptions
    judge: JudgeOptions
    reward: RewardOptions
    brevity: BrevityOptions
    teacher: TeacherOptions
    loss: LossOptions
    verifier: Literal["exact", "regex", "none", "majority", "majority+steps", "judge", "majority+judge"
                      ] | Callable = "exact"
    """what is correct: equal answers, a pattern, all; without answers: most of a group (or its sound ones), a judge"""
    majority_share: Share = 0.5
    """least share of a group's votes that the winning answer needs, for verifier=majority, +steps and +judge"""
    steps: Count = 100
    """rollout steps"""
    prompts_per_step: Count = 8
    """problems per step"""
    group_size: Annotated[int, Bound(least=2)] = 8
    """completions per problem; rewards are compared within a group"""
    max_refill: int = 2
    """extra rollout rounds that replace groups without a signal"""
    updates_per_rollout: Count = 1
    """passes over each rollout"""
    curriculum: Literal["none", "learnable"] = "none"
    """problems drawn: in the order of the data, or by the chance that a group holds correct and wrong ones"""

    def check(self) -> str:
        judge, reward, brevity, teacher = self.judge, self.reward, self.brevity, self.teacher
        own, truncates = judge.name == "self", brevity.name == "truncate"
        free = truncates or brevity.scale == "apart" and self.loss.scale_advantage == "group"  # where correct is 2 more
        relative = reward.judge_weight + (0.0 if free else brevity.weight)  # among the correct ones
        longest, plain = self.sampling.max_new_tokens, JudgeOptions()
        idle = [f"judge_{name}=" for name in ("url", "model", "key_env", "timeout_s", "concurrency", "max_tokens")
                if getattr(judge, name) != getattr(plain, name)]
        faults = [
            (self.sampling.temperature <= 0,
             "temperature must be above 0 in rlaif: a group of greedy completions is one text"),
            (self.uses_judge() and judge.name == "openai" and not (judge.url and judge.model),
             "judge=openai needs judge_url=http://.../v1 and judge_model=NAME"),
            (self.uses_judge() and own and self.model.shard,
             "judge=self can't ask a model of shard=true: use judge=openai or judge=heuristic"),
            ((judge.adapter or judge.form in ("single", "steps")) and not own,
             f"judge_adapter and judge_form are for judge=self, not for judge={judge.name}"),
            (idle and judge.name != "openai",
             f"{' and '.join(idle)} would do nothing: judge={judge.name} asks no server; "
             "use judge=openai, or leave that out"),
            (judge.refresh and not (judge.adapter and self.uses_judge() and self.verifier not in (*BY_JUDGE, "none")),
             "judge_refresh trains a judge_adapter= in use by a verifier= that tells right from wrong without it"),
            (self.majority_share != 0.5 and "majority" not in str(self.verifier),
             f"majority_share is for verifier=majority, +steps and +judge, not for verifier={self.verifier}"),
            (reward.name == "judge" and (relative > 0.5 or reward.format_weight >= 0.5),
             f"judge_weight={reward.judge_weight:g}, brevity_weight={brevity.weight:g}, format_weight="
             f"{reward.format_weight:g}: keep judge_weight + brevity_weight <= 0.5, as brevity_weight=0.25 does (the "
             "former alone with brevity_scale=apart scale_advantage=group) and format_weight < 0.5, so that a correct "
             "answer always beats a wrong one"),
            (reward.name == "judge" and relative + reward.format_weight + reward.step_weight >= 1,
             f"step_weight={reward.step_weight:g}: keep its sum with judge_weight, format_weight and brevity_weight "
             "(but for brevity_scale=apart scale_advantage=group) below 1, so that a correct answer always beats a "
             "wrong one"),
            (self.loss.scale_advantage == "maxrl" and (reward.name != "judge" or reward.step_weight
                                                       or reward.overlong == "penalty"),
             "scale_advantage=maxrl divides by a mean reward above 0: use reward=judge with overlong=mask or none, and "
             "step_weight=0"),
            (brevity.name == "log" and brevity.yardstick == "shortest",
             "brevity=log scores only what is shorter than its yardstick, and nothing is shorter than the shortest: "
             "use brevity_yardstick=mean, or brevity=ratio"),
            (brevity.limit and not truncates, "brevity_limit is for brevity=truncate"),
            (truncates and not 0 < brevity.limit < longest,
             f"brevity=truncate needs a brevity_limit below max_new_tokens={longest}"),
            (truncates and reward.overlong != "none",
             "brevity=truncate needs overlong=none, so that what is cut is wrong"),
            (reward.name == "none" and not teacher.name, "reward=none needs a teacher= to learn from"),
            (teacher.system and not teacher.name,
             "teacher_system= is the prompt of a teacher=, and there is none: teacher=policy is the policy itself"),
            (teacher.name == "policy" and not teacher.system,
             "teacher=policy is the policy itself: give it another prompt by teacher_system="),
            (teacher.name and self.model.shard, "teacher= can't be asked beside a model of shard=true"),
            (self.teacher_is_server() and (teacher.kl == "full" or self.sampling.temperature != 1),
             f"teacher={teacher.name} tells log-probs at temperature 1, and of single tokens: use temperature=1 and "
             "teacher_kl=sampled")]
        return next((fault for wrong, fault in faults if wrong), "")

    def teacher_is_server(self) -> bool:
        return "://" in self.teacher.name

    def uses_judge(self) -> bool:
        """Tell whether reward or verifier depend on a judge: else none needs to be there."""
        return self.judges_rewards() or self.verifier in BY_JUDGE

    def judges_rewards(self) -> bool:
        return self.reward.name == "judge" and self.reward.judge_weight > 0

    def on_policy(self) -> bool:
        """Tell whether the policy that sampled is the one that trains."""
        return self.updates_per_rollout == 1


class EvalConfig(Stage):
    """Evaluation on problems with known answers."""
    model: ModelOptions
    prompt: PromptOptions
    adapter: AdapterPath
    data: DataOptions = field(default_factory=lambda: DataOptions(split="test"))
    run: RunOptions
    engine: EngineOptions
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(temperature=0.0))
    samples: Count = 1
    """completions per problem (k of pass@k and maj@k)"""
    budgets: str = ""
    """comma list of token budgets at which accuracy is reported too"""
    thinking_budget: int = 0
    """tokens of thought after which </think> and the answer's beginning are put in; 0: no limit"""
    suite: str = ""
    """comma list of gsm8k, math500, aime24, aime25, svamp and NAME=FILE, one by one; data= may name their folder"""

    def check(self) -> str:
        if self.samples > 1 and self.sampling.temperature == 0:
            return f"samples={self.samples} with temperature=0 would repeat one text; set temperature=0.6, or samples=1"
        if self.thinking_budget >= self.sampling.max_new_tokens:
            return f"thinking_budget={self.thinking_budget} needs a larger max_new_tokens, which is that of all tokens"
        return ""


STAGES: dict[str, type[Stage]] = {"sft": SFTConfig, "rlaif": RLAIFConfig, "eval": EvalConfig}
