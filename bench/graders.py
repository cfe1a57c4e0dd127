"""minimath's answer checker beside lighteval's and Qwen2.5-Math's, on their own test cases and on made ones.

    python -m bench.graders --qwen FOLDER --qwen-python PYTHON --lighteval-python PYTHON --tests FOLDER --data FOLDER

--qwen: a checkout of QwenLM/Qwen2.5-Math, whose cases are read and whose grader runs in --qwen-python (sympy,
latex2sympy2, regex, word2number). --lighteval-python: a Python with lighteval. --tests: the tests folder of
Math-Verify, which took over lighteval's tests of its maths metrics. --data: a folder with math500.jsonl and
gsm8k_test.jsonl, whose gold answers are written in other ways, and wrongly. A peer that is not given is left out, and
so are its cases.

A peer that gives no verdict (an exception, or 10 s) says "different". Agreement has Wilson's 95% interval; where the
truth is known, it is told who is right. Writes bench/results/graders.json with every disagreement.
"""
import argparse
import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.grader_cases import Case, generated_cases, qwen_cases, test_cases
from bench.measure import RESULTS, machine, new_table, positive, show
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.stats import wilson
from minimath.grading.answer import AnswerChecker

WORKER = Path(__file__).with_name("grader_peer.py")
TIMEOUT_S, START_S, SHOWN = 10.0, 300.0, 120
SOURCES = {
    "Qwen2.5-Math's tests": "QwenLM/Qwen2.5-Math evaluation/grader.py; no licence file in the repository, but the "
                            "file says that it is largely copied from the release of MATH (MIT)",
    "Math-Verify's tests": "huggingface/Math-Verify tests, Apache-2.0; begun as those of huggingface/lighteval, MIT",
    "MATH-500, variants": "gold answers of MATH (hendrycks/math), MIT",
    "GSM8K, variants": "gold answers of openai/grade-school-math, MIT",
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.graders", description=__doc__.split("\n")[0])
    parser.add_argument("--qwen", type=Path, metavar="FOLDER", help="a checkout of QwenLM/Qwen2.5-Math")
    parser.add_argument("--qwen-python", default=sys.executable, metavar="PYTHON", help="default: this one")
    parser.add_argument("--lighteval-python", metavar="PYTHON", help="a Python with lighteval")
    parser.add_argument("--tests", type=Path, metavar="FOLDER", help="the tests of Math-Verify or lighteval")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with math500.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--golds", type=positive, default=200, help="different gold answers of each data set")
    parser.add_argument("--out", type=Path, default=RESULTS / "graders.json")
    return parser.parse_args(words)


# ---- asking

class Peer:
    """A grader in a process of its own.

    `ask(case)` -> True, False, or why there is no verdict. Raises UserError when it does not start.
    """

    def __init__(self, name: str, command: list[str]):
        self.name, self.command, self.process = name, command, None

    def ask(self, case: Case) -> bool | str:
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps([case.form, case.answer, case.gold, case.data]).encode() + b"\n")
        reply = self.read(TIMEOUT_S)
        if reply in ("true", "false"):
            return reply == "true"
        if not reply.startswith("error"):  # late, or dead
            self.close()
        return reply or "no reply"

    def start(self) -> None:
        with tempfile.TemporaryFile() as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            bufsize=0)
            if self.read(START_S) != "ready":
                self.close()
                log.seek(0)
                why = log.read().decode(errors="replace").strip().splitlines()[-1:] or ["no reply"]
                raise UserError(f"{self.name} does not start: {why[0][:200]}; try {' '.join(self.command)}")

    def read(self, seconds: float) -> str:
        """Read the next line; "" when it is late or the process has ended."""
        line, end = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return ""
            got = self.process.stdout.read(4096)
            if not got:
                return ""
            line += got
        return line.decode(errors="replace").strip()

    def close(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def our_verdict(checker: AnswerChecker, case: Case) -> bool:
    return checker.check(case.answer, case.gold) if case.form == "text" else checker.equal(case.answer, case.gold)


def peers_of(options) -> list[Peer]:
    peers = []
    if options.qwen:
        peers.append(Peer("qwen", [options.qwen_python, str(WORKER), "qwen", str(options.qwen)]))
    if options.lighteval_python:
        peers.append(Peer("lighteval", [options.lighteval_python, str(WORKER), "lighteval"]))
    return peers


def sets_of(options) -> dict[str, list[Case]]:
    """Name -> cases, of what was given. Raises UserError."""
    sets = {}
    if options.qwen:
        sets["Qwen2.5-Math's tests"] = qwen_cases(options.qwen)
    if options.tests:
        sets["Math-Verify's tests"] = test_cases(options.tests)
    for name, file, data in (("MATH-500, variants", "math500.jsonl", "math"),
                             ("GSM8K, variants", "gsm8k_test.jsonl", "gsm8k")):
        if options.data:
            path = options.data / file
            if not path.is_file():
                raise UserError(f"--data {options.data}: no {file} in it")
            answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
            sets[name] = generated_cases(list(dict.fromkeys(answers))[:options.golds], data)
    return sets


# ---- figures

def compare(cases: list[Case], ours: list[bool], theirs: list[bool | str]) -> dict:
    """Compute agreement with one peer, who is right where known, all disagreements."""
    said = [verdict is True for verdict in theirs]
    agree = sum(a == b for a, b in zip(ours, said, strict=True))
    known = [(c.expected, a, b) for c, a, b in zip(cases, ours, said, strict=True) if c.expected is not None]
    return {
        "cases": len(cases), "agree": agree, "interval": wilson(agree, len(cases)), "known": len(known),
        "we_right": sum(a == truth for truth, a, _ in known), "they_right": sum(b == truth for truth, _, b in known),
        "only_we_right": sum(a == truth != b for truth, a, b in known),
        "only_they_right": sum(b == truth != a for truth, a, b in known),
        "no_verdict": sum(isinstance(verdict, str) for verdict in theirs),
        "disagreements": [shown(c, a, v) for c, a, v in zip(cases, ours, theirs, strict=True) if a != (v is True)],
    }


def shown(case: Case, ours: bool, theirs: bool | str) -> list:
    """List kind, end of the answer, gold, expected, our verdict, theirs."""
    return [case.kind, case.answer[-SHOWN:], case.gold[-SHOWN:], case.expected, ours, theirs]


def run(peers: list[Peer], sets: dict[str, list[Case]], say=print) -> dict:
    """Set -> peer -> figures, and what we get wrong where the truth is known."""
    results = {}
    with AnswerChecker(timeout_s=TIMEOUT_S) as checker, contextlib.ExitStack() as stack:
        for peer in peers:
            stack.callback(peer.close)
        for name, cases in sets.items():
            start = time.monotonic()
            ours = [our_verdict(checker, case) for case in cases]
            seconds = {"minimath": time.monotonic() - start}
            results[name] = {"source": SOURCES[name], "peers": {}, "we_wrong": [
                shown(c, a, "-")[:5] for c, a in zip(cases, ours, strict=True) if c.expected not in (None, a)]}
            for peer in peers:
                start = time.monotonic()
                theirs = [peer.ask(case) for case in cases]
                seconds[peer.name] = time.monotonic() - start
                results[name]["peers"][peer.name] = compare(cases, ours, theirs)
            results[name]["seconds"] = {who: round(spent, 1) for who, spent in seconds.items()}
            say(f"{name}: {len(cases)} cases, " + ", ".join(f"{who} {spent:.1f} s" for who, spent in seconds.items()))
    return results


def table(results: dict):
    out = new_table("agreement with peers' graders; right: of the cases whose truth is known", (
        "set", "peer", "cases", "agree, % (95%)", "known", "we right", "they right", "only we", "only they"), ("peer",))
    for name, result in results.items():
        for peer, facts in result["peers"].items():
            low, high = (100 * end for end in facts["interval"])
            cells = [facts[key] for key in ("known", "we_right", "they_right", "only_we_right", "only_they_right")]
            share = f"{100 * facts['agree'] / facts['cases']:.1f} ({low:.1f} to {high:.1f})"
            out.add_row(name, peer, str(facts["cases"]), share, *map(str, cells))
    return out


def by_kind(results: dict) -> str:
    """Count the kinds of disagreement, most frequent first, with who says equal."""
    counts = Counter((name, peer, row[0], "we" if row[4] else "they")
                     for name, result in results.items() for peer, facts in result["peers"].items()
                     for row in facts["disagreements"])
    return "\n".join(f"{n:5} {name}, {peer}: {kind} ({who} say equal)"
                     for (name, peer, kind, who), n in counts.most_common())


def saved(results: dict) -> str:
    """JSON with one line per disagreement."""
    lists = []

    def strip(value, key=""):
        if key in ("disagreements", "we_wrong"):
            lists.append(value)
            return f"@{len(lists) - 1}@"
        return {name: strip(inner, name) for name, inner in value.items()} if isinstance(value, dict) else value

    text = json.dumps(strip(results), indent=1)
    for number, rows in enumerate(lists):
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=True) for row in rows)
        text = text.replace(f'"@{number}@"', f"[\n  {lines}\n ]" if rows else "[]")
    return text + "\n"


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    try:
        peers, sets = peers_of(options), sets_of(options)
        if not peers or not sets:
            raise UserError("nothing to compare: give --qwen or --lighteval-python, and --qwen, --tests or --data")
        for name, given in (("qwen", options.qwen), ("lighteval", options.lighteval_python),
                            ("Math-Verify's tests", options.tests), ("variants of gold answers", options.data)):
            if not given:
                print(f"left out: {name} (not given)")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        results = run(peers, sets)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(by_kind(results))
    show(table(results), 160)
    write_whole(options.out, saved({"machine": machine("cpu"), "sets": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
