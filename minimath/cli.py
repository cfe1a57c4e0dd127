"""The command line: minimath COMMAND ...; with --help it lists its options."""
import ast
import importlib.metadata
import inspect
import sys
import textwrap
from pathlib import Path
from pkgutil import resolve_name

from minimath.config.load import config_of_words, take_recipe
from minimath.config.options import Option, options_of
from minimath.config.schema import STAGES
from minimath.core.entry import run_command, started_together
from minimath.core.errors import UserError
from minimath.core.text import did_you_mean

# Where each command is; loaded when it is asked for: help and errors come at once
COMMANDS = {"sft": "train.sft:sft", "rlaif": "train.rlaif:rlaif", "eval": "eval.evaluate:evaluate",
            "sample": "eval.sample:sample", "run": "commands.run:run", "plan": "plan.plan:plan",
            "demo": "commands.demo:demo", "solve": "commands.solve:solve_command", "report": "report.page:report",
            "judge train": "train.judge:judge_train",
            "judge check": "commands.judge_check:judge_check", "judge compare": "commands.judge_compare:judge_compare",
            "export": "export.merge:export", "doctor": "commands.doctor:doctor"}
CONFIGS = {"sample": "eval.sample:SampleConfig", "export": "export.merge:ExportConfig",
           "judge train": "train.judge:JudgeConfig", "judge check": "commands.judge_check:JudgeCheckConfig",
           "judge compare": "commands.judge_compare:JudgeCompareConfig"}  # those that are not a stage's
OF_OPTIONS = ("sft", "rlaif", "eval", "sample", "judge train")  # take a config
OF_RECIPE = ("run", "plan")  # take a recipe and words; the others take words
SHARED = ("sft", "rlaif", "eval", "run")  # commands that several processes can share; see core/dist.py


def main() -> int:
    """Entry point of the console script; returns the exit status."""
    command, *words = sys.argv[1:] or ["--help"]
    return run_command(lambda: dispatch(command, words))


def dispatch(command: str, words: list[str]):
    """Run one command. Raises UserError."""
    if command in ("-h", "--help", "help"):
        return print(Path(__file__).with_name("usage.txt").read_text(encoding="utf-8"))
    if command == "--version":
        return print(f"minimath {importlib.metadata.version('minimath')}")
    helped = not {"-h", "--help"}.isdisjoint(words)
    if command == "judge":
        kind = "check" if helped and words[0].startswith("-") else "".join(words[:1])
        command, words = f"judge {kind}".strip(), words[1:]
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{did_you_mean(command, COMMANDS)}; see minimath --help")
    if helped:
        print(help_text(command))
        return None
    if started_together() and command not in SHARED:
        raise UserError(f"minimath {command} is made for one process; accelerate launch and torchrun are for "
                        f"{', '.join(SHARED)}")
    function = resolve_name(f"minimath.{COMMANDS[command]}")
    if command in OF_OPTIONS:
        return function(config_of_words(config_class(command), words, command.replace(" ", "_")))
    return function(take_recipe(words), words) if command in OF_RECIPE else function(words)


def config_class(command: str):
    """The class of the options of a command, None for one that takes words."""
    if command in CONFIGS:
        return resolve_name(f"minimath.{CONFIGS[command]}")
    return {**STAGES, "solve": STAGES["eval"]}.get(command)


def help_text(command: str) -> str:
    """Say what a command is for, and all the options that it takes."""
    file, cls = COMMANDS[command].partition(":")[0].replace(".", "/"), config_class(command)
    if cls is None or command in ("judge check", "judge compare"):  # read, not imported: it comes at once
        text = ast.get_docstring(ast.parse(Path(__file__).parent.joinpath(f"{file}.py").read_text(encoding="utf-8")))
        names = resolve_name("minimath.commands.judge_check:option_names")(cls) if cls else ()
        return f"{text}\n\n{options_help(cls, command, names)}" if cls else text
    takes = {"solve": '["PROBLEM"] ', "export": ""}.get(command, "[RECIPE.yaml] ")
    return f"minimath {command} {takes}key=value ...\n{inspect.getdoc(cls)}\n\n{options_help(cls, command)}"


def options_help(cls, title: str, names=None) -> str:
    """Describe a config's options, or those of `names`, by group; title heads the others."""
    groups = {"": [f"{title}:"]}  # the stage's own first
    for name, option in options_of(cls).items():
        if names is None or name in names:
            groups.setdefault(option.group, [f"{option.group}:"]).append(option_help(option))
    return "\n\n".join("\n".join(lines) for lines in groups.values() if len(lines) > 1)


def option_help(option: Option) -> str:
    """Word one option."""
    default = str(option.default).lower() if option.kind is bool else str(option.default).replace("\n", "\\n")
    choices = [*option.choices, *(["python:module.fn"] if option.hook else [])]
    meaning = option.doc + (f" [{' | '.join(choices)}]" if choices else "")
    head = f"  {option.name}={default}".ljust(33)
    return textwrap.fill(f"{head} {' '.join(meaning.split())}", 116, subsequent_indent=" " * 34,
                         break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
