"""The layers of the slot cache: what they keep of S rows, in tensors with the rows in dimension 0.

Each can `fill` slots from a prefilled layer, `move` rows, and stand `at` the coming step: its rows are the first n."""
import torch
from transformers.cache_utils import DummyLayer, DynamicLayer, LinearAttentionLayer

from minimath.models.state import states_of

FIXED_SHAPES = ("cuda",)  # devices whose steps have one shape for each number of rows, as recording needs it


class SlotLayer(DynamicLayer):
    """Keys and values of one layer, [S, H, T, Dh]; of the keys T is innermost where products read them."""

    def __init__(self, prefilled, slots: int, places: int):
        super().__init__()
        self.keys, self.values = (old.new_zeros(slots, old.shape[1], places, old.shape[3])
                                  for old in (prefilled.keys, prefilled.values))
        if self.keys.device.type not in FIXED_SHAPES:
            self.keys = self.keys.view(*self.keys.shape[:2], -1, places).transpose(2, 3)
        self.is_initialized = True
        self.rows = self.pos = self.length = None  # set for the coming forward

    def update(self, key_states, value_states, *args, **kwargs):
        """Write one token [n, H, 1, Dh] per row at its position; return the part in use."""
        n = key_states.shape[0]
        self.keys[self.rows, :, self.pos] = key_states[:, :, 0]
        self.values[self.rows, :, self.pos] = value_states[:, :, 0]
        return self.keys[:n, :, :self.length], self.values[:n, :, :self.length]

    def get_seq_length(self) -> int:
        return self.length - 1  # without the token that the coming forward adds

    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values]

    def fill(self, slots: slice, prefilled, source: torch.Tensor, order: torch.Tensor | None) -> None:
        """Copy rows `source` [k] to slots. order [k, T]: the places to take them in; None: as they are."""
        places = prefilled.keys.shape[2]
        for mine, theirs in ((self.keys, prefilled.keys), (self.values, prefilled.values)):
            new = theirs.index_select(0, source)
            if order is not None:
                new = new.gather(2, order[:, None, :, None].expand_as(new))
            mine[slots, :, :places] = new

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[targets, :, :length] = buffer[sources, :, :length]

    def at(self, rows: torch.Tensor, pos: torch.Tensor, length: int) -> None:
        self.rows, self.pos, self.length = rows, pos, length


class StateLayer(LinearAttentionLayer):
    """Convolution and recurrent state of one layer; a step changes in place the rows that it is given."""

    def __init__(self, prefilled, slots: int, places: int):
        super().__init__(number_of_states=prefilled.number_of_states)
        self.whole = {name: {i: old.new_zeros(slots, *old.shape[1:]) for i, old in getattr(prefilled, name).items()
                             if old is not None} for name in ("conv_states", "recurrent_states")}
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state",
                     "conv_kernel_size"):
            setattr(self, name, dict(getattr(prefilled, name)))

    def tensors(self) -> list[torch.Tensor]:
        return [each for kept in self.whole.values() for each in kept.values()]

    def fill(self, slots: slice, prefilled, source: torch.Tensor, order: torch.Tensor | None) -> None:
        for mine, theirs in zip(StateLayer.tensors(self), states_of(prefilled), strict=True):
            mine[slots] = theirs.index_select(0, source)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        for buffer in StateLayer.tensors(self):
            buffer[targets] = buffer[sources]

    def at(self, rows: torch.Tensor, pos: torch.Tensor, length: int) -> None:
        for name, kept in self.whole.items():
            getattr(self, name).update((i, each[:len(rows)]) for i, each in kept.items())


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


def slots_of(prefilled, slots: int, places: int):
    """Make the layer that keeps `slots` rows of what a prefilled layer keeps of its rows."""
    keys, states = getattr(prefilled, "keys", None), states_of(prefilled)
    kind = (BothLayer if keys is not None else StateLayer) if states else NoLayer if keys is None else SlotLayer
    return kind(prefilled, slots, places)
