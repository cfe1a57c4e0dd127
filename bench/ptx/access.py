"""Loads, stores and asynchronous copies."""
import numpy as np

from .formats import numpy_type


def words(text: str) -> list[str]:
    """Split "{%r1, %r2}", or one operand."""
    return [each.strip() for each in text.strip("{} ").split(",")]


def moved(opcode: str):
    """Read (memory, numbers a thread moves, their type) off an opcode."""
    parts = opcode.split(".")
    space = next(each for each in parts if each in ("global", "shared"))
    return space, next((int(each[1:]) for each in parts if each in ("v2", "v4", "v8")), 1), numpy_type(parts[-1])


def load_parameter(machine, opcode, operands):
    dtype, put = numpy_type(opcode.split(".")[-1]), machine.sink(operands[0])
    raw = machine.parameters[operands[1].strip("[] ")]
    value = np.full(machine.n, np.frombuffer(raw[:np.dtype(dtype).itemsize], dtype)[0], dtype)
    return lambda active: put(value, active)


def load(machine, opcode, operands):
    space, count, dtype = moved(opcode)
    puts, address = [machine.sink(each) for each in words(operands[0])], machine.address(operands[1])
    width = count * np.dtype(dtype).itemsize
    assert len(puts) == count, operands

    def act(active):
        lanes = machine.lanes(active)
        if not len(lanes):
            return
        at = address()[lanes]
        if space == "global":
            raw = machine.memory.read(at, width)
        else:
            where = machine.shared.place(at, width, machine.block[lanes])
            raw = machine.shared.read(where, machine.warp[lanes])
        numbers = np.ascontiguousarray(raw).view(dtype)
        for index, put in enumerate(puts):
            full = np.zeros(machine.n, dtype)
            full[lanes] = numbers[:, index]
            put(full, active)

    return act


def store(machine, opcode, operands):
    space, count, dtype = moved(opcode)
    address, reads = machine.address(operands[0]), [machine.source(each, dtype) for each in words(operands[1])]
    assert len(reads) == count, operands

    def act(active):
        lanes = machine.lanes(active)
        if not len(lanes):
            return
        at, numbers = address()[lanes], np.stack([read()[lanes] for read in reads], 1)
        raw = np.ascontiguousarray(numbers).view(np.uint8).reshape(len(lanes), -1)
        if space == "global":
            machine.memory.write(at, raw)
        else:
            where = machine.shared.place(at, raw.shape[1], machine.block[lanes])
            machine.shared.write(where, machine.warp[lanes], raw)

    return act


def copy_async(machine, opcode, operands):
    """cp.async: nobody else may touch its bytes between here and the wait, where it happens."""
    to, source, size = machine.address(operands[0]), machine.address(operands[1]), int(operands[2], 0)
    length = machine.source(operands[3], np.uint32) if len(operands) > 3 else None

    def act(active):
        lanes = machine.lanes(active)
        if not len(lanes):
            return
        given = np.full(len(lanes), size) if length is None else length()[lanes].astype(np.int64)
        if not np.isin(given, (0, size)).all():
            raise NotImplementedError("a part of a cp.async")
        where = machine.shared.place(to()[lanes], size, machine.block[lanes])
        machine.shared.claim(where, machine.warp[lanes])
        machine.copies[-1].append((where, machine.warp[lanes], source()[lanes].copy(), given > 0))

    return act


def finish_copy(machine, where, warp, address, real) -> None:
    raw = np.zeros(where.shape, np.uint8)
    if real.any():
        raw[real] = machine.memory.read(address[real], where.shape[1])
    machine.shared.write(where, warp, raw)


def commit_copies(machine, opcode, operands):
    return lambda active: machine.copies.append([])


def wait_for_copies(machine, opcode, operands):
    every = opcode.endswith("wait_all")
    keep = 0 if every else int(operands[0])

    def act(active):
        if every:
            machine.copies.append([])
        while len(machine.copies) > keep + 1:
            for each in machine.copies.pop(0):
                finish_copy(machine, *each)

    return act
