"""The command line: minimath COMMAND ...; `minimath COMMAND --help` lists its options."""
import sys

from minimath.core.entry import run_command, started_together

USAGE = """minimath: SFT, then RLAIF, for mathematical language models on one GPU

  minimath demo [--minutes N] [--full] [--out DIR]   the whole recipe on a small model and made problems
  minimath run RECIPE.yaml [key=value ...]           SFT, RLAIF and evaluation of a recipe
  minimath sft   [RECIPE.yaml] [key=value ...]       stage 1: fine-tune on worked solutions
  minimath rlaif [RECIPE.yaml] [key=value ...]       stage 2: RL with an AI judge
  minimath eval  [RECIPE.yaml] [key=value ...]       accuracy, tokens, steps, with intervals
  minimath solve ["PROBLEM"] [key=value ...]         solutions as they are written, their steps checked
  minimath sample [RECIPE.yaml] [key=value ...]      training data: the shortest correct of k solutions per problem
  minimath judge check [RECIPE.yaml] [key=value ...] whether a judge can be trusted, and how easily it is fooled
  minimath judge compare EVAL_A EVAL_B [key=value ...] whose solutions it finds easier to read
  minimath plan RECIPE.yaml [key=value ...] [card=24] [--apply [FILE]]   what it needs, which cards hold it
  minimath report RUN [RUN ...] [out=FOLDER]         report.html of a run, or of several beside each other
  minimath export adapter=RUN out=FOLDER [to=gguf]   the merged model, for transformers, llama.cpp or Ollama
  minimath doctor [key=value ...]                    what this machine is, what will be used, whether it works

`minimath sft --help` lists every option of a stage with its default. A recipe is YAML: `key: value` lines, shared
or in a section (sft:, rlaif:, eval:); key=value words win. With `run`, `sft.lr=1e-4` is for one stage.
"""
STAGES = ("sft", "rlaif", "eval")
SHARED = (*STAGES, "run")  # commands that several processes can share; see core/dist.py
COMMANDS = (*SHARED, "solve", "sample", "demo", "judge", "report", "doctor", "plan", "export")
DESCRIBED_IN = {"demo": "commands.demo", "run": "commands.run", "doctor": "commands.doctor", "plan": "plan.plan",
                "report": "report.page"}


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


def dispatch(command: str, words: list[str]):
    """Run one command. Imports are in the functions, so that help and errors come at once. Raises UserError."""
    from minimath.core.errors import UserError
    from minimath.core.text import did_you_mean
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{did_you_mean(command, COMMANDS)}; see minimath --help")
    if "--help" in words or "-h" in words:
        print(help_text(command, words))
        return None
    if started_together() and command not in SHARED:
        raise UserError(f"minimath {command} is made for one process; accelerate launch and torchrun are for "
                        f"{', '.join(SHARED)}")
    words = list(words)
    if command in STAGES:
        return stage(command, words)
    if command == "judge":
        return judge(words)
    return other(command, words)


def stage(command: str, words: list[str]):
    """Train or evaluate."""
    from minimath.config import schema
    from minimath.config.load import config_of_words
    cfg = config_of_words(schema.STAGES[command], words)
    if command == "eval":
        from minimath.eval.evaluate import evaluate
        return evaluate(cfg)
    from minimath.commands.train import train
    return train(command, cfg)


def judge(words: list[str]):
    """minimath judge check | compare."""
    from minimath.core.errors import UserError
    from minimath.core.text import did_you_mean
    kind, words = (words[0] if words else ""), words[1:]
    if kind == "check":
        from minimath.commands.judge_check import judge_check
        return judge_check(words)
    if kind == "compare":
        from minimath.commands.judge_compare import judge_compare
        return judge_compare(words)
    if kind == "attack":
        raise UserError("minimath judge attack is now part of minimath judge check")
    raise UserError(f"minimath judge {kind}: use check or compare{did_you_mean(kind, ('check', 'compare'))}")


def other(command: str, words: list[str]):
    """The commands of one line each."""
    from minimath.config.load import config_of_words, take_recipe
    match command:
        case "demo":
            from minimath.commands.demo import demo
            return demo(words)
        case "run":
            from minimath.commands.run import run
            return run(take_recipe(words), words)
        case "solve":
            from minimath.commands.solve import solve_command
            return solve_command(words)
        case "sample":
            from minimath.eval.sample import SampleConfig, sample
            return sample(config_of_words(SampleConfig, words, "sample"))
        case "report":
            from minimath.report.page import report
            return report(words)
        case "doctor":
            from minimath.commands.doctor import doctor
            return doctor(words)
        case "plan":
            from minimath.plan.plan import plan
            return plan(take_recipe(words), words)
        case "export":
            from minimath.export.merge import export
            return export(words)


def help_text(command: str, words: list[str]) -> str:
    """What a command is for and takes; of a stage all options with default, choices and meaning."""
    from minimath.commands.help import docstring_of, options_help
    if command in DESCRIBED_IN:
        return docstring_of(f"minimath.{DESCRIBED_IN[command]}")
    if command == "judge":
        if "compare" in words:
            from minimath.commands.judge_compare import help_text as of_judge
        else:
            from minimath.commands.judge_check import help_text as of_judge
        return of_judge()
    if command == "sample":
        from minimath.eval.sample import SampleConfig as cls
    elif command == "export":
        from minimath.export.merge import ExportConfig as cls
    else:
        from minimath.config.schema import STAGES as configs
        cls = configs["eval" if command == "solve" else command]
    takes = {"solve": '["PROBLEM"] ', "export": ""}.get(command, "[RECIPE.yaml] ")
    return f"minimath {command} {takes}key=value ...\n{cls.__doc__}\n\n{options_help(cls, command)}"


if __name__ == "__main__":
    sys.exit(main())
