"""Keys: refused where they would be saved, and not in run folders, caches, trackers and output."""
import os
import sys
import types
from pathlib import Path
from unittest import mock

from fault_server import FaultServer
from harness import Tally
from hostile_place import Place, command
from toy import ending_model

KEY = "sk-Canary-7f3a-do-not-keep"


def holds_key(text: str | bytes) -> bool:
    text = text if isinstance(text, bytes) else text.encode(errors="replace")
    return KEY.encode() in text or KEY.encode().hex().encode() in text or KEY.replace("-", "%2D").encode() in text


def files_with_key(*folders: Path) -> list[str]:
    return [str(path) for folder in folders for path in folder.rglob("*")
            if holds_key(str(path)) or (path.is_file() and holds_key(path.read_bytes()))]


def keys_on_the_command_line(place: Place) -> Tally:
    """A key in a place where it would be saved is refused, and neither shown nor kept."""
    tally = Tally("hostile: keys typed where they do not belong")
    wrong = [f"judge_url=http://me:{KEY}@127.0.0.1:9/v1", f"judge_url=http://{KEY}@127.0.0.1:9/v1",
             f"judge_url=http://127.0.0.1:9/v1?api_key={KEY}", f"judge_url=http://127.0.0.1:9/v1#{KEY}",
             f"judge_url=me:{KEY}@127.0.0.1/v1", f"judge_url=ftp://127.0.0.1/?key={KEY}", f"judge_url=http://[{KEY}/v1",
             f"judge_url=http://me:{KEY}\u2100@127.0.0.1/v1",
             f"judge_key_env={KEY}", f"vllm_key_env={KEY}", f"vllm_url=http://me:{KEY}@127.0.0.1:9/v1",
             f"judge_key={KEY}", f"token:{KEY}",
             f"vllm_url=http://127.0.0.1:9/v1?token={KEY}", f"api_key={KEY}", f"rlaif.api_key={KEY}", f"x.token={KEY}",
             f"--judge-url=http://me:{KEY}@127.0.0.1:9/v1", f"rlaif.judge_key_env={KEY}", f"--api-key={KEY}",
             f"lr=0.1?key={KEY}"]
    rest = [f"model={place.model}", f"data={place.data}", "judge=openai", "judge_model=m", "steps=1", "lora_r=2"]
    recipe = place.folder / "recipe.yaml"
    for number, word in enumerate(wrong):
        out = place.folder / f"typed{number}"
        for stage in ("rlaif", "sft"):
            status, said = command(stage, *rest[:2], *(rest[2:] if stage == "rlaif" else rest[4:]), f"out={out}", word)
            tally.add(status == 2 and not holds_key(said), f"{stage} {word}: {status}, {said[-300:]}")
            tally.add(not out.exists() or not files_with_key(out), f"{stage} {word}: in {files_with_key(out)}")
        key, _, value = word.removeprefix("--").removeprefix("rlaif.").partition("=")
        recipe.write_text(f"rlaif:\n  {key.replace('-', '_')}: '{value}'\n")
        status, said = command("rlaif", str(recipe), *rest, f"out={out}")
        tally.add(status == 2 and not holds_key(said), f"recipe with {word}: {status}, {said[-300:]}")
        tally.add(not out.exists() or not files_with_key(out), f"recipe with {word}: in {files_with_key(out)}")
    return tally


class EchoServer(FaultServer):
    """A judge that writes the key that it is sent into whatever it answers."""

    def finish_request(self, request, client_address):
        server, base = self, self.RequestHandlerClass

        class Echo(base):
            def reply(self, status, text, headers=(), kind="application/json"):
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                server.keys.append(key)
                said = key if len(server.keys) % 3 == 0 else ""
                text = text.replace('"content": "', f'"id": "{key}", "content": "{said}')
                super().reply(status, text if status == 200 else f"{text} {key}", headers, kind)

        Echo(request, client_address, self)


def keys_in_a_run(place: Place) -> Tally:
    """Both stages with a key in the environment, and a judge that echoes it: not in the run, the cache, the output."""
    tally = Tally("hostile: keys of a run are not kept")
    out, cache = place.folder / "keyed", place.folder / "keyed-cache"
    env = {"OPENAI_API_KEY": KEY, "HF_TOKEN": KEY, "WANDB_API_KEY": KEY, "MINIMATH_CACHE": str(cache)}
    model = ending_model(place.model, place.folder / "ending")
    with mock.patch.dict(os.environ, env), EchoServer("500", 0.2) as server:
        server.keys = []
        common = [f"model={model}", f"data={place.data}", "lora_r=2", "steps=2", "save_every=1", "device=cpu"]
        status, said = command("sft", *common, "max_len=64", f"out={out / 'sft'}", "batch_size=2", "sample_every=1",
                               "eval_max_new_tokens=8")
        tally.add(status == 0 and not holds_key(said), f"sft: {status}, {said[-300:]}")
        words = [*common, f"adapter={out / 'sft'}", "judge=openai", f"judge_url={server.url}", "judge_model=m",
                 "verifier=none", "judge_timeout_s=5", "prompts_per_step=2", "group_size=4",
                 "max_new_tokens=16", "sample_every=1", f"out={out / 'rlaif'}", "judge_canary_every=2", "max_refill=0"]
        status, said = command("rlaif", *words)
        tally.add(status == 0 and not holds_key(said), f"rlaif: {status}, {said[-300:]}")
        tally.add(KEY in server.keys, "the control: the key was not sent")
        server.share = 1.0
        status, said = command("rlaif", *words, "steps=3", "resume=true", "judge_fallback=stop")
        tally.add(status == 2 and "is down" in said and not holds_key(said), f"a dead judge: {status}, {said[-300:]}")
        with mock.patch("fault_server.PROBE", "another"):  # also the ping
            status, said = command("rlaif", *words, "steps=3", "resume=true")
            tally.add(status == 2 and not holds_key(said), f"ping: {status}, {said[-300:]}")
    stored = {path.suffix for folder in (out, cache) for path in folder.rglob("*")}
    tally.add({".yaml", ".jsonl", ".json", ".safetensors", ".sqlite"} <= stored, f"only {stored} files were written")
    found = files_with_key(out, cache)
    tally.add(not found, f"the key is in {found}")
    (out / "planted").write_text(f"x {KEY} y")
    tally.add(files_with_key(out) == [str(out / "planted")], "the control: a planted key is not found")
    return tally


def keys_in_trackers(place: Place) -> Tally:
    tally = Tally("hostile: trackers are told numbers and names only")
    told = []

    class Run:
        def log(self, *words, **options):
            told.append((words, options))

        def finish(self):
            pass

    def init(*words, **options):
        told.append((words, options))
        return Run()

    modules = {name: types.SimpleNamespace(init=init) for name in ("wandb", "trackio")}
    keys = {"OPENAI_API_KEY": KEY, "WANDB_API_KEY": KEY}
    with mock.patch.dict(sys.modules, modules), mock.patch.dict(os.environ, keys):
        status, said = command("sft", f"model={place.model}", f"data={place.data}", "lora_r=2", "steps=1", "max_len=64",
                               f"out={place.folder / 'tracked'}", "trackers=wandb,trackio", "device=cpu")
    tally.add(status == 0 and len(told) >= 4, f"{status}, {said[-300:]}")
    tally.add(not holds_key(repr(told)), f"told the key: {told}")
    config = [options for _, options in told if {"config", "settings"} & options.keys()]
    tally.add(not config, f"told a config: {config}")
    return tally


CASES = (keys_on_the_command_line, keys_in_a_run, keys_in_trackers)
