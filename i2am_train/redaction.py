"""Addresses as they may be shown and stored: without passwords and tokens.

``data.cache`` may be ``s3://KEY:SECRET@host/bucket`` or ``https://host/folder?token=...``. What stands there is for the
client that opens the address, and for nothing that is printed, logged, written or compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_USER = re.compile(r"(?<=://)(?:[^\s/@'\"]*@|[^\s/@:'\"]*:(?!\d+(?:/|\s|$))[^\s'\"]*@)")
"""Name and password before a host; also a password with a slash in it, which no client would take."""
_VALUE = re.compile(r"(?<=[?&])([^\s=&#'\"]+)=[^\s&#'\"]*")
"""A name and its value behind the question mark."""
_ADDRESS = re.compile(r"\w://[^\s'\"]+")


def without_secrets(text: str) -> str:
    """A text, in whose addresses names, passwords and the values behind a question mark are hidden.

    >>> without_secrets("data.cache=s3://me:pass@host:9000/a?token=b&c=d is missing")
    'data.cache=s3://***@host:9000/a?token=***&c=*** is missing'
    >>> without_secrets("https://host:80/a@b and what? a=b"), without_secrets("s3://bucket/folder")
    ('https://host:80/a@b and what? a=b', 's3://bucket/folder')
    """
    if "://" not in text:
        return text
    return _ADDRESS.sub(lambda found: _hidden(found[0]), text)


def shown(value: Any) -> Any:
    """Plain nested values whose texts are :func:`without_secrets`.

    >>> shown({"cache": "https://token@host/a", "sizes": [1, 2]})
    {'cache': 'https://***@host/a', 'sizes': [1, 2]}
    """
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {name: shown(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(item) for item in value]
    return value


def _hidden(address: str) -> str:
    return _VALUE.sub(rf"\1={HIDDEN}", _USER.sub(f"{HIDDEN}@", address))
