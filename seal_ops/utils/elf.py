"""What a shared library needs and defines, read from its ELF file (Linux). setup.py uses it: standard library only.

Why: a compiler that links libstdc++ statically gives an extension stream and locale classes of its own beside those
of the process, and the first number that either formats through the other's objects ends in a segmentation fault.
"""

from __future__ import annotations

import dataclasses
import pathlib
import struct

_STD = (
    "_ZNSt",
    "_ZNKSt",
    "_ZSt",
    "_ZNSs",
    "_ZNKSs",
    "_ZNSi",
    "_ZNSo",
    "_ZNKSo",
    "_ZTVSt",
    "_ZTVN10__cxxabiv1",
    "__cxa_throw",
)


@dataclasses.dataclass(frozen=True)
class Library:
    """`needed`: names of the shared libraries it loads. `own_std`: symbols of the C++ runtime that it defines."""

    needed: tuple[str, ...]
    own_std: tuple[str, ...]

    @property
    def fault(self) -> str | None:
        """One sentence where the library carries a C++ runtime of its own; None where it uses the process's."""
        if self.own_std:
            symbols = f"{len(self.own_std)} strong std:: symbols, {self.own_std[0]} for one"
            return f"the library carries a C++ runtime of its own ({symbols})"
        if not any(name.startswith(("libstdc++.so", "libc++.so")) for name in self.needed):
            return f"the library does not load libstdc++.so (it loads {', '.join(self.needed) or 'nothing'})"
        return None

    def __str__(self) -> str:
        runtime = next(
            (name for name in self.needed if name.startswith(("libstdc++.so", "libc++.so"))), "no libstdc++.so"
        )
        return f"{runtime}, {len(self.own_std)} std:: symbols of its own"


def read(path: str | pathlib.Path) -> Library:
    """Reads a 64-bit little-endian ELF file. Raises ValueError for anything else.

    Strong definitions alone are counted: instantiated templates and inline functions of the standard library are weak
    in every object file, and the linker takes those of one library for all."""
    data = pathlib.Path(path).read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} must be a 64-bit little-endian ELF file, got {data[:6]!r}")
    offset, entry_size, count = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + n * entry_size) for n in range(count)]

    def text(table, at: int) -> str:
        start = table[4] + at
        return data[start : data.index(b"\0", start)].decode()

    needed, own = [], set()
    for section in sections:
        kind, start, size, link = section[1], section[4], section[5], section[6]
        if kind == 6:  # dynamic: NEEDED entries
            for at in range(start, start + size, 16):
                tag, value = struct.unpack_from("<qQ", data, at)
                if tag == 1:
                    needed.append(text(sections[link], value))
        elif kind in (2, 11):  # symbol tables
            for at in range(start, start + size, 24):
                name, info, _, index, _, _ = struct.unpack_from("<IBBHQQ", data, at)
                if index and info >> 4 == 1:  # defined here, global
                    symbol = text(sections[link], name)
                    if symbol.startswith(_STD):
                        own.add(symbol)
    return Library(tuple(needed), tuple(sorted(own)))
