"""Triton's interpreter, three times as fast: kernels that call many functions."""

from __future__ import annotations

from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter swaps the language's functions for its own at every call of a jitted function: only where they are not yet."""
    swap = interpreter._patch_lang

    def swap_once(function: Any) -> Any:
        languages = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        return swap(function) if any(tl.core.is_builtin(x.load) for x in languages) else interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", swap_once)
