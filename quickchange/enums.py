"""Numbers of the wire's enums as members of ours. Knows no messages."""

from enum import StrEnum
from typing import TypeVar

from google.protobuf.descriptor import EnumDescriptor

EnumT = TypeVar("EnumT", bound=StrEnum)


def named(enum: type[EnumT], wire: EnumDescriptor, prefix: str, value: int) -> EnumT:
    """The member with the wire's name; UNKNOWN for one that only a newer server has."""
    known = wire.values_by_number.get(value)
    name = known.name.removeprefix(prefix) if known is not None else "UNKNOWN"
    return enum.__members__.get(name, enum.__members__["UNKNOWN"])
