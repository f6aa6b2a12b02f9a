"""Files as they come from failing disks and from people who mean harm, drawn from a seed."""

import copy
import math
from dataclasses import dataclass
from random import Random

import torch

ODD = (
    *(None, True, False, -1, 0, 1, 2**31, -(2**63), 10**30, 0.5, math.nan, math.inf, -0.0),
    *("", "x", "../..", "\x1b[2J", "\ud800", "\0", "9" * 5000, [], {}, [[]], {"": {}}, {"x": 1}),
)


def damaged(content: bytes, random: Random) -> bytes:
    """The bytes after one accident: flipped bits, a cut, a hole, rubbish, a piece twice."""
    place, other = sorted(random.randrange(len(content) + 1) for _ in range(2))
    match random.randrange(6):
        case 0:
            changed = bytearray(content)
            for _ in range(random.choice((1, 1, 1, 8))):
                bit = random.randrange(8 * len(content))
                changed[bit // 8] ^= 1 << bit % 8
            return bytes(changed)
        case 1:
            return content[:place]
        case 2:
            return content[:place] + content[other:]
        case 3:
            return content[:place] + random.randbytes(random.choice((1, 4, 64))) + content[place:]
        case 4:
            return content[:other] + content[place:other] + content[other:]
        case _:
            piece = random.choice((b"9" * 5000, b"[" * 5000, b'"', b"\\ud800", b"nan", b"-1e999"))
            return content[:place] + piece + content[place + random.randrange(3) :]


@dataclass(frozen=True)
class Table:
    """A place in nested tables and lists."""

    holder: dict | list
    key: object


def places_of(value):
    found, pending = [], [value]
    while pending:
        one = pending.pop()
        if isinstance(one, dict | list):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            found += [Table(one, key) for key in keys]
            pending += [one[key] for key in keys]
    return found


def lists(value):
    """The same with lists in place of tuples, which cannot be changed."""
    if isinstance(value, dict):
        return {key: lists(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [lists(entry) for entry in value]
    return value


def odd_tensors(tensor):
    """What a file may hold in a tensor's place."""
    return (
        *(tensor[..., None], tensor.double(), tensor.to(torch.int8), tensor.flatten()[:1]),
        *(tensor.to_sparse(), torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")),
        *(torch.zeros(0), torch.zeros(1).expand(10**9)),
    )


def with_odd_content(value, random: Random):
    """A copy in which one place, at any depth, holds what does not belong there, or is gone."""
    changed = copy.deepcopy(lists(value))
    place = random.choice(places_of(changed))
    if random.random() < 0.15:
        del place.holder[place.key]
        return changed
    if isinstance(place.holder, dict) and random.random() < 0.15:
        place.holder[random.choice(("", "x", "step", 7, "\x1b"))] = place.holder.pop(place.key)
        return changed
    there = place.holder[place.key]
    choices = ODD if not isinstance(there, torch.Tensor) else (*ODD[:13], *odd_tensors(there))
    place.holder[place.key] = copy.deepcopy(random.choice(choices))
    return changed
