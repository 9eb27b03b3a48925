"""Building and keeping the kernels: what goes wrong on other machines must cost speed, never the process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from recollect.kernels import compile as building
from recollect.ops import multi_token_attention
from tests.ops.test_multi_token import module_inputs

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="no C compiler on this machine")

QUICK = ("-O0", "-std=gnu11", "-fPIC", "-shared")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home folder, and nothing built or loaded yet."""
    caches = (building._cache_folder, building.stencil, building.attention)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def lanes(*names: str) -> int | None:
    """Load a quick build of attention.c and call it; None where that is refused."""
    loaded = building._load(str(building.compiler()), "attention.c", QUICK, ("lanes", *names))
    return None if loaded is None else loaded.lanes()


def kept(home: Path) -> list[Path]:
    """What lies in the cache folder."""
    return sorted((home / ".cache" / "recollect").iterdir())


def test_a_build_is_kept_and_nothing_else(home: Path) -> None:
    """Prevents compiling again on every start, and folders left behind by builds."""
    assert lanes() == 4
    before = [(path, path.stat().st_ino) for path in kept(home)]
    assert lanes() == 4
    assert [(path, path.stat().st_ino) for path in kept(home)] == before
    assert [path.suffix for path in kept(home)] == [".so"]


@pytest.mark.parametrize("size", [0, 100, 6000])
def test_a_damaged_build_is_built_again(size: int, home: Path) -> None:
    """Prevents a crash (a library cut short kills the process that loads it) or slow runs for ever after a crash or a full disk."""
    assert lanes() == 4
    (library,) = kept(home)
    whole = library.read_bytes()
    (home / "cut").write_bytes(whole[:size])
    os.replace(home / "cut", library)  # another file: the one in use must not shrink
    assert lanes() == 4
    (library,) = kept(home)
    assert library.read_bytes() == whole


def test_several_may_build_at_once(home: Path) -> None:
    """Prevents a library that is loaded while another process still writes it."""
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: lanes(), range(3))) == [4] * 3
    assert len(kept(home)) == 1


def test_a_library_without_the_function_is_refused(home: Path) -> None:
    """Prevents an AttributeError from a compiler that exports nothing."""
    assert lanes("absent") is None


def test_a_folder_that_others_can_write_is_not_used(home: Path) -> None:
    """Prevents running code that somebody else put there."""
    folder = home / ".cache" / "recollect"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert building._cache_folder() != folder
    assert building._cache_folder().stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents running code of the folder's owner, who is another user."""
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert building._cache_folder() != home / ".cache" / "recollect"


def test_without_a_writable_home_kernels_are_built_elsewhere(home: Path) -> None:
    """Prevents a crash in containers and services without a home folder."""
    (home / ".cache").write_text("not a folder")
    assert lanes() == 4
    assert home not in building._cache_folder().parents


@pytest.mark.parametrize("found", [None, shutil.which("false"), "/nowhere/cc"])
def test_without_a_working_compiler_the_op_runs_in_another_form(
    found: str | None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents Multi-Token Attention that only works where it was developed."""
    monkeypatch.setattr(building, "compiler", lambda: found)
    named = module_inputs(9)
    expected = multi_token_attention(**named, backend="materialized")
    torch.testing.assert_close(multi_token_attention(**named), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="backend='blocked'"):
        multi_token_attention(**named, backend="native")
