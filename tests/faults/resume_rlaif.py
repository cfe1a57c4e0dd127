"""Issue 6, 2: RLAIF killed with SIGKILL in any phase and resumed is bitwise the run that was never killed (CPU, fp32).

Compared are the metrics, the adapter, every checkpoint and, of every step, also of those that the kill lost, the token
ids and log-probs that were sampled, verdicts, rewards, advantages and the judge's votes. Votes of an endpoint come from
the cache of replies after a resume: the stand-in answers otherwise when it is asked again, and no reply that was kept
may be asked for twice.
"""
import contextlib
import http.server
import json
import sqlite3
import threading
from collections import Counter
from hashlib import sha256
from pathlib import Path

from forks import beside
from harness import Tally
from judge_server import Handler, says
from killing import Kill, fixed_options, one_variant, open_forks, second_forks

from minimath.judges.cache import FILE, reply_key

STEPS = 20
KILLS = (1, 7, 10, 13, 19)
MOMENTS = (("rollout", 5), ("sampled", 1), ("judging", 1), ("judged", 1), ("gradient", 1), ("stepped", 1),
           ("updated", 1), ("logged", 1), ("half a line", 1), ("half a checkpoint", 1), ("flushing", 3), ("saved", 1))
IN_CHAIN = ("rollout", "judging", "gradient", "stepped", "logged")
BASE = {"steps": STEPS, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 10, "lora_r": 4, "lr": 0.01,
        "warmup": 0.2, "lora_dropout": 0.1, "save_every": 4, "sample_every": 3, "max_refill": 1,
        "verifier": "python:killing.even", "judge": "heuristic"}
TWICE = {"updates_per_rollout": 2}
REFILL = {"max_refill": 2, "verifier": "python:killing.even_of_even"}
ENDPOINT = {"judge": "openai", "judge_model": "stand-in", "judge_concurrency": 1}
VARIANTS = {
    "judge heuristic": {},
    "judge self": {"judge": "self"},
    "judge openai": ENDPOINT,
    # one at a time: of several in flight, those that kill -9 finds not yet kept are asked again, and answered otherwise
    "judge openai, some pairs": ENDPOINT | {"judge_pairs": 2, "group_size": 6, "judge_fallback": "heuristic"},
    "two updates, KL": TWICE | {"kl_coef": 0.05},
    "gspo": {"loss": "gspo", **TWICE},
    "refills": REFILL,
    "curriculum": {"curriculum": "learnable", **REFILL},
    "reward paper": {"reward": "paper", "top_p": 0.9, "min_p": 0.05},
    "canaries": {"judge_canary_every": 3},
    "8-bit Adam and NF4": {"optimizer": "adamw8bit", "lora_r": 160, "quant": "nf4"},
}
FAST = {"judge openai": [[Kill("reply kept", 4, 2)]], "curriculum": [[Kill("stepped", 4)]]}  # of 6 steps


def run(full: bool, folder: Path) -> list[Tally]:
    fixed = fixed_options(folder) | BASE | ({} if full else {"steps": 6, "save_every": 2})
    paid = Tally("resume RLAIF, no kept reply of the judge is paid for twice")
    with open_forks(folder, hash_seed=1) as train, second_forks(full, folder, train) as again, stand_in() as server:
        cases = {name: kills_of(name) for name in VARIANTS} if full else FAST
        return [*(resumed((train, again), server, folder, fixed, name, kills, paid) for name, kills in cases.items()),
                paid]


def kills_of(name: str) -> list[list[Kill]]:
    """The kills of a variant: the first dies in every moment, the steps taking turns, the others at three of the steps
    and in the moments that only they have; then one run that dies at all the steps, one after another."""
    number = list(VARIANTS).index(name)
    if number == 0:
        alone = [Kill(moment, KILLS[i % 5], nth) for i, (moment, nth) in enumerate(MOMENTS)] + [Kill("ending", 1)]
    else:
        turns = [(KILLS[(number + 2 * i) % 5], MOMENTS[(number + 5 * i) % len(MOMENTS)]) for i in range(3)]
        alone = [Kill(moment, step, nth) for step, (moment, nth) in turns]
    if "openai" in name:
        alone += [Kill("reply kept", 1, 1), Kill("reply kept", 7, 3), Kill("reply kept", 19, 2), Kill("reply", 10, 2)]
    if REFILL.items() <= VARIANTS[name].items():
        alone += [Kill("refill", 1, 2), Kill("refill", 10, 5)]
    if TWICE.items() <= VARIANTS[name].items():
        alone += [Kill("gradient", 7, 2), Kill("stepped", 13)]  # between two updates
    chain = [Kill(IN_CHAIN[(number + i) % len(IN_CHAIN)], step) for i, step in enumerate(KILLS)]
    return [*([kill] for kill in alone if allowed(name, kill)), [kill for kill in chain if allowed(name, kill)]]


def allowed(name: str, kill: Kill) -> bool:
    """Whether the moment can come: the paper's reward asks no judge."""
    return not (name == "reward paper" and kill.moment == "judging")


def resumed(forks, server, folder: Path, fixed: dict, name: str, cases: list[list[Kill]], paid: Tally) -> Tally:
    """The tally of one variant; what it paid for twice goes to `paid`."""
    tally, options = Tally(f"resume RLAIF, {name}"), fixed | VARIANTS[name]
    if options["judge"] != "openai":
        return one_variant(tally, forks, "rlaif", folder, cases, options)

    @contextlib.contextmanager
    def watch(run: Path, kills: list[Kill]):
        lost, asked = sum(kill.moment == "reply" for kill in kills), []
        forget(server, fickle=not lost)  # a reply that came and was not kept is asked for again
        yield lambda: asked.append((kept_keys(beside(run, "cache") / "judge"), len(server.seen)))
        if kills:
            words = paid_twice(server, asked, allowed=lost * options["judge_concurrency"])
            paid.add(not words, f"{name}, killed at {' and '.join(map(str, kills))}: {words}")

    return one_variant(tally, forks, "rlaif", folder, cases, options | {"judge_url": server.url}, watch)


# ---- an endpoint that counts


@contextlib.contextmanager
def stand_in():
    """Yield a server on 127.0.0.1 with url, seen (of judge_server) and what `forget` resets."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.lock, server.script, server.seen = True, threading.Lock(), [answer], []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def forget(server, *, fickle: bool = True) -> None:
    """Begin a new run: no request was seen yet. fickle: a question that is asked again gets another answer."""
    server.seen.clear()
    server.asked, server.fickle = Counter(), fickle


def answer(handler, body: dict) -> None:
    """A verdict that follows from the request, a sixth of them unreadable; "A" to a ping."""
    server, text = handler.server, json.dumps(body, sort_keys=True)
    with server.lock:
        again = server.fickle * server.asked[text]
        server.asked[text] += 1
    verdicts = ("A", "B", "TIE", "A", "B", "perhaps")
    said = "A" if is_ping(body) else verdicts[(sha256(text.encode()).digest()[0] + again) % len(verdicts)]
    says(said)(handler, body)


def is_ping(body: dict) -> bool:
    return len(body["messages"][0]["content"]) < 100


def kept_keys(cache: Path) -> set[str]:
    """Keys of the replies in a cache as a kill left it; none when it was never opened."""
    if not (cache / FILE).exists():
        return set()
    with contextlib.closing(sqlite3.connect(cache / FILE)) as db:
        return {key for key, in db.execute("SELECT key FROM replies")}


def paid_twice(server, asked: list[tuple[set[str], int]], *, allowed: int) -> str:
    """What was paid for twice, in words. asked: (keys kept, requests so far) at each kill; allowed: replies that a kill
    lost between the network and the cache."""
    keys = ["" if is_ping(body) else reply_key(f"{server.url}/chat/completions", body) for _, body, _, _ in server.seen]
    again = sum(key in kept for kept, so_far in asked for key in keys[so_far:])
    twice = sum(n - 1 for key, n in Counter(keys).items() if key)
    if not any(keys):
        return "the judge was never asked"
    return f"{again} kept replies were asked for again, {twice} asked twice" if again or twice > allowed else ""
