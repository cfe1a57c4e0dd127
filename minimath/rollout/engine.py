"""What samples completions, whichever engine does it: open.py, transformers_engine.py or vllm.py."""
import contextlib
from collections.abc import Collection, Iterator
from typing import NamedTuple

from minimath.config.schema import EngineOptions, SamplingOptions
from minimath.core import interrupt
from minimath.core.state import stream_seed
from minimath.data.sample import Sample
from minimath.models.policy import Policy
from minimath.rollout.sampling import Sampling


class Job(NamedTuple):
    """One completion to sample."""
    place: tuple[int, int]  # index of the prompt, number of the sample
    prompt: list[int]
    seed: int  # of its random stream


class Engine(contextlib.AbstractContextManager):
    """Samples completions of prompts with the weights that train.

    While a stream is open the model is set up for decoding: train or judge with it later. A completion depends on
    (seed, key of its prompt, number of the sample) and the weights, not on its batch, up to rounding."""

    def __init__(self, engine: EngineOptions, sampling: SamplingOptions, policy: Policy, *, seed: int = 0, say=print):
        self.options, self.policy, self.seed, self.say = engine, policy, seed, say
        self.how = Sampling.of(sampling)
        self.longest = self.max_new_tokens = sampling.max_new_tokens  # the latter may be lowered between two streams
        self.eos = policy.eos

    def stream(self, prompts: list[list[int]], n: int = 1, *, keys: list[int] | None = None,
               skip: Collection[tuple[int, int]] = ()) -> Iterator[list[tuple[int, int, Sample]]]:
        """Sample n completions of each prompt; yield (prompt, sample, what came) as they end.

        prompts: token ids, none empty. keys: of the prompts' random streams, else their indices. skip: (prompt, sample)
        that are not wanted. To stop, close the generator. Raises UserError if memory is too small for one sequence."""
        raise NotImplementedError

    def generate(self, prompts: list[list[int]], n: int = 1, keys: list[int] | None = None) -> list[list[Sample]]:
        """Sample n completions of each prompt; raises as stream, and Interrupted."""
        found = {}
        with contextlib.closing(self.stream(prompts, n, keys=keys)) as stream:
            for finished in stream:
                found |= {(p, s): sample for p, s, sample in finished}
                interrupt.check()
        return [[found[p, s] for s in range(n)] for p in range(len(prompts))]

    def running(self) -> list[tuple[int, int, list[int]]]:
        """List (prompt, sample, ids so far) of what decodes now; [] if unknown."""
        return []

    def metrics(self) -> dict:
        """Tell of the last rollout: max_num_seqs, seq_fill, ...; {} if unknown."""
        return {}

    def state_dict(self) -> dict:
        """Return what was learned about the memory."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Go on with what an earlier process learned."""

    def close(self) -> None:
        """Give back what the engine holds."""

    def __exit__(self, *_) -> None:
        self.close()

    def jobs(self, prompts, n: int, keys, skip) -> list[Job]:
        keys = range(len(prompts)) if keys is None else keys
        return [Job((p, s), prompt, stream_seed(self.seed, key, s))
                for p, (prompt, key) in enumerate(zip(prompts, keys, strict=True)) for s in range(n)
                if (p, s) not in skip]

    def sample(self, ids: list[int], logp: list[float], finished: bool, full_logp=None) -> Sample:
        """Make the sample of what was decoded; full_logp only where it is another than logp."""
        text = self.policy.decode(ids)
        return Sample(ids, logp, finished, text, None if self.how.full() else full_logp,
                      self.policy.thought_tokens(ids, text))
