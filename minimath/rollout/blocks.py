"""Which blocks of the pool the rows of a batch hold: numbers on the host, of which the cache has a copy on the device.

A cell keeps the keys and values of `page` places of a row; a block is the cells of `width` neighbours. On a card that
is one row: the kernel finds cells wherever they are, and samples of a prompt share those that it fills. Products on a
CPU need rows at equal distances: there a block serves neighbours of like length, and nothing is shared. Completions
that fit into one page then stand in rectangles that two products read, as if there were no pool."""
from collections.abc import Sequence

from minimath.kernels.decode_attention_triton import PAGE
from minimath.rollout.engine import Job

BLOCK = 32  # rows of a block on a CPU
PAGE_MULTIPLE, READ_MULTIPLE = 64, 32  # places, on a CPU: of a page, which aligns masks; of what a product reads
ONE_PAGE, PAGES_OF = 512, 256  # places: the longest row in one page on a CPU; a page of longer ones, about
PARTS = 16  # of the batch, at least, on a CPU where not every row can be of full length


class Row:
    """One completion, running or waiting."""

    def __init__(self, job: Job):
        self.job, self.length = job, len(job.prompt)  # length: tokens in the cache, or to prefill
        self.ids, self.logp, self.full_logp = [], [], []  # filled in when it ends, or is put back
        self.boxed, self.known = False, []  # closed its box; ids end_early saw
        self.shared = 0  # its first cells, which were another row's before

    def tokens(self) -> tuple[int, ...]:
        return (*self.job.prompt, *self.ids)


class Blocks:
    """Who holds which blocks: a row, or on a CPU `width` places of the batch."""

    def __init__(self, slots: int, longest: int, places: int, *, alone: bool):
        """Cut a pool of `places`, at least one row's, for `slots` rows of up to `longest` tokens.

        alone: whether a block is of one row."""
        self.ample, least = places >= slots * longest, -(-slots // BLOCK)
        self.width = 1 if alone else -(-slots // (least if self.ample else max(least, min(slots, PARTS))))
        pages = 1 if longest <= ONE_PAGE else -(-longest // PAGES_OF)
        self.page = PAGE if alone else -(-longest // pages // PAGE_MULTIPLE) * PAGE_MULTIPLE
        self.slots, self.longest, self.pages = slots, longest, -(-longest // self.page)
        self.total = -(-slots // self.width) * self.pages
        if not self.ample:
            self.total = max(self.pages, min(self.total, places // (self.width * self.page)))
        spare = int(alone)  # block 0 is nobody's there: a recorded step writes for slots without a row, too
        self.cells = (spare + self.total) * self.width
        self.free, self.users = list(range(spare, spare + self.total)), [0] * (spare + self.total)
        self.held: dict[Row | int, list[int]] = {}
        self.table: list[list[int]] = [[] for _ in range(slots)]  # the cells of each slot's row
        self.changes: dict[int, int] = {}  # of the table, which the device does not know: slot * pages + page -> cell

    def fit(self, rows: Sequence[Row], ahead: int) -> bool:
        """Tell whether there are blocks for rows in this order when each has `ahead` more tokens."""
        if self.ample:
            return True
        pages = [self.pages_of(row, ahead) for row in rows]
        if self.width > 1:
            return sum(max(pages[a:a + self.width]) for a in range(0, len(rows), self.width)) <= self.total
        own = sum(pages) - sum(map(self.common, rows))
        return own + sum({row.job.place[0]: self.common(row) for row in rows}.values()) <= self.total

    def pages_of(self, row: Row, ahead: int = 0) -> int:
        return -(-min(row.length + ahead, self.longest) // self.page)

    def common(self, row: Row) -> int:
        """Count the pages that a row's prompt fills, which all samples of it share."""
        return len(row.job.prompt) // self.page if self.width == 1 else 0

    def hold(self, rows: Sequence[Row], ahead: int = 0) -> None:
        """Give rows in this order blocks for `ahead` more tokens, if they fit; take back all that nobody needs."""
        wanted: dict[Row | int, int] = {}
        for i, row in enumerate(rows):
            owner = row if self.width == 1 else i // self.width
            wanted[owner] = max(wanted.get(owner, 0), self.pages_of(row, ahead))
        for owner in list(self.held):
            self.give_back(owner, wanted.get(owner, 0))
        begun = {row.job.place[0]: blocks for row, blocks in self.held.items()} if self.width == 1 else {}
        for owner, count in wanted.items():
            if owner not in self.held:
                self.held[owner] = []
                if self.width == 1:
                    blocks = begun.setdefault(owner.job.place[0], self.held[owner])
                    self.held[owner] += blocks[:self.common(owner)]
                    owner.shared = len(self.held[owner])
                    for block in self.held[owner]:
                        self.users[block] += 1
            while len(self.held[owner]) < count:
                self.held[owner].append(self.free.pop())
                self.users[self.held[owner][-1]] = 1
        self.note(rows)

    def give_back(self, owner: Row | int, keep: int) -> None:
        """Take all but the first `keep` blocks."""
        for block in self.held[owner][keep:]:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        del self.held[owner][keep:]
        if not self.held[owner]:
            del self.held[owner]

    def note(self, rows: Sequence[Row]) -> None:
        """Bring the table up to date; slots without a row name cell 0."""
        for i, old in enumerate(self.table):
            new = [] if i >= len(rows) else list(self.held[rows[i]]) if self.width == 1 else [
                block * self.width + i % self.width for block in self.held[i // self.width]]
            if new != old:
                self.table[i], more = new, max(0, len(old) - len(new))
                self.changes |= {i * self.pages + page: cell for page, cell in enumerate(new + more * [0])
                                 if page >= len(old) or cell != old[page]}

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Return the changes of the table since the last call: its places, and cells."""
        changes, self.changes = self.changes, {}
        return list(changes), list(changes.values())

    def spans(self, rows: Sequence[Row]) -> list[tuple[int, int, int, list[int]]]:
        """List what products read of neighbours: first row, end row, places, first cells."""
        return [(a, min(a + self.width, len(rows)),
                 -(-max(row.length for row in rows[a:a + self.width]) // READ_MULTIPLE) * READ_MULTIPLE,
                 self.table[a]) for a in range(0, len(rows), self.width)]
