"""Finds what an instruction does: opcode and operands -> an action (see Machine), None for what moves threads."""
from . import access, arithmetic, tensor

BUILDERS = (
    (("ld.param",), access.load_parameter),
    (("ld.",), access.load),
    (("st.",), access.store),
    (("cp.async.commit_group",), access.commit_copies),
    (("cp.async.wait_",), access.wait_for_copies),
    (("cp.async.c",), access.copy_async),
    (("shfl.sync",), tensor.shuffle),
    (("ldmatrix",), tensor.load_matrix),
    (("stmatrix",), tensor.store_matrix),
    (("mma.sync",), tensor.product),
    (("wgmma.mma_async",), tensor.group_product),
    (("wgmma.commit_group",), tensor.commit_products),
    (("wgmma.wait_group",), tensor.wait_for_products),
    (("wgmma.fence", "fence.proxy"), lambda machine, opcode, operands: lambda active: None),
    (("mov.",), arithmetic.move),
    (("cvt.",), arithmetic.convert),
    (("setp.",), arithmetic.compare),
    (("selp.",), arithmetic.select),
    (("shl.", "shr."), arithmetic.shift),
    (("mul.wide", "mad.wide"), arithmetic.widening),
    (("",), arithmetic.elementwise),
)


def action_of(machine, instruction):
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in ("bra", "bra.uni", "ret") or opcode == "bar.sync" and operands == ["0"]:
        return None
    build = next(build for prefixes, build in BUILDERS if opcode.startswith(prefixes))
    return build(machine, opcode, operands)
