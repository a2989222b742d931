"""Whether the model hub can be asked: its client tries for most of a minute before it says that there is no network."""

from __future__ import annotations

from pathlib import Path

PATIENCE = 10.0
"""Seconds for the first answer; a network slower than that is asked all the same, but one that does not even connect is
taken for none."""
UNREACHED = frozenset({"ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled"})
"""Kinds of errors that mean that nothing was reached; the client's libraries differ in what these are made of."""


def only_fetched(place: str) -> bool:
    """Whether only what is on this disk can be had of a model: for `local_files_only` of `from_pretrained`.

    Args:
        place: a folder, about which the hub is not asked, or a hub id, about which it is asked once, without retries;
            where HF_HUB_OFFLINE is set, not even once.
    """
    if Path(place).expanduser().exists():
        return False
    from huggingface_hub import model_info  # noqa: PLC0415 - takes long, and folders need none of it

    try:
        model_info(place, timeout=PATIENCE)
    except Exception as error:  # all others are told by who asks for the files
        return any(kind.__name__ in UNREACHED for kind in type(error).__mro__)
    return False
