"""API keys: who may ask."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow_trt.errors import OptionError

_SHORTEST = 16


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys of a file, one a line; lines that begin with # are left out. Raises OptionError, which quotes none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise OptionError(
            f"the file of API keys {path} cannot be read: {error.strerror}", option="api_key_file"
        ) from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith(b"#"))
    if not keys:
        raise OptionError(f"the file of API keys {path} has none; write one a line", option="api_key_file")
    if any(len(key) < _SHORTEST or not key.isascii() or b" " in key for key in keys):
        raise OptionError(
            f"a key in {path} is no key: expected {_SHORTEST} or more characters of ASCII, without spaces",
            option="api_key_file",
        )
    return keys


def is_allowed(headers: Mapping[bytes, bytes], keys: Sequence[bytes]) -> bool:
    """Whether a request brings one of the keys, as `Authorization: Bearer KEY` or as `X-API-Key: KEY`.

    It takes as long for a key that is nearly right as for any other.
    """
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    matches = [hmac.compare_digest(given, key) for key in keys]  # all are compared, also after one that is right
    return any(matches)
