"""GGUF files: found by name, and their parts joined, which transformers cannot read."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


@contextlib.contextmanager
def source(path: str, call: str, weights: bool = True):
    """``(folder, options)`` for ``from_pretrained``: of the file ``path``, or of the whole that it is a part of.

    ``path``: a local file, or ``owner/repository/file.gguf`` on the hub.  ``weights``: whether more is needed than the
    metadata, all of which lie in the first part.  Parts are joined in a temporary file (in
    TMPDIR) that is as large as all of them.  Raises FileNotFoundError for a missing part, ImportError without the
    package gguf, ValueError for a part that is damaged.
    """
    folder, file = os.path.split(path)
    match = _PART.match(file)
    if match is None:
        yield folder or ".", {"gguf_file": file}
        return
    count = int(match[3])
    parts = [os.path.join(folder, f"{match[1]}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    missing = [os.path.basename(p) for p in parts if not os.path.isfile(p)]
    if missing:
        raise FileNotFoundError(
            f"{call}: model must have all of its {count} parts in one local folder, got none of "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''} in {folder or '.'}"
        )
    if not weights:
        yield folder or ".", {"gguf_file": os.path.basename(parts[0])}
        return
    with tempfile.TemporaryDirectory() as temporary:
        try:
            _join(parts, os.path.join(temporary, "whole.gguf"))
        except ImportError:
            raise ImportError(
                f"{call}: a .gguf model needs the package gguf, which is not installed (pip install gguf)"
            ) from None
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{call}: model must be GGUF files, got {path}: {' '.join(str(error).split())}") from error
        yield temporary, {"gguf_file": "whole.gguf"}


def _join(parts: list[str], path: str) -> None:
    """Writes one GGUF file with the first part's metadata and every part's tensors."""
    import gguf

    readers = [gguf.GGUFReader(part) for part in parts]
    architecture = readers[0].fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in readers[0].fields.items():
        # The writer gives the architecture and the "GGUF." entries itself, and there are no parts any more.
        if name == "general.architecture" or name.startswith(("GGUF.", "split.")):
            continue
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=of)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for t in tensors:
        writer.add_tensor_info(t.name, t.data.shape, t.data.dtype, t.data.nbytes, t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        writer.write_tensor_data(t.data)
    writer.close()
