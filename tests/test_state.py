"""State as a value: structure, detach, select, sizes, and files that are whole or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from recollect import state


class Cache(NamedTuple):
    keys: Tensor
    extra: Tensor | None


class Pair(NamedTuple):
    first: Cache
    rest: tuple[Tensor, ...]


def example(n_rows: int = 3) -> Pair:
    rows = torch.arange(n_rows * 4, dtype=torch.float64).view(n_rows, 4)
    return Pair(Cache(rows, None), (rows.float() + 0.5, torch.arange(n_rows)))


def assert_same(left: state.State, right: state.State) -> None:
    pairs = list(zip(state.leaves(left), state.leaves(right), strict=True))
    assert pairs
    for (left_name, a), (right_name, b) in pairs:
        assert left_name == right_name
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_map_state_keeps_the_structure() -> None:
    """Prevents states that come back as plain tuples and lose their field names."""
    mapped = state.map_state(lambda t: t + 1, example())
    assert isinstance(mapped, Pair)
    assert isinstance(mapped.first, Cache)
    assert mapped.first.extra is None
    assert torch.equal(mapped.first.keys, example().first.keys + 1)
    assert torch.equal(mapped.rest[1], torch.arange(3) + 1)


def test_leaves_are_named_and_ordered() -> None:
    """Prevents files whose names move when a field is None or nested."""
    assert [name for name, _ in state.leaves(example())] == ["first.keys", "rest.0", "rest.1"]
    assert list(state.leaves(None)) == []


@pytest.mark.parametrize("bad", [[torch.zeros(1)], {"a": torch.zeros(1)}, 3], ids=["list", "dict", "int"])
def test_other_containers_are_refused(bad: object) -> None:
    """Prevents a mutable container from passing as a value."""
    with pytest.raises(TypeError, match=r"a state is a tuple of tensors.*got"):
        state.map_state(lambda t: t, bad)


def test_detach_cuts_the_graph_and_keeps_the_numbers() -> None:
    """Prevents truncated back-propagation that still holds the whole document's graph."""
    weight = torch.ones(2, 2, requires_grad=True)
    carried = Cache(weight * 2, None)
    cut = state.detach(carried)
    assert carried.keys.requires_grad
    assert not cut.keys.requires_grad
    assert torch.equal(cut.keys, carried.keys)


def test_select_reorders_and_repeats_rows() -> None:
    """Prevents beams that continue from another beam's memory."""
    chosen = state.select(example(), torch.tensor([2, 0, 0, 1]))
    assert torch.equal(chosen.first.keys, example().first.keys[[2, 0, 0, 1]])
    assert torch.equal(chosen.rest[1], torch.tensor([2, 0, 0, 1]))


def test_nbytes_counts_every_leaf() -> None:
    """Prevents reports that forget a part of the state: 3 x 4 doubles, 3 x 4 floats, 3 int64."""
    assert state.nbytes(example()) == 3 * 4 * 8 + 3 * 4 * 4 + 3 * 8
    assert state.nbytes(None) == 0


def test_to_moves_every_leaf() -> None:
    """Prevents states of which a part stays behind on the old device."""
    moved = state.to(example(), "meta")
    assert {t.device.type for _, t in state.leaves(moved)} == {"meta"}


def test_save_then_load_is_the_identity(tmp_path: Path) -> None:
    """Prevents lost dtypes, order or rows; the template may hold another number of rows."""
    state.save(example(), tmp_path / "s.safetensors", fingerprint="abc")
    assert_same(state.load(tmp_path / "s.safetensors", example(1), fingerprint="abc"), example())
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_save_takes_views_shared_and_empty_tensors(tmp_path: Path) -> None:
    """Prevents failures on caches: views of one buffer, and caches that hold nothing yet."""
    buffer = torch.arange(12.0).view(3, 4)
    carried = (buffer[:, ::2], buffer[:, ::2], torch.zeros(3, 0, 2), buffer.t())
    state.save(carried, tmp_path / "s")
    assert_same(state.load(tmp_path / "s", carried), carried)


def test_save_of_a_state_with_gradients(tmp_path: Path) -> None:
    """Prevents a checkpoint inside training from needing a detach first."""
    carried = (torch.ones(2, 2, requires_grad=True) * 3,)
    state.save(carried, tmp_path / "s")
    assert torch.equal(state.load(tmp_path / "s", carried)[0], carried[0].detach())


def test_load_gives_the_template_dtype(tmp_path: Path) -> None:
    """Prevents a bf16 model from continuing with the fp32 state of another run unnoticed by dtype errors deep inside."""
    state.save((torch.ones(2, 3),), tmp_path / "s")
    assert state.load(tmp_path / "s", (torch.zeros(2, 0, dtype=torch.bfloat16),))[0].dtype == torch.bfloat16


def test_load_refuses_another_models_file(tmp_path: Path) -> None:
    """Prevents continuing with a state of a different configuration."""
    state.save(example(), tmp_path / "s", fingerprint="abc")
    with pytest.raises(ValueError, match=r"saved by another model.*abc.*xyz"):
        state.load(tmp_path / "s", example(), fingerprint="xyz")


def test_load_refuses_other_tensors(tmp_path: Path) -> None:
    """Prevents a file with missing or extra leaves from loading partially."""
    state.save(example(), tmp_path / "s")
    with pytest.raises(ValueError, match=r"holds tensors .*this model's state has"):
        state.load(tmp_path / "s", example().first)


@pytest.mark.parametrize("keep", [0, 4, 20, -1], ids=["empty", "header-length", "header", "last-byte"])
def test_load_refuses_a_truncated_file(tmp_path: Path, keep: int) -> None:
    """Prevents half-written files from being read."""
    path = tmp_path / "s"
    state.save(example(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole state file"):
        state.load(path, example())


def test_load_of_a_missing_file_says_so(tmp_path: Path) -> None:
    """Prevents a missing file from looking like a damaged one."""
    with pytest.raises(FileNotFoundError):
        state.load(tmp_path / "absent", example())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a full disk from destroying the last good state."""
    path = tmp_path / "s"
    state.save(example(), path)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        state.save(state.map_state(lambda t: t + 1, example()), path)
    monkeypatch.undo()
    assert_same(state.load(path, example()), example())
    assert os.listdir(tmp_path) == ["s"]


def test_load_refuses_a_changed_byte(tmp_path: Path) -> None:
    """Prevents a rotten disk or a bad copy from becoming what a model remembers: header, names and numbers are checked."""
    path = tmp_path / "s"
    state.save(example(), path, fingerprint="abc")
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"is damaged|is not a whole state file|was not written by"):
            state.load(path, example(), fingerprint="abc")


def test_load_refuses_files_of_others(tmp_path: Path) -> None:
    """Prevents weights from being read as a state because the names fit."""
    save_file({"0": torch.zeros(2)}, tmp_path / "s")
    with pytest.raises(ValueError, match=r"was not written by recollect\.state\.save"):
        state.load(tmp_path / "s", (torch.zeros(2),))


def test_digest_sees_names_shapes_types_and_values_not_layout() -> None:
    """Prevents a checksum that misses a change, or that depends on strides (a view of one element keeps its own)."""
    base = torch.arange(6.0).view(2, 3)
    known = state.digest({"a": base, "b": torch.zeros(())})
    assert known == state.digest({"b": torch.zeros(()), "a": base.t().contiguous().t()})
    assert state.digest({"a": base[:, 1][:1]}) == state.digest({"a": torch.ones(1)})
    assert state.digest({"a": torch.ones(1, dtype=torch.bfloat16)}) == state.digest({"a": torch.ones(1, dtype=torch.bfloat16)})
    others = [
        {"a": base},
        {"c": base, "b": torch.zeros(())},
        {"a": base.reshape(3, 2), "b": torch.zeros(())},
        {"a": base, "b": torch.zeros((), dtype=torch.int32)},
        {"a": base + torch.tensor([0.0, 0.0, 1e-6]), "b": torch.zeros(())},
        {"a": base, "b": torch.zeros(0)},
    ]
    assert len({known, *map(state.digest, others)}) == 7


def test_fingerprint_is_stable_and_tells_configs_apart() -> None:
    """Prevents fingerprints that depend on the order of keys or miss a value."""
    assert state.fingerprint({"a": 1, "b": 2}) == state.fingerprint({"b": 2, "a": 1})
    assert state.fingerprint({"a": 1, "b": 2}) != state.fingerprint({"a": 1, "b": 3})
    assert len(state.fingerprint({})) == 16
