"""Which rows are over: closed boxes, circles, and how the host comes to know."""
import functools

import torch

from minimath.data.template import begins_in_thought, behind_thought
from minimath.grading.answer import MAX_ANSWER_CHARS, boxes

BOX = "\\boxed{"  # what thinking_budget ends with, and a completion goes on from
LONGEST_BOX = 4 * MAX_ANSWER_CHARS + 64  # tokens, each of a character or more, that hold any which `boxes` finds


class Flight:
    """A table on its way to the host, where `land` waits for it."""

    def __init__(self, table: torch.Tensor):
        self.table = table.clone().to("cpu", non_blocking=True)  # pinned, if it comes from a card
        self.event = torch.cuda.Event() if table.is_cuda else None
        if self.event:
            self.event.record()

    def land(self) -> list:
        if self.event:
            self.event.synchronize()
        return self.table.tolist()


@functools.lru_cache(maxsize=4)
def closing_ids(tokenizer) -> frozenset[int]:
    """Find the ids whose text has a closing brace."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if "}" in text)


class BoxWatch:
    """Tells when a completion has closed a \\boxed{...} behind its thought; decodes only when it can have."""

    def __init__(self, tokenizer):
        self.tokenizer, self.closing = tokenizer, closing_ids(tokenizer)

    def may_close(self, token: int) -> bool:
        return token in self.closing

    def closed(self, ids: list[int], prompt: list[int]) -> bool:
        """Tell whether the last token closed the first box."""
        if len(ids) > LONGEST_BOX and not boxes(self.tokenizer.decode(ids[-LONGEST_BOX:])):
            return False
        text = self.tokenizer.decode(ids)  # with special tokens: the tags may be some
        if self.tokenizer.decode(prompt[-16:]).endswith(BOX):
            text = BOX + text
        return bool(boxes(behind_thought(text, begins_in_thought(self.tokenizer, prompt))))


def in_loop(ids: list[int]) -> bool:
    """Tell whether all of ids repeats a piece of at most a quarter of its length."""
    return any(ids[period:] == ids[:-period] for period in range(1, len(ids) // 4 + 1))
