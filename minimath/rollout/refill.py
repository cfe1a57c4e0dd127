"""What a refill reads: prompts that share a forward, and the numbers that say where its results go."""
import torch

from minimath.rollout.blocks import Blocks, Row
from minimath.rollout.passes import PREFILL_TOKENS

WIDTH_MULTIPLE = 64  # places, of a prefill on a card: few shapes, whose kernels are chosen once


def tokens_of(row: Row) -> tuple[int, ...]:
    return (*row.job.prompt, *row.ids)


def batches_of(rows: list[Row], *, pads: bool) -> list[list[list[Row]]]:
    """Split rows into forwards, each a list of groups that begin with the same tokens.

    pads: whether prompts of unlike length share one."""
    by_tokens: dict[tuple, list[Row]] = {}
    for row in rows:
        by_tokens.setdefault(tokens_of(row), []).append(row)
    batches: list[list[list[Row]]] = [[]]
    for group in sorted(by_tokens.values(), key=lambda group: group[0].length):  # like lengths: little padding
        length, last = group[0].length, batches[-1]
        if last and ((len(last) + 1) * length > PREFILL_TOKENS or not pads and length != last[0][0].length):
            batches.append(last := [])
        last.append(group)
    return batches


def packed(groups: list[list[Row]], first: int, blocks: Blocks, *, pad: int, width: int, before: bool) -> list:
    """Lay out a forward for groups, which take the slots from `first` on: all on the host, for one copy.

    before: whether padding stands before the prompts. Returns ids (B, width); of each row (4, k): its place in the
    batch, the next token's position, the number of tokens sampled, where its last one stands; padding before each
    prompt (B,); pages (3, m) for SlotCache.fill, and changes (2, c) for SlotCache.tell."""
    lengths, rows = torch.tensor([group[0].length for group in groups]), [row for group in groups for row in group]
    padding = width - lengths if before else torch.zeros_like(lengths)
    ids = torch.full((len(groups), width), pad)
    for line, group, start in zip(ids, groups, padding.tolist(), strict=True):
        line[start:start + group[0].length] = torch.tensor(tokens_of(group[0]))
    source = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
    numbers = torch.stack([source, lengths[source], torch.tensor([len(row.ids) for row in rows]),
                           source * width + (padding + lengths)[source] - 1])
    pages = [(blocks.table[first + i][page], at, page) for i, (row, at) in enumerate(zip(rows, source.tolist()))
             for page in range(row.shared, blocks.pages_of(row))]
    return [ids, numbers, padding, torch.tensor(pages, dtype=torch.long).view(-1, 3).T,
            torch.tensor(blocks.take_changes(), dtype=torch.long)]
