r"""A judge of our own: a second adapter of the policy's base, trained by stage 1's loop. Read top to bottom.

    minimath judge train data=problems.jsonl adapter=runs/my-sft out=runs/judge
    minimath rlaif ... judge=self judge_adapter=runs/judge

The policy samples k solutions of every problem, and the answers label them for nothing; made faults stand beside them
(judges/faults.py), for faults of the policy's own are what a judge must know and made ones do not carry over (arXiv
2512.02389). On solutions of held-out problems its probabilities are calibrated, and it is measured (judges/measure.py).
"""
import gc
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import torch

from minimath.config import schema
from minimath.config.load import config_text
from minimath.config.options import Bound, Stage
from minimath.config.trained import as_trained
from minimath.core.errors import Interrupted, UserError
from minimath.core.files import write_whole
from minimath.core.run_folder import ADAPTER, EVAL, EVAL_CONFIG, new_run_folder, refuse_held, stop_files
from minimath.data.batch import stream_indices
from minimath.data.chat import Encoded
from minimath.data.examples import Example, describe_report, load_examples
from minimath.eval.evaluate import evaluate
from minimath.eval.metrics import by_problem, read_solutions
from minimath.judges.card import JudgeCard, write_card
from minimath.judges.known import problem_hash
from minimath.judges.lessons import Lessons, Solved
from minimath.judges.measure import measure_judge
from minimath.judges.rows import Reader
from minimath.judges.rubrics import load_rubric
from minimath.judges.self_judge import SelfJudge
from minimath.models.policy import Policy
from minimath.train.optimizer import Optimizer
from minimath.train.sft import update
from minimath.train.trainer import Trainer

ROLLOUTS = "rollouts"  # the evaluation in the run folder that has the policy's own solutions


class JudgeConfig(Stage):
    """Training of a judge: an adapter that says which solutions are right and sound."""
    model: schema.ModelOptions
    prompt: schema.PromptOptions
    adapter: schema.AdapterOptions
    optimizer: schema.OptimizerOptions = field(default_factory=lambda: schema.OptimizerOptions(lr=5e-4))
    data: schema.DataOptions
    run: schema.TrainRunOptions
    engine: schema.EngineOptions
    sampling: schema.SamplingOptions
    form: Literal["single", "pair"] = "single"
    """single (is a solution right and sound, with a verdict after every step) or pair (which of two is better)"""
    samples: int = 8
    """solutions that the policy samples of each problem; 0: none, made faults alone, without calibration"""
    sampled: int = 0
    """sample the first N problems; the others teach by the solutions that the data has; 0: all"""
    made: Annotated[float, Bound()] = 0.5
    """made solutions, right and faulty, for each of the policy's own and of the data"""
    attacked: schema.Fraction = 0.05
    """share of the training rows whose solution carries an attack string (judges/attacks.txt)"""
    held_out: Annotated[float, Bound(above=0, most=1)] = 0.1
    """share of the sampled problems on which the judge is calibrated and measured, and not trained"""
    rubric: str = "brief"
    """what a judge of form pair is shown: brief, another shipped rubric, or a file of yours"""
    epochs: schema.Positive = 1.0
    """passes over the rows (when steps is 0)"""
    steps: int = 0
    """optimizer steps; 0: from epochs"""
    batch_size: schema.Count = 16
    """rows per optimizer step, and those that stay with them: solutions of one problem, both orders of a pair"""
    max_len: schema.Count = 2048
    """longest row in tokens, longer ones are cut"""

    def check(self) -> str:
        if self.rubric != "brief" and self.form != "pair":
            return f"rubric={self.rubric} is what form=pair is shown: a judge of form={self.form} reads no rubric"
        if self.sampled and not self.samples:
            return f"sampled={self.sampled}, but samples=0 samples none of the problems: leave one of them out"
        return ""


def judge_train(cfg: JudgeConfig) -> dict:
    """Train a judge; leaves adapter/ with judge.json, rollouts/ and metrics.jsonl in the run folder.

    Returns a summary: steps, run_dir, adapter, signal, and the judge's held-out figures. Raises UserError, and
    Interrupted when it was stopped while the policy sampled."""
    if fault := cfg.check():
        raise UserError(fault)
    cfg = as_trained(cfg).replace(out=str(new_run_folder(cfg.run.out, "judge", resume=cfg.run.resume)))
    refuse_held(Path(cfg.run.out), evaluation=False, resume=cfg.run.resume)  # all that can fail, before it samples
    rubric, (examples, report) = load_rubric(cfg.rubric), load_examples(cfg.data, need=("answer",))
    split([Solved(example, []) for example in examples], cfg)
    train, held_out = split(own_solutions(cfg, examples), cfg)
    with Trainer(cfg, "judge", examples) as trainer:
        policy, say = trainer.policy, trainer.log.say
        say(describe_report(report) or f"{len(train)} problems to train on, {len(held_out)} held out")
        reader = Reader(policy, rubric)
        lessons = Lessons(cfg.form, reader, cfg.max_len, seed=cfg.run.seed)
        sets = lessons.sets(train, made=cfg.made, attacked=cfg.attacked)
        say(lessons.described())
        if not sets:
            raise UserError(f"{len(train)} problems give nothing to train a judge of form={cfg.form} on: raise max_len "
                            f"({cfg.max_len}) if rows are cut, else give solutions in the data, or samples of which "
                            "some are right")
        batches = cut(sets, cfg)
        for step in trainer.steps(len(batches)):
            with step.timed("step"):
                step.log(learn(policy, trainer.optimizer, cfg.form, batches[step.number - 1]))
        if not trainer.interrupted_by:  # max_minutes may have ended it early
            card = JudgeCard(form=cfg.form, **cfg.prompt.asked(), rubric=reader.rubric if cfg.form == "pair" else "",
                             problems=sorted(problem_hash(each.example.problem) for each in train))
            judge = SelfJudge(schema.JudgeOptions(), policy, card=card, say=say,
                              micro_batch_tokens=cfg.optimizer.micro_batch_tokens)
            measure_judge(judge, held_out, trainer.log)
    summary = trainer.summary()
    if not trainer.interrupted_by:
        write_card(Path(summary["run_dir"]) / ADAPTER, card)
        summary["held_out"] = card.figures
    elif trainer.done == trainer.total:
        trainer.log.say(f"stopped before the judge was measured; go on with out={cfg.run.out} resume=true")
    return summary


def cut(sets: list[list[Encoded]], cfg: JudgeConfig) -> list[list[list[Encoded]]]:
    """Cut epochs of sets, each in an order of its own, into the batches of all steps."""
    batches, steps, epoch = [], cfg.steps, 0
    while not epoch or len(batches) < steps:
        rows = cfg.batch_size
        for i in stream_indices(epoch * len(sets), len(sets), len(sets), cfg.run.seed):
            if rows >= cfg.batch_size:  # the batch before is full
                batches.append([])
                rows = 0
            batches[-1].append(sets[i])
            rows += len(sets[i])
        epoch, steps = epoch + 1, steps or max(1, round(cfg.epochs * len(batches)))
    return batches[:steps]


def learn(policy: Policy, optimizer: Optimizer, form: str, sets: list[list[Encoded]]) -> dict:
    """Take one step of stage 1 on sets of rows; those of single solutions share their prompt."""
    groups = [number for number, rows in enumerate(sets) for _ in rows] if form != "pair" else None
    return update(policy, optimizer, [row for rows in sets for row in rows], groups=groups)


def own_solutions(cfg: JudgeConfig, examples: list[Example]) -> list[Solved]:
    """Let the policy solve every problem, as an evaluation that a resume goes on with."""
    if not cfg.samples:
        return [Solved(example, []) for example in examples]
    out = Path(cfg.run.out)
    shared = cfg.shared(schema.EvalConfig, "model", "prompt", "data", "engine", "sampling")
    if cfg.sampled:
        shared["limit"] = min(cfg.sampled, cfg.data.limit or cfg.sampled)
    own = schema.EvalConfig(**shared, adapter=cfg.adapter.path, seed=cfg.run.seed, samples=cfg.samples,
                     out=str(out / ROLLOUTS), resume=cfg.run.resume and (out / ROLLOUTS).exists())
    if not (own.run.resume and (out / ROLLOUTS / EVAL).exists()):
        out.mkdir(parents=True, exist_ok=True)
        # makes its folder a part of this run: one stop file, one way to go on
        write_whole(out / EVAL_CONFIG, config_text(own))
    try:
        evaluate(own)
    except Interrupted:
        if len(stop_files(out)) == 1:  # else it is a part of a whole run, which says how that goes on
            print(f"minimath judge train goes on from there with the same words and out={out} resume=true")
        raise
    finally:
        gc.collect()  # its model goes before the next one loads
        torch.cuda.empty_cache()
    groups = by_problem(read_solutions(out / ROLLOUTS))
    return [Solved(example, groups.get(number, [])) for number, example in enumerate(examples)]


def split(solved: list[Solved], cfg: JudgeConfig) -> tuple[list[Solved], list[Solved]]:
    """Part problems into those to train on and those held out: sampled ones, by the hash of their text."""
    hashes = [problem_hash(each.example.problem) for each in solved]
    sampled = cfg.samples and cfg.sampled or len(solved)
    held_out = {each for each in hashes[:sampled] if int(each, 16) % 10_000 < 10_000 * cfg.held_out}
    parts = ([each for each, own in zip(solved, hashes, strict=True) if own not in held_out],
             [each for each, own in zip(solved[:sampled], hashes) if own in held_out])
    if not all(parts):
        raise UserError(f"{len(solved)} problems leave none to train on or none to hold out with "
                        f"held_out={cfg.held_out:g}: give more")
    return parts
