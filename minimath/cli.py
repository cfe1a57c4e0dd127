"""The command line: minimath demo | run | sft | rlaif | eval | solve | judge. `minimath COMMAND --help` for options."""
import importlib
import os
import sys

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch allocates first; see runs.keep_freed_memory
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

USAGE = """minimath: SFT, then RLAIF, for mathematical language models on one GPU

  minimath demo [--minutes N] [--full] [--out DIR]   the whole recipe on a small model and made problems
  minimath run RECIPE.yaml [key=value ...]           SFT, RLAIF and evaluation of a recipe
  minimath sft   [RECIPE.yaml] [key=value ...]       stage 1: fine-tune on worked solutions
  minimath rlaif [RECIPE.yaml] [key=value ...]       stage 2: RL with an AI judge
  minimath eval  [RECIPE.yaml] [key=value ...]       accuracy, tokens, steps, with intervals
  minimath solve ["PROBLEM"] [key=value ...]         solutions as they are written, their steps checked
  minimath sample [RECIPE.yaml] [key=value ...]      training data: the shortest right of k solutions per problem
  minimath judge check  [RECIPE.yaml] [key=value ...]  whether a judge can be trusted with a run
  minimath judge attack [RECIPE.yaml] [key=value ...]  how easily it is fooled
  minimath judge compare EVAL_A EVAL_B [key=value ...] whose solutions it finds easier to read
  minimath plan RECIPE.yaml [key=value ...] [card=24] [--apply [FILE]]   what it needs, which cards hold it
  minimath report RUN [RUN ...] [out=FOLDER]         report.html of a run, or of several beside each other
  minimath export adapter=RUN out=FOLDER [to=gguf]   the merged model, for transformers, llama.cpp or Ollama
  minimath doctor [key=value ...]                    what this machine is, what will be used, whether it works

`minimath sft --help` lists every option of a stage with its default. A recipe is YAML: `key: value` lines, shared
or in a section (sft:, rlaif:, eval:); key=value words win. With `run`, `sft.lr=1e-4` is for one stage.
"""


SHARED = ("sft", "rlaif", "eval", "run")  # commands that several processes can share; see dist.py


def main() -> int:
    """Entry point of the console script; returns the exit status."""
    command, words = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if command == "--version":
        from importlib.metadata import version
        print(f"minimath {version('minimath')}")
        return 0
    return run_command(lambda: dispatch(command, words))


def run_command(action) -> int:
    """Run a command; what a user can put right becomes one line on stderr and a non-zero status."""
    quiet_libraries()
    from minimath.core.errors import Interrupted, UserError
    try:
        result = action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        return 128 + (stopped.args[0] if stopped.args else 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if started_together():
        from minimath.core import dist
        dist.leave()
    if isinstance(result, int):
        return result
    return 128 + result["signal"] if isinstance(result, dict) and result.get("signal") else 0


def started_together() -> bool:
    """Whether a launcher started several processes; as dist.state() asks, without importing torch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def dispatch(command: str, words: list[str]):
    """Run one command. Imports are here so that help and errors come at once."""
    from minimath.config.load import load_config
    from minimath.config.schema import EvalConfig, RLAIFConfig, SFTConfig
    from minimath.core.errors import UserError
    from minimath.core.text import did_you_mean
    stages = {"sft": SFTConfig, "rlaif": RLAIFConfig, "eval": EvalConfig, "solve": EvalConfig}
    if command == "sample":
        from minimath.eval.sample import SampleConfig, sample
        stages["sample"] = SampleConfig
    if command == "export":
        from minimath.export.merge import ExportConfig, export
        stages["export"] = ExportConfig
    known = (*stages, "sample", "run", "demo", "judge", "report", "doctor", "plan", "export")
    if command not in known:
        raise UserError(f"unknown command {command!r}{did_you_mean(command, known)}; see minimath --help")
    if "--help" in words or "-h" in words:
        print(help_text(command, stages))
        return None
    if started_together() and command not in SHARED:
        raise UserError(f"minimath {command} is made for one process; accelerate launch and torchrun are for "
                        f"{', '.join(SHARED)}")
    if command == "demo":
        from minimath.commands.demo import demo
        return demo(words)
    if command == "solve":
        from minimath.commands.solve import parse, solve
        problem, words = parse(words)
        return solve(problem, load_config(EvalConfig, None, words))
    if command == "judge":
        return judge_command(words)
    if command == "doctor":
        from minimath.commands.doctor import doctor
        return doctor(words)
    if command == "export":
        return export(words)
    if command == "report":
        from minimath.report.page import report
        return report(words)
    recipe = take_recipe(words)
    if command == "plan":
        from minimath.plan.plan import plan
        return plan(recipe, words)
    if command == "run":
        if recipe is None:
            raise UserError("minimath run needs a recipe: minimath run RECIPE.yaml [key=value ...]")
        from minimath.commands.run import run
        return run(recipe, words)
    cfg = load_config(stages[command], recipe, words, section="sample" if command == "sample" else "")
    if command == "sample":
        return sample(cfg)
    if command == "sft":
        from minimath.train.sft import sft
        return sft(cfg)
    if command == "rlaif":
        from minimath.train.rlaif import rlaif
        return rlaif(cfg)
    if cfg.suite:
        from minimath.eval.suite import suite
        return suite(cfg)
    from minimath.eval.evaluate import evaluate
    return evaluate(cfg)


def take_recipe(words: list[str]) -> str | None:
    """Take a leading word that is no option from `words`."""
    return words.pop(0) if words and "=" not in words[0] and not words[0].startswith("--") else None


def judge_command(words: list[str]):
    """minimath judge check | attack | compare."""
    from minimath.core.errors import UserError
    from minimath.core.text import did_you_mean
    kinds = ("check", "attack", "compare")
    kind = words.pop(0) if words else ""
    if kind not in kinds:
        raise UserError(f"minimath judge {kind}: use check or attack, or compare{did_you_mean(kind, kinds)}")
    if kind == "compare":
        from minimath.commands.judge_compare import judge_compare
        return judge_compare([take_recipe(words), take_recipe(words)], take_recipe(words), words)
    if kind == "check":
        from minimath.judges.check import judge_check as command
    else:
        from minimath.judges.attack import judge_attack as command
    return command(take_recipe(words), words)


def help_text(command: str, stages: dict) -> str:
    """All options of a command with type, default and meaning."""
    from minimath.config.load import describe_config
    if command == "judge":
        from minimath.commands.judge_compare import help_text as judge_help
        return judge_help()
    if command == "demo":
        from minimath.commands.demo import __doc__ as doc
        return doc
    if command == "plan":
        from minimath.plan.plan import __doc__ as doc
        return doc
    if command in ("doctor", "report"):
        module = {"doctor": "minimath.commands.doctor", "report": "minimath.report.page"}[command]
        return importlib.import_module(module).__doc__
    if command == "run":
        return USAGE
    recipe = "" if command == "export" else "[RECIPE.yaml] "
    lines = [f"minimath {command} {recipe}key=value ...", ""]
    for name, kind, default, doc in describe_config(stages[command]):
        kind = getattr(kind, "__name__", kind)
        lines.append(f"  {f'{name}={default}':<44} {kind:<6} {doc}")
    return "\n".join(lines)


def quiet_libraries() -> None:
    """Silence what libraries print on import and a user can do nothing about."""
    import logging
    import warnings
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
