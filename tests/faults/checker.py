"""Hostile maths and hostile patterns for the answer checker: it says wrong in time, and goes on saying right.

The limit is 2 s for each call, a worker's death and replacement included. What a busy machine adds is measured, not
guessed: the kernel's count of the time for which this process, the checker's child and its workers were ready to run
but had no core (schedstat) is allowed on top.
"""
import random
import threading
import time
from pathlib import Path

from harness import Tally

from minimath.grading.answer import AnswerChecker
from minimath.grading.sandbox import MEMORY_BYTES

LIMIT_S, THREADS = 2.0, 8
GOLD = r"\sqrt{12}+\pi"  # equals nothing below
TOKENS = (r"\frac", r"\sqrt", r"\left(", r"\right]", r"\begin{pmatrix}", r"\end{cases}", r"\sum_", r"\int^", r"\text{",
          "{", "}", "^", "_", "&", r"\\", "$", "$$", "x", "-", "=", r"\in", r"\cup", r"\infty", "12", ",", ".", "%",
          "!", "(", "]", "|", r"\{", r"\boxed{", "#", "~", r"\mathrm", r"\cdot", "<", r"\le", r"\pm", "\t")


def run(full: bool, folder: Path) -> list[Tally]:
    cases = hostile(25)[::1 if full else 10]
    alone, threads = Tally("checker: hostile questions"), Tally(f"checker: the same from {THREADS} threads at once")
    after, memory = Tally("checker: a plain question after each"), Tally("checker: a worker's memory is bounded")
    peaks, waits, done = {}, {}, threading.Event()
    with AnswerChecker() as checker:
        after.add(checker.equal("x+1", "1+x"), "a plain answer before all")  # starts the child
        watch = threading.Thread(target=watch_workers, args=(checker.process.pid, peaks, waits, done))
        watch.start()
        for number, case in enumerate(cases[::1 if full else 5]):
            put(checker, case, number, alone, after, waits)
        work = iter(list(enumerate(cases, 1000)))
        lock = threading.Lock()

        def drain():
            while True:
                with lock:
                    number, case = next(work, (0, None))
                if case is None:
                    return
                put(checker, case, number, threads, after, waits)

        pool = [threading.Thread(target=drain) for _ in range(THREADS)]
        for thread in pool:
            thread.start()
        for thread in [*pool, watch]:
            if thread is watch:
                done.set()
            thread.join()
        after.add(checker.starts == 1, f"the child was started {checker.starts} times")
    for pid, peak in peaks.items():
        memory.add(peak <= MEMORY_BYTES, f"worker {pid}: {peak >> 20} MiB")
    return [alone, threads, after, *([memory] if memory.tried else [])]  # no /proc, no peaks


def put(checker, case: tuple[str, str, str, str], number: int, tally: Tally, after: Tally, waits: dict) -> None:
    """One hostile question, then one that needs the child too and has a plain answer."""
    family, kind, text, gold = case
    started, waited = time.monotonic(), no_core_s(checker, waits)
    said = checker.matches(text, gold) if kind == "match" else checker.check(text, gold)
    took, allowed = time.monotonic() - started, LIMIT_S + max(0.0, no_core_s(checker, waits) - waited)
    words = f"{family}: {text[:40]!r} of {len(text):,} characters against {gold[:40]!r}"
    tally.add(not said and took <= allowed, f"{words}: {said} after {took:.2f} s ({allowed:.2f} allowed)")
    after.add(checker.equal(f"x+{number}+\\sqrt{{3}}", f"\\sqrt{{3}}+{number}+x"), f"a plain answer after {words}")


def no_core_s(checker, waits: dict[str, int]) -> float:
    """For how long the checker's child, its workers and the threads of this process have been ready to run without a
    core; 0 where the kernel does not say. A thread that waits for the interpreter's lock is not ready: what adds up
    here is the waiting of those that hold it."""
    threads = map(waited, Path("/proc/self/task").glob("*/schedstat"))
    return (waited(Path(f"/proc/{checker.process.pid}/schedstat")) + sum(threads) + sum(waits.copy().values())) / 1e9


def waited(path: Path) -> int:
    try:
        return int(path.read_text().split()[1])
    except OSError:  # that thread has ended, or there is no /proc
        return 0


def watch_workers(child: int, peaks: dict[str, int], waits: dict[str, int], done: threading.Event) -> None:
    """Note the peak resident bytes and the waiting of each worker of the child, by process id, until done."""
    while not done.wait(0.02):
        try:
            for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split():
                fields = Path(f"/proc/{pid}/status").read_text().split("\n")
                peak = next((int(line.split()[1]) << 10 for line in fields if line.startswith("VmHWM:")), 0)
                peaks[pid] = max(peaks.get(pid, 0), peak)
                waits[pid] = max(waits.get(pid, 0), waited(Path(f"/proc/{pid}/schedstat")))
        except OSError:  # a worker died just now, or there is no /proc
            continue


# ---- the questions

def hostile(each: int) -> list[tuple[str, str, str, str]]:
    """(family, kind, text, gold) of 8 families, `each` of every one, seeded."""
    families = [towers, nested, megabytes, malformed, long_sums, gold_side, unicode_noise, patterns]
    cases = []
    for number, family in enumerate(families):
        rng = random.Random(number)
        cases += [(family.__name__, *family(rng, n)) for n in range(each)]
    return cases


def boxed(answer: str) -> str:
    return f"so \\boxed{{{answer}}}"


def towers(rng, n: int) -> tuple[str, str, str]:
    a, b, c = (rng.randint(9, 10 ** rng.randint(1, 4)) for _ in range(3))
    forms = ("10^{10^{10}}", "10^10^10", f"{a}^{{{b}^{{{c}}}}}", f"{a}^{{{b}^{{{c}}}}}x", f"({a}x+1)^{{{b * c}}}",
             f"{a}!" + "!" * (n % 4), f"({a}!)!", f"\\sqrt[{a}]{{{b}^{{{c}^{{{a}}}}}}}", f"x^{{{a}^{{{b}^{{{c}}}}}}}",
             f"{a}**{b}**{c}", f"1e{a * b * c}x", f"\\frac{{1}}{{{a}^{{{b}^{{{c}}}}}}}", f"e^{{e^{{e^{{{a}}}}}}}",
             f"\\log({a}^{{{b}^{{{c}}}}})", f"-{a}^{{-{b}^{{-{c}}}}}")
    return "check", boxed(forms[n % len(forms)]), GOLD


def nested(rng, n: int) -> tuple[str, str, str]:
    deep = (1000, 100, 60, 30, 12)[n // 5 % 5]
    opening, inner, closing = (("\\frac{1}{", "x", "}"), ("\\frac{", "x", "}{2}"), ("(", "x+1", ")"),
                               ("\\sqrt{1+", "x", "}"), ("\\left|", "x", "\\right|"))[n % 5]
    return "check", boxed(opening * deep + inner + closing * deep), GOLD


def megabytes(rng, n: int) -> tuple[str, str, str]:
    piece = ("9", "(", "x+", "\\frac{1}{", "{", "}", "\\boxed{", "\\boxed{1}", "1,234,", "#### ", "answer is ", " ",
             "\n", "1/", "$", "\\text{", "a^", "-", ".", "5%", "\\left(", "&", "\\\\", "e", "\u00b2")[n % 25]
    size = rng.choice((1_000_000, 1_100_000, 3_000_000))
    text = piece * (size // len(piece))
    return "check", boxed(text) if n % 2 else text + "\\boxed{", GOLD


def malformed(rng, n: int) -> tuple[str, str, str]:
    return "check", boxed("".join(rng.choices(TOKENS, k=rng.randint(2, 60)))), GOLD


def long_sums(rng, n: int) -> tuple[str, str, str]:
    a = rng.randint(5, 9)
    forms = (f"\\sum_{{k=1}}^{{10^{{{a}}}}} k^k", f"\\prod_{{k=1}}^{{10^{a}}} (x+k)", "\\int_0^{\\infty} x^{x^{x}} dx",
             f"\\binom{{10^{a}}}{{10^{a - 1}}}", f"(x+y+z+w)^{{{10 ** (a - 3)}}}", f"(x+1)^{{{10 ** a}}}-1",
             "\\begin{pmatrix}" + "1&" * 150 + "1\\end{pmatrix}", "\\{" + ",".join(map(str, range(100))) + "\\}",
             "x^2+" * 95 + "1", "\\sin(" * 60 + "x" + ")" * 60, "+".join(f"\\sqrt{{{k}}}" for k in range(2, 40)),
             "*".join(f"(x-{k})" for k in range(55)), "=".join("x" * 150),
             " \\cup ".join(f"({k},{k + 1})" for k in range(28)), "\\lim_{x \\to 0} " * 20 + "x",
             f"\\gcd(10^{{{10 ** a}}}, 6)", "9" * 390, "0." + "3" * 390, "1/" * 190 + "1", "x=" + "-" * 380 + "1",
             f"\\cos^{{{10 ** a}}}(x)", f"\\lfloor 10^{{{10 ** a}}} \\pi \\rfloor",
             f"{10 ** 300} \\bmod 7^{{{10 ** a}}}", "1<" * 130 + "x", "|" * 390)
    return "check", boxed(forms[n % len(forms)]), GOLD


def gold_side(rng, n: int) -> tuple[str, str, str]:
    """The hostile text is the reference answer, which data can bring."""
    _, text, _ = (towers, nested, malformed, long_sums)[n % 4](rng, n)
    return "check", boxed("x+\\pi"), text.removeprefix("so \\boxed{")[:-1]


def unicode_noise(rng, n: int) -> tuple[str, str, str]:
    sets = ("\u0300\u0301\u0302\u0489x", "\u200b\u200d\u2060\ufeff1", "\u202e\u202d\u20661+", "\ud800\udfff\udc80",
            "\0\1\x1b[2J", "\u00b2\u2074\u00bc\u2153x", "\uff11\uff12\uff0b\u0663\u0967", "\U0001f468\u200d\U0001f469",
            "\uffff\ufffe", "\u221a\u222b\u2211\u221e^", "\r\n\t\x0b\u2028\u2029")
    return "check", boxed("".join(rng.choices(sets[n % len(sets)], k=rng.randint(5, 390)))), GOLD


def patterns(rng, n: int) -> tuple[str, str, str]:
    forms = ("(a+)+$", "(a|aa)+$", "(a*)*b", "(a|a?)+$", "(.*a){20}$", "([a-zA-Z]+)*$", "(a?){60}a{60}b", r"(\w+\s?)*$",
             "(?:x{0,65000}){0,65000}a+y", "((a+)+)+c", "(?=(a+)+$)b", r"(a+)\1+\1+$", "^(([a-z])+.)+[A-Z]([a-z])+$",
             "(a{1,30}){1,30}c", "(?:a|a|a|a)+z")
    text = "a" * rng.randint(60, 390) + "!"
    return "match", boxed(text), forms[n % len(forms)]
