"""The layers of the cache: what they keep of S rows; states with the rows in dimension 0, keys and values in cells."""
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


class Place(NamedTuple):
    """Where the first n rows write in a step, and what they see."""
    cells: torch.Tensor  # (n,)
    inside: torch.Tensor  # (n,) places in those cells
    length: int  # of what attention sees
    table: torch.Tensor | None  # (n, pages) cells to put behind one another; None: attention reads them where they are


class Kept:
    """What every layer can do; as it stands, what one does that keeps nothing."""

    def tensors(self) -> list[torch.Tensor]:
        return []

    def fill(self, prefilled, what: Fill) -> None:
        """Copy rows of a prefilled layer."""

    def move(self, sources, targets, old, new, places: int) -> None:
        """Copy slots `sources` to `targets`, and the first places of cells `old` to `new`, all at once."""

    def at(self, place: Place) -> None:
        """Stand at the coming step: its rows are the first n."""


class NoLayer(Kept, DummyLayer):
    """Neither keys and values nor state."""


class SlotLayer(Kept, DynamicLayer):
    """Keys and values of a layer, (cells, H, page, Dh); of the keys the page is innermost where products read them."""

    def __init__(self, prefilled, blocks: Blocks):
        DynamicLayer.__init__(self)
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

    def move(self, sources, targets, old, new, places: int) -> None:
        for buffer in (self.keys, self.values) if len(old) else ():
            buffer[new, :, :places] = buffer[old, :, :places]

    def at(self, place: Place) -> None:
        self.place = place


class StateLayer(Kept, LinearAttentionLayer):
    """Convolution and recurrent state of one layer; a step changes in place the rows that it is given."""

    def __init__(self, prefilled, blocks: Blocks):
        LinearAttentionLayer.__init__(self, number_of_states=prefilled.number_of_states)
        self.whole = {name: {i: old.new_zeros(blocks.slots, *old.shape[1:])
                             for i, old in getattr(prefilled, name).items() if old is not None}
                      for name in ("conv_states", "recurrent_states")}
        self.states = [each for kept in self.whole.values() for each in kept.values()]
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state",
                     "conv_kernel_size"):
            setattr(self, name, dict(getattr(prefilled, name)))

    def tensors(self) -> list[torch.Tensor]:
        return self.states + super().tensors()

    def fill(self, prefilled, what: Fill) -> None:
        for mine, theirs in zip(self.states, states_of(prefilled), strict=True):
            mine[what.slots] = theirs.index_select(0, what.source)
        super().fill(prefilled, what)

    def move(self, sources, targets, *cells) -> None:
        for each in self.states:
            each[targets] = each[sources]
        super().move(sources, targets, *cells)

    def at(self, place: Place) -> None:
        for name, kept in self.whole.items():
            getattr(self, name).update((i, each[:len(place.cells)]) for i, each in kept.items())
        super().at(place)


class BothLayer(StateLayer, SlotLayer):
    """State, and keys and values beside it."""

    def __init__(self, prefilled, blocks: Blocks):
        SlotLayer.__init__(self, prefilled, blocks)
        StateLayer.__init__(self, prefilled, blocks)


def slots_of(prefilled, blocks: Blocks) -> Kept:
    """Make the layer that keeps of a batch what a prefilled layer keeps of its rows."""
    keys, states = getattr(prefilled, "keys", None) is not None, bool(states_of(prefilled))
    if not keys and not states:
        return NoLayer()
    return (BothLayer if keys and states else StateLayer if states else SlotLayer)(prefilled, blocks)
