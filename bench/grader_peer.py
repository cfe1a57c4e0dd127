"""A peer's grader behind a pipe: `PYTHON bench/grader_peer.py qwen FOLDER` or `... lighteval`, for bench.graders.

Runs in the peer's own Python, so it imports the standard library and the peer only. Reads one JSON list a line,
[form, answer, gold, data]: form `answer` is two short answers, `text` a solution and a gold answer. Writes "true",
"false" or "error WHY" a line. Who asks bounds the time: both peers catch every exception, an alarm's too.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings

MEMORY_BYTES = 6 << 30  # of the address space; sympy can fill a machine


def qwen(folder: str):
    """Load Qwen2.5-Math's extract_answer, called on both sides, and math_equal."""
    sys.path.insert(0, os.path.join(folder, "evaluation"))
    grader, parser = importlib.import_module("grader"), importlib.import_module("parser")

    def grade(form: str, answer: str, gold: str, data: str) -> bool:
        if form == "pair":  # of its own test of math_equal
            return grader.math_equal(answer, gold)
        said = parser.extract_answer(boxed(answer) if form == "answer" else answer, data)
        return grader.math_equal(said, parser.extract_answer(boxed(gold), data))

    return grade


def lighteval():
    """Load lighteval's pass@1 of MATH-500 and AIME; for GSM8K expr_gold_metric."""
    from lighteval.metrics.metrics import Metrics
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc

    maths = Metrics.pass_at_k_math.value.sample_level_fn.compute_score
    plain = Metrics.expr_gold_metric.value.sample_level_fn.compute

    def grade(form: str, answer: str, gold: str, data: str) -> bool:
        score = plain if data == "gsm8k" else maths
        text = answer if form == "text" else f"The final answer is ${boxed(answer)}$."
        doc = Doc(query="", choices=[gold if data == "gsm8k" else f"${boxed(gold)}$"], gold_index=0)
        return score(doc=doc, model_response=ModelResponse(text=[text])) == 1.0

    return grade


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def main(peer: str, *words: str) -> None:
    import resource

    warnings.simplefilter("ignore")
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library's print must not become a verdict
    grade = {"qwen": qwen, "lighteval": lighteval}[peer](*words)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies.write("ready\n")
    for line in sys.stdin:
        try:
            replies.write(json.dumps(bool(grade(*json.loads(line)))) + "\n")
        except Exception as error:  # a grader that raises has given no verdict
            replies.write(f"error {type(error).__name__}: {error}".replace("\n", " ")[:200] + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
