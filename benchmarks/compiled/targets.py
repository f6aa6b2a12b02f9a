"""The GPUs that kernels are compiled for, and how many programs fit one of their processors."""

from typing import NamedTuple


class Target(NamedTuple):
    """A GPU generation and the limits of its processors: SMs, or compute units.

    A processor has four schedulers, each with its own registers and warps.
    """

    backend: str  # Triton's name for it
    arch: int | str
    warp: int  # threads
    shared: int  # bytes of a processor
    shared_reserved: int  # bytes that the system takes for each program
    registers: int  # of a scheduler, 32 bits each
    warps: int  # that a scheduler keeps
    programs: int  # that a processor keeps


KIB = 1024
SCHEDULERS = 4
REGISTER_UNIT = 8  # allocation granularity of a thread's registers
SHARED_UNIT = 128  # bytes

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD Instinct MI300
# ISA, "Vector Registers" and "Local Data Share".
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 164 * KIB, KIB, 16384, 16, 32),
    "sm_90": Target("cuda", 90, 32, 228 * KIB, KIB, 16384, 16, 32),
    "sm_100": Target("cuda", 100, 32, 228 * KIB, KIB, 16384, 16, 32),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB, 0, 512 * 64, 8, 32),
}


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def resident_programs(target: Target, warps: int, registers: int, shared: int) -> int:
    """Programs that run on a processor at a time.

    Args:
        target: the GPU.
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
    """
    of_a_warp = round_up(max(registers, 1), REGISTER_UNIT) * target.warp
    by_registers = SCHEDULERS * (target.registers // of_a_warp) // warps
    by_warps = SCHEDULERS * target.warps // warps
    taken = round_up(shared + target.shared_reserved, SHARED_UNIT)
    by_shared = target.shared // taken if taken else target.programs
    return min(by_registers, by_warps, by_shared, target.programs)
