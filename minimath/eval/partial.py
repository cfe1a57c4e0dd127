"""Keep the completions of an evaluation as they finish, so that it can go on.

completions.part.jsonl has {"number", "sample", "ids", "finished"} of each, and fingerprint.json what decides them:
options; hashes of problems, adapter, model. A completion's random stream is seeded by (seed, problem, sample), so it
does not depend on which others are done."""
import contextlib
import hashlib
import json
from pathlib import Path

from minimath.config.load import plain_values
from minimath.config.options import options_of
from minimath.config.schema import EvalConfig
from minimath.core.checkpoint import ADAPTER_FILES
from minimath.core.errors import UserError
from minimath.core.files import read_json, sha256, write_whole
from minimath.core.log import RunLog
from minimath.core.run_folder import FINGERPRINT, PART, find_adapter
from minimath.data.examples import Example
from minimath.data.sample import Sample
from minimath.models.load import pick_device, pick_dtype
from minimath.models.policy import Policy

Job = tuple[int, int]  # the problem's place in the data, and the sample
# Every other option decides the completions. Model, adapter, dtype and data are told apart by what they lead to;
# device, max_num_seqs and vLLM's place change rounding only, and may have to change (another card, less memory, another
# port); budgets come afterwards, and compile is for training.
NOT_DECISIVE = {"model", "adapter", "dtype", "data", "split", "limit", "strict", "device", "max_num_seqs", "vllm_url",
                "vllm_gpu_share", "budgets", "compile", "trust_remote_code", "out", "resume", "deterministic", "shard",
                "suite"}


def part_record(job: Job, one: Sample) -> dict:
    """Make the line of a completion."""
    return {"number": job[0], "sample": job[1], "ids": one.ids, "finished": one.finished}


def open_part(log: RunLog, decides: dict, problems: int, cfg: EvalConfig, policy: Policy) -> dict[Job, Sample]:
    """Begin the part file of log.run_dir, or with resume return what is in it.

    Damaged lines are dropped and told. Raises UserError when `decides` differs from what the evaluation began with."""
    path, done = log.run_dir / PART, {}
    if cfg.run.resume and path.exists():
        refuse_changes(log.run_dir, decides)
        done, dropped = read_part(path, problems, cfg.samples)
        if dropped:
            log.say(f"{path}: {dropped} line{'s' * (dropped > 1)} cut off or damaged, as a kill or a crash leaves "
                    "them: dropped, and sampled again")
            write_whole(path, "".join(json.dumps(part_record(*item)) + "\n" for item in done.items()))
        for completion in done.values():
            completion.text = policy.decode(completion.ids)
            completion.thought = policy.thought_tokens(completion.ids, completion.text)
        log.say(f"going on after {len(done)} of {problems * cfg.samples} completions")
    elif cfg.run.resume:
        log.say(f"no completion in {log.run_dir} yet: starting with the first")
    write_whole(log.run_dir / FINGERPRINT, json.dumps(decides, indent=1) + "\n")
    return done


def read_part(path: Path, problems: int, samples: int) -> tuple[dict[Job, Sample], int]:
    """Read a part file: completions without text, and how many lines are none."""
    done, dropped = {}, 0
    *lines, rest = path.read_bytes().split(b"\n")  # rest: behind the last line end, so a line that was cut
    for line in lines:
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        match row:
            case {"number": int(number), "sample": int(sample), "ids": [_, *_] as ids, "finished": bool(finished)} if (
                    0 <= number < problems and 0 <= sample < samples and all(type(i) is int and i >= 0 for i in ids)):
                done[number, sample] = Sample(ids, [], finished)
            case _:
                dropped += 1
    return done, dropped + bool(rest)


def fingerprint(cfg: EvalConfig, examples: list[Example]) -> dict:
    """Collect what decides the completions and is known before the model is loaded."""
    asked = [e.asked() if e.messages else e.problem for e in examples]
    problems = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    folder = find_adapter(cfg.adapter.path) if cfg.adapter.path else None
    adapter = " ".join(sha256(folder / name)[:16] for name in ADAPTER_FILES) if folder else "none"
    dtype, _ = pick_dtype(cfg.model.dtype, pick_device(cfg.model.device))
    values = plain_values(cfg)  # of EvalConfig's options: what `minimath sample` keeps is chosen afterwards
    return {"model": Path(cfg.model.name).name, "adapter": adapter, "dtype": str(dtype).removeprefix("torch."),
            "data": f"{len(examples)} problems {problems[:16]}",
            **{name: values[name] for name in options_of(EvalConfig) if name not in NOT_DECISIVE}}


def model_hash(policy: Policy) -> str:
    """Hash about 100 values of every parameter, the chat template and the end ids."""
    digest = hashlib.sha256()
    for name, parameter in policy.model.named_parameters():
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[::max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    words = [policy.tokenizer.chat_template, len(policy.tokenizer), sorted(policy.eos)]
    digest.update(json.dumps(words, default=str).encode())
    return digest.hexdigest()[:16]


def refuse_changes(folder: Path, decides: dict) -> None:
    """Raise UserError unless the evaluation there began with the same `decides`."""
    try:
        before = dict(read_json(folder / FINGERPRINT))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{folder / FINGERPRINT} is missing or damaged, so the options that the evaluation was "
                        "begun with are unknown; start anew with another out=") from None
    known = options_of(EvalConfig)  # an older version lacked some of them
    before = {name: known[name].default for name in decides if name in known} | before
    if changed := [f"{name} was {before.get(name)!r} and is {value!r}" for name, value in decides.items()
                   if before.get(name) != value]:
        raise UserError(f"the evaluation in {folder} was begun with something else: {', '.join(changed)}; give the "
                        "same as before, or start anew with another out=")
