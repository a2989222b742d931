"""Weightings, densities and losses of the user's own: functions named by import path instead of an entry in a table.

They get what the table's functions get, and are tried before anything is paid for.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.by_path import import_by_path
from finetune.errors import ConfigError

TRIED = 64
"""Pictures, or quantiles, of a trial."""


class OwnFunctionError(Exception):
    """There is no such function; says why."""


def function(path: str) -> Callable[..., Any]:
    """The function that `module.function` names, as its file is now.

    Raises:
        OwnFunctionError: if there is none.
    """
    try:
        found = import_by_path(path)
    except ModuleNotFoundError as error:
        raise OwnFunctionError(
            f"{error}; put its file into the folder that you start from, or install its package"
        ) from error
    # keep: a file of the user's own can fail in any way while it is imported.
    except Exception as error:
        raise OwnFunctionError(f"it cannot be imported: {error}") from error
    if not callable(found):
        raise OwnFunctionError(f"it is no function but of type {type(found).__name__}")
    return _answering(path, found)


def _answering(path: str, own: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose failure says where in the user's file it happened instead of where it was called."""

    @functools.wraps(own)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return own(*arguments, **named)
        except Exception as error:  # a function of the user's own can fail in any way
            file = own.__code__.co_filename if inspect.isfunction(own) else ""
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
            where = f" in {Path(file).name}, line {lines[-1]}" if lines else ""
            raise ConfigError(
                f"{path} fails{where}: {type(error).__name__}: {error}",
                ["checkpoints hold the last good state; they go on only with the code that they were made with"],
            ) from error

    return call


def quantiles() -> Tensor:
    """Evenly spread quantiles to try a density with, (TRIED,)."""
    return (torch.arange(TRIED) + 0.5) / TRIED


def wrong_weights(weights: Any) -> Iterator[str]:
    """What is wrong with weights of TRIED pictures."""
    yield from _wrong_shape(weights, (TRIED,))
    if isinstance(weights, Tensor) and weights.numel() and float(weights.min()) < 0:
        yield f"it gives {float(weights.min()):g}, and a negative weight teaches the opposite"


def wrong_levels(levels: Any) -> Iterator[str]:
    """What is wrong with the noise levels of `quantiles`."""
    yield from _wrong_shape(levels, (TRIED,))
    if isinstance(levels, Tensor) and levels.numel():
        low, high = float(levels.min()), float(levels.max())
        if not 0 <= low <= high <= 1:
            yield f"it gives {low:g} to {high:g}, and levels go from 0 (clean) to 1 (noise)"
        elif bool((levels.diff() < 0).any()):
            yield "it falls somewhere as the quantile rises, and an inverse cumulative distribution never does"


def wrong_errors(loss: Callable[..., Any], delta: float) -> Iterator[str]:
    """What is wrong with a loss of (prediction, target, delta)."""
    prediction = torch.linspace(-2, 2, 2 * 4 * 8 * 8).view(2, 4, 8, 8).requires_grad_()
    errors = loss(prediction, torch.zeros_like(prediction), delta)
    yield from _wrong_shape(errors, tuple(prediction.shape))
    if isinstance(errors, Tensor) and not errors.requires_grad:
        yield "it has no gradient, so nothing would be learned"


def _wrong_shape(found: Any, shape: tuple[int, ...]) -> Iterator[str]:
    if not isinstance(found, Tensor):
        yield f"it gives no tensor but a value of type {type(found).__name__}"
    elif tuple(found.shape) != shape:
        yield f"it gives shape {tuple(found.shape)} instead of {shape}"
    elif not bool(torch.isfinite(found).all()):
        yield "it gives values that are not finite"
