"""The layers of the cache: what they keep of S rows; states with the rows in dimension 0, keys and values in cells.

Each can `fill` slots from a prefilled layer, `move` rows, and stand `at` the coming step: its rows are the first n."""
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DummyLayer, DynamicLayer, LinearAttentionLayer

from minimath.kernels.decode_attention import together
from minimath.models.state import states_of
from minimath.rollout.blocks import Blocks

FIXED_SHAPES = ("cuda",)  # devices whose steps have one shape for each number of rows, as recording needs it


class Fill(NamedTuple):
    """What goes into slots: rows of a prefilled batch, and pages of theirs into cells."""
    slots: slice
    source: torch.Tensor  # (k,) rows of the batch
    order: torch.Tensor | None  # (B, T) the places to take the batch's in; None: as they are
    cells: torch.Tensor  # (m,)
    rows: torch.Tensor  # (m,) of the batch
    pages: torch.Tensor  # (m,) of those


class Move(NamedTuple):
    """What goes from slots to slots, and from cells to cells, all at once."""
    sources: torch.Tensor
    targets: torch.Tensor
    old: torch.Tensor  # cells
    new: torch.Tensor
    places: int  # the first of each cell


class Place(NamedTuple):
    """Where the first n rows write in a step, and what they see."""
    cells: torch.Tensor  # (n,)
    inside: torch.Tensor  # (n,) places in those cells
    length: int  # of what attention sees
    table: torch.Tensor | None  # (n, pages) cells to put behind one another; None: attention reads them where they are


class SlotLayer(DynamicLayer):
    """Keys and values of a layer, (cells, H, page, Dh); of the keys the page is innermost where products read them."""

    def __init__(self, prefilled, blocks: Blocks):
        super().__init__()
        self.keys, self.values = (old.new_zeros(blocks.cells, old.shape[1], blocks.page, old.shape[3])
                                  for old in (prefilled.keys, prefilled.values))
        if blocks.width > 1 or self.keys.device.type not in FIXED_SHAPES:
            self.keys = self.keys.view(*self.keys.shape[:2], -1, blocks.page).transpose(2, 3)
        self.is_initialized, self.place = True, None  # set for the coming forward

    def update(self, key_states, value_states, *args, **kwargs):
        """Write one token (n, H, 1, Dh) per row at its place; return all cells, or the rows that they make."""
        cells, inside, length, table = self.place
        self.keys[cells, :, inside] = key_states[:, :, 0]
        self.values[cells, :, inside] = value_states[:, :, 0]
        if table is None:
            return self.keys, self.values
        return tuple(together(each, table)[:, :, :length] for each in (self.keys, self.values))

    def get_seq_length(self) -> int:
        return self.place.length - 1  # without the token that the coming forward adds

    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values]

    def fill(self, prefilled, what: Fill) -> None:
        places, page = prefilled.keys.shape[2], self.keys.shape[2]
        for mine, theirs in ((self.keys, prefilled.keys), (self.values, prefilled.values)):
            if what.order is not None:
                theirs = theirs.gather(2, what.order[:, None, :, None].expand_as(theirs))
            if places > page:
                theirs = pad(theirs, (0, 0, 0, -places % page))
            cut = theirs.unflatten(2, (-1, min(page, places)))
            mine[what.cells, :, :cut.shape[3]] = cut[what.rows, :, what.pages]

    def move(self, what: Move) -> None:
        for buffer in (self.keys, self.values) if len(what.old) else ():
            buffer[what.new, :, :what.places] = buffer[what.old, :, :what.places]

    def at(self, place: Place) -> None:
        self.place = place


class StateLayer(LinearAttentionLayer):
    """Convolution and recurrent state of one layer; a step changes in place the rows that it is given."""

    def __init__(self, prefilled, blocks: Blocks):
        super().__init__(number_of_states=prefilled.number_of_states)
        rows = blocks.slots
        self.whole = {name: {i: old.new_zeros(rows, *old.shape[1:]) for i, old in getattr(prefilled, name).items()
                             if old is not None} for name in ("conv_states", "recurrent_states")}
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state",
                     "conv_kernel_size"):
            setattr(self, name, dict(getattr(prefilled, name)))

    def tensors(self) -> list[torch.Tensor]:
        return [each for kept in self.whole.values() for each in kept.values()]

    def fill(self, prefilled, what: Fill) -> None:
        for mine, theirs in zip(StateLayer.tensors(self), states_of(prefilled), strict=True):
            mine[what.slots] = theirs.index_select(0, what.source)

    def move(self, what: Move) -> None:
        for buffer in StateLayer.tensors(self):
            buffer[what.targets] = buffer[what.sources]

    def at(self, place: Place) -> None:
        for name, kept in self.whole.items():
            getattr(self, name).update((i, each[:len(place.cells)]) for i, each in kept.items())


class BothLayer(StateLayer, SlotLayer):
    """State, and keys and values beside it."""

    def __init__(self, *prefilled):
        SlotLayer.__init__(self, *prefilled)
        StateLayer.__init__(self, *prefilled)

    def tensors(self) -> list[torch.Tensor]:
        return StateLayer.tensors(self) + SlotLayer.tensors(self)

    def fill(self, *rows) -> None:
        StateLayer.fill(self, *rows)
        SlotLayer.fill(self, *rows)

    def move(self, *rows) -> None:
        StateLayer.move(self, *rows)
        SlotLayer.move(self, *rows)

    def at(self, *step) -> None:
        StateLayer.at(self, *step)
        SlotLayer.at(self, *step)


class NoLayer(DummyLayer):
    """Nothing, as of a layer that has neither."""

    def __init__(self, *prefilled):
        super().__init__()

    def tensors(self) -> list[torch.Tensor]:
        return []

    def fill(self, *rows) -> None: ...
    def move(self, *rows) -> None: ...
    def at(self, *step) -> None: ...


def slots_of(prefilled, blocks: Blocks):
    """Make the layer that keeps of a batch what a prefilled layer keeps of its rows."""
    keys, states = getattr(prefilled, "keys", None), states_of(prefilled)
    kind = (BothLayer if keys is not None else StateLayer) if states else NoLayer if keys is None else SlotLayer
    return kind(prefilled, blocks)
