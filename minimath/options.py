"""Every option of every stage: one flat dataclass per stage, each field followed by its one-line docstring.

Inheritance only shares groups of fields. `config.py` fills these classes from recipes and the command line,
and checks the values against the tables at the end of this file. The field style (a docstring below each
field) follows litgpt.
"""
from dataclasses import dataclass


@dataclass
class ModelConfig:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """base model: a folder or a hub id"""
    adapter: str = ""
    """adapter or run folder to start from; empty: none"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: str = "auto"
    """compute type: auto, fp32, bf16 or fp16"""
    quant: str = "none"
    """weights of the frozen base: none or nf4 (4 bit, bitsandbytes)"""
    double_quant: bool = True
    """quantise the scales of nf4 as well (0.4 bit per weight less)"""
    trust_remote_code: bool = False
    """run Python code that ships with the model; only for models you trust"""
    attn: str = "sdpa"
    """attention: sdpa, eager or flash_attention_2"""
    shard: bool = False
    """split the frozen base over the processes that were started (FSDP2), for models that no single card holds"""
    liger: bool = False
    """RMSNorm, RoPE and SwiGLU by liger-kernel's Triton kernels; a GPU, and pip install -e '.[liger]'"""
    seed: int = 0
    """seed of data order, adapter initialisation and sampling"""
    out: str = ""
    """run folder; empty: runs/<command>-<timestamp>"""
    prompt_template: str = "{problem}\nPut the final answer in \\boxed{{}}."
    """user message; {problem} is replaced, other braces are doubled"""
    system: str = ""
    """system message; empty: none"""


@dataclass
class AdapterConfig(ModelConfig):
    lora_r: int = 16
    """rank of the adapter"""
    lora_alpha: float = 32.0
    """adapter scale: the update is multiplied by alpha / r (alpha / sqrt(r) with rslora)"""
    lora_dropout: float = 0.0
    """dropout on the adapter's input"""
    lora_targets: str = "all-linear"
    """adapted layers: all-linear (all but the head) or a comma list of module names"""
    rslora: bool = False
    """rank-stabilised scale alpha / sqrt(r)"""
    dora: bool = False
    """weight-decomposed LoRA (slower, a little better at low rank)"""
    lora_init: str = "default"
    """adapter initialisation, passed to peft: default, gaussian, pissa, pissa_niter_4, olora, orthogonal"""
    gradient_checkpointing: bool = False
    """recompute activations in backward: less memory, about a third slower"""
    optimizer: str = "adamw"
    """adamw, adamw8bit, paged_adamw8bit or paged_adamw32bit"""
    lr: float = 2e-4
    """peak learning rate"""
    lr_schedule: str = "cosine"
    """after warm-up: cosine, linear or constant"""
    warmup: float = 0.03
    """warm-up: below 1 a share of the steps, from 1 on a number of steps"""
    min_lr_ratio: float = 0.0
    """the schedule ends at lr * min_lr_ratio"""
    weight_decay: float = 0.0
    """decoupled weight decay on the adapter"""
    beta1: float = 0.9
    """Adam: decay of the first moment"""
    beta2: float = 0.999
    """Adam: decay of the second moment"""
    max_grad_norm: float = 1.0
    """gradient norm is clipped to this; 0: no clipping"""
    micro_tokens: int = 4096
    """tokens per forward pass; changes memory only, never the result"""
    save_every: int = 50
    """checkpoint every N steps; 0: only at the end"""
    on_save_error: str = "stop"
    """a checkpoint that can't be written before the last step: stop, or continue and try again at the next save"""
    keep: int = 3
    """newest checkpoints kept (the best one is always kept)"""
    resume: bool = False
    """go on from the newest valid checkpoint of the run folder `out`"""
    log_every: int = 1
    """metrics every N steps"""
    max_minutes: float = 0.0
    """stop cleanly, with a checkpoint, after this many minutes; 0: no limit"""
    data: str = ""
    """training problems: a file, a folder or a datasets name"""
    split: str = "train"
    """split of a datasets name"""
    limit: int = 0
    """use at most N examples; 0: all"""
    strict: bool = False
    """a bad row stops the run instead of being skipped and counted"""
    data_format: str = "auto"
    """row shape: auto or the name of one that data.py knows"""
    trackers: str = ""
    """comma list of wandb, tensorboard, trackio"""


@dataclass
class SFTConfig(AdapterConfig):
    lr: float = 2e-4
    """peak learning rate"""
    epochs: float = 1.0
    """passes over the data (when steps is 0)"""
    steps: int = 0
    """optimiser steps; 0: from epochs"""
    batch_size: int = 16
    """examples per optimiser step"""
    max_len: int = 2048
    """longest example in tokens, longer ones are cut"""
    packing: bool = True
    """several examples per row, without attention between them"""
    label_smoothing: float = 0.0
    """share of the target's mass spread over the vocabulary"""
    z_loss: float = 0.0
    """weight of logsumexp**2, which keeps logits small"""
    eval_data: str = ""
    """held-out problems evaluated during training; empty: none"""
    eval_every: int = 0
    """evaluate every N steps; 0: never"""
    eval_limit: int = 64
    """problems per evaluation"""
    eval_max_new_tokens: int = 256
    """longest completion in an evaluation, in tokens"""
    sample_every: int = 0
    """print a sampled solution every N steps; 0: never"""


@dataclass
class EngineConfig:
    top_p: float = 1.0
    """nucleus sampling: smallest set of tokens with this mass; 1: off"""
    min_p: float = 0.0
    """drop tokens below this share of the likeliest one; 0: off"""
    top_k: int = 0
    """only the k likeliest tokens; 0: off"""
    repetition_penalty: float = 1.0
    """logits of tokens that occurred are divided by this (multiplied below 0); 1: off"""
    stop_boxed: bool = False
    """a closed \\boxed{...} ends a completion, as the end token does"""
    loop_guard: int = 0
    """cut a completion whose last N tokens repeat a piece four times or more; 0: off"""
    slots: int = 0
    """sequences decoded side by side; 0: as many as memory allows"""
    rollout: str = "auto"
    """what samples: auto (minimath's engine, transformers' generate for models it can't serve), transformers or vllm"""
    vllm_url: str = ""
    """base URL of a vLLM server, for rollout=vllm; empty: vLLM in this process"""
    vllm_model: str = ""
    """name of the base model at vllm_url; empty: what the server serves"""
    vllm_key_env: str = "VLLM_API_KEY"
    """NAME of the environment variable that holds the server's key, if it wants one"""
    vllm_timeout_s: float = 1200.0
    """seconds before a request to the server is given up"""
    vllm_adapter_dir: str = ""
    """folder that trainer and server both see, for the adapters; empty: in the run folder"""
    vllm_gpu_share: float = 0.4
    """share of the card's memory that vLLM takes in this process"""


@dataclass
class RLAIFConfig(EngineConfig, AdapterConfig):
    lr: float = 1e-5
    """peak learning rate"""
    lr_schedule: str = "constant"
    """after warm-up: cosine, linear or constant"""
    steps: int = 100
    """rollout steps"""
    prompts_per_step: int = 8
    """problems per step"""
    group_size: int = 8
    """completions per problem"""
    max_prompt_len: int = 1024
    """longest prompt in tokens, longer problems are left out"""
    max_new_tokens: int = 512
    """longest completion in tokens"""
    temperature: float = 1.0
    """sampling temperature"""
    curriculum: str = "none"
    """problems drawn: none (order of the data) or learnable (by the chance that a group holds right and wrong ones)"""
    min_solve_rate: float = 0.0
    """problems whose running solve rate is below this rest for three epochs; 0: none"""
    max_solve_rate: float = 1.0
    """problems whose running solve rate is above this rest for three epochs; 1: none"""
    gate: str = "exact"
    """right or wrong: exact (equal answers), regex (the answer is a pattern), none (all right) or python:module.fn"""
    reward: str = "judge"
    """judge (gate, judge wins, brevity), rules (a sum of reward_parts) or python:module.fn"""
    reward_parts: str = "format=1,cosine=1,length=1"
    """reward=rules: weights of right, format, cosine, length, brevity, judge, python:module.fn; default: the paper's"""
    judge: str = "self"
    """self (this model, adapter off), openai (an endpoint) or rules (deterministic, offline)"""
    judge_url: str = ""
    """base URL of an OpenAI-compatible server, for judge=openai"""
    judge_model: str = ""
    """model name asked for at judge_url"""
    judge_key_env: str = "OPENAI_API_KEY"
    """NAME of the environment variable that holds the key; empty: no key"""
    judge_timeout_s: float = 30.0
    """seconds before a judge request is given up"""
    judge_retries: int = 3
    """further tries per judge request, with growing pauses"""
    judge_concurrency: int = 8
    """judge requests in flight"""
    judge_verdict: str = "auto"
    """what judge_url is asked for: auto (the richest it has), logprobs (soft votes), json_schema or plain text"""
    judge_max_tokens: int = 16
    """longest reply of judge_url in tokens; a model that thinks first needs thousands"""
    judge_step_s: float = 600.0
    """seconds for all judge requests of a rollout round; what is not answered by then is no vote; 0: no limit"""
    judge_breaker: int = 16
    """judge requests that failed in a row after which the rest of a rollout round is not asked"""
    judge_fallback: str = "none"
    """pairs left without votes: none (they count nothing), rules (the rules judge's) or stop (save and end)"""
    judge_cache: str = ""
    """folder of kept judge replies, which are not paid for twice; empty: ~/.cache/minimath/judge; none: no cache"""
    judge_price_in: float = 0.0
    """price of a million prompt tokens at judge_url, for the cost count"""
    judge_price_out: float = 0.0
    """price of a million completion tokens at judge_url, for the cost count"""
    judge_max_chars: int = 4000
    """longest candidate shown to a judge, in characters"""
    judge_plan: str = "round_robin"
    """round_robin (all pairs), swiss (about n log2(n) / 2, the others from a fit) or listwise (the best of up to 6)"""
    judge_rubric: str = "maths"
    """what judges self and openai go by: maths, code, law, medicine, readability, or a file like minimath/rubric.txt"""
    judge_canary_every: int = 0
    """judge pairs of known order every N steps, to see whether the judge is being fooled; 0: never"""
    lam_judge: float = 0.25
    """weight of judge wins; lam_judge + lam_length <= 0.5, so that right always beats wrong"""
    lam_length: float = 0.25
    """weight of brevity among right answers"""
    lam_format: float = 0.0
    """weight of a well-formed final answer"""
    loss_type: str = "dapo"
    """dapo, grpo, dr_grpo, cispo or gspo"""
    clip_low: float = 0.2
    """the ratio is clipped below at 1 - clip_low; gspo's is a mean over the completion: its paper takes 0.0003"""
    clip_high: float = 0.28
    """the ratio is clipped above at 1 + clip_high; gspo's paper takes 0.0004"""
    clip_dual: float = 0.0
    """bound of the ratio where the advantage is negative (dual clip), above 1; 0: off"""
    beta: float = 0.0
    """weight of the KL to the base model; 0: none"""
    kl: str = "unbiased"
    """gradient of that KL: unbiased (k3 times the ratio) or k3 (k3 alone, as GRPO was published; biased)"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    importance: str = "truncate"
    """importance weights between training and sampling log-probs: truncate (at the cap) or mask (0 beyond [1/c, c])"""
    importance_cap: float = 2.0
    """cap c of the importance weights; 0: no weights"""
    updates_per_rollout: int = 1
    """passes over each rollout"""
    minibatches: int = 1
    """optimiser steps per pass"""
    max_refill: int = 2
    """extra rollout rounds that replace groups without a signal"""
    shared_prefix: bool = True
    """compute a group's prompt once in the update, where that saves 15% of the tokens; the result is the same"""
    overlong: str = "mask"
    """completions that did not end: mask, penalty (DAPO's soft one) or none"""
    overlong_buffer: float = 0.2
    """overlong=penalty: share of max_new_tokens over which the penalty grows"""
    scale_advantage: str = "group"
    """advantages: group (divided by the group's deviation), none (undivided) or rloo (leave-one-out baseline)"""
    eval_data: str = ""
    """held-out problems evaluated during training; empty: none"""
    eval_every: int = 0
    """evaluate every N steps; 0: never"""
    eval_limit: int = 64
    """problems per evaluation"""
    sample_every: int = 10
    """print a group of completions every N steps; 0: never"""


@dataclass
class EvalConfig(EngineConfig, ModelConfig):
    data: str = ""
    """problems with answers: a file, a folder or a datasets name"""
    split: str = "test"
    """split of a datasets name"""
    limit: int = 0
    """use at most N problems; 0: all"""
    data_format: str = "auto"
    """row shape: auto or the name of one that data.py knows"""
    strict: bool = False
    """a bad row stops the run instead of being skipped and counted"""
    samples: int = 1
    """completions per problem (k of pass@k and maj@k)"""
    temperature: float = 0.0
    """sampling temperature; 0: greedy"""
    max_new_tokens: int = 512
    """longest completion in tokens"""
    max_prompt_len: int = 1024
    """longest prompt in tokens, longer problems count as wrong"""
    budgets: str = ""
    """comma list of token budgets at which accuracy is reported too"""
    suite: str = ""
    """instead of data: comma list of gsm8k, math500, aime24, aime25, svamp and NAME=FILE, evaluated one by one"""
    suite_data: str = ""
    """folder with NAME.jsonl or NAME_test.jsonl (csv, parquet, ...) of the suite; what it lacks comes from the hub"""
    suite_samples: str = ""
    """samples of single sets of the suite: aime24:64,aime25:64"""
    suite_temperature: str = ""
    """temperature of single sets of the suite: aime24:0.6,aime25:0.6"""
    resume: bool = False
    """go on with the unfinished evaluation in the run folder `out`"""


STAGES = {"sft": SFTConfig, "rlaif": RLAIFConfig, "eval": EvalConfig}

CHOICES = {
    "dtype": ("auto", "fp32", "bf16", "fp16"),
    "quant": ("none", "nf4"),
    "attn": ("sdpa", "eager", "flash_attention_2"),
    "optimizer": ("adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw32bit"),
    "on_save_error": ("stop", "continue"),
    "lr_schedule": ("cosine", "linear", "constant"),
    "rollout": ("auto", "transformers", "vllm"),
    "curriculum": ("none", "learnable"),
    "gate": ("exact", "regex", "none"),
    "reward": ("judge", "rules"),
    "judge": ("self", "openai", "rules"),
    "judge_verdict": ("auto", "logprobs", "json_schema", "plain"),
    "judge_fallback": ("none", "rules", "stop"),
    "judge_plan": ("round_robin", "swiss", "listwise"),
    "loss_type": ("dapo", "grpo", "dr_grpo", "cispo", "gspo"),
    "overlong": ("mask", "penalty", "none"),
    "kl": ("unbiased", "k3"),
    "importance": ("truncate", "mask"),
    "scale_advantage": ("group", "none", "rloo"),
    "trackers": ("wandb", "tensorboard", "trackio"),  # each item of the comma list
}
POSITIVE = {"lora_r", "lora_alpha", "lr", "micro_tokens", "keep", "log_every", "epochs", "batch_size",
            "max_len", "eval_limit", "eval_max_new_tokens", "prompts_per_step", "group_size",
            "max_prompt_len", "max_new_tokens", "judge_timeout_s", "judge_concurrency", "judge_max_chars",
            "judge_max_tokens", "judge_breaker",
            "updates_per_rollout", "minibatches", "samples", "top_p", "clip_high", "repetition_penalty",
            "vllm_timeout_s", "vllm_gpu_share"}
AT_MOST_ONE = {"vllm_gpu_share", "min_lr_ratio", "top_p", "min_p", "overlong_buffer", "lam_judge", "lam_length",
               "clip_low", "min_solve_rate", "max_solve_rate"}
HOOKS = {"gate", "reward"}  # python:module.fn is allowed besides the choices
BELOW_ONE = {"lora_dropout", "beta1", "beta2", "label_smoothing"}
