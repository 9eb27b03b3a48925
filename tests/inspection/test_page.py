"""What is on the page is what was computed, for every mixer, and no text can break out of it."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recollect.data.tokenizer import ByteTokenizer, load_tokenizer, train_tokenizer
from recollect.evaluation.loading import OwnCoder
from recollect.inspection import html, inspect_text
from recollect.inspection.reading import token_texts
from recollect.mixers import available
from tests.inspection.small import TEXT, model_of
from tests.subjects import SMALL


def data_of(page: str) -> dict[str, Any]:
    """The JSON on a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def unpacked(item: dict[str, Any]) -> np.ndarray:
    return item["offset"] + item["scale"] * np.frombuffer(base64.b64decode(item["data"]), "<f2").astype(np.float64)


def page_of(model, text: str = TEXT, **options: Any) -> dict[str, Any]:
    return data_of(html(inspect_text(model, OwnCoder(ByteTokenizer()), text, **options), model="a model", text="a text"))


def test_bits_equal_the_models_cross_entropy() -> None:
    """Prevents bits of the next token, or in nats."""
    model = model_of("attention")
    (bits,) = page_of(model, n_tokens=40)["layers"][0]["strips"]
    ids = torch.tensor([ByteTokenizer.start, *TEXT.encode()[:39]])
    with torch.no_grad():
        expected = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none") / np.log(2)
    values = unpacked(bits)
    assert np.isnan(values[0])
    np.testing.assert_allclose(values[1:], expected, rtol=1e-3)


def test_maps_on_the_page_equal_the_softmax_of_the_layer() -> None:
    """Prevents heads or rows that are packed in another order than they are unpacked."""
    model = model_of("attention", "mta", heads=4)
    layers = page_of(model, n_tokens=30)["layers"]
    seen: list[torch.Tensor] = []
    for block in model.model.layers:
        block.mixer.register_forward_pre_hook(lambda mixer, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ByteTokenizer.start, *TEXT.encode()[:29]])[None])
        wholes = [list(block.mixer.maps(x).values())[-1][0] for block, x in zip(model.model.layers, seen, strict=True)]
    rows, columns = np.tril_indices(30)
    for one, whole in zip(layers[1:], wholes, strict=True):
        assert one["reads"]["kind"] == "map"
        last = one["maps"][-1]
        assert (last["side"], last["block"]) == (30, 1)
        np.testing.assert_allclose(unpacked(last).reshape(4, -1), whole.numpy()[:, rows, columns], atol=2e-3 * last["scale"])
    assert [one["stage"] for one in layers[2]["maps"]] == [
        "logits", "convolved", "mixed", "softmax", "post_convolved", "post_mixed"
    ]  # fmt: skip


def test_long_texts_are_pooled_and_say_so() -> None:
    """Prevents a map of a long text that passes for one cell per token, and reads that are lost with the pooling."""
    model = model_of("attention")
    found = page_of(model, n_tokens=600)
    one = found["layers"][1]
    assert one["maps"][0]["block"] == 3
    assert one["maps"][0]["side"] == 200
    assert one["reads"]["kind"] == "top"
    keys = np.frombuffer(base64.b64decode(one["reads"]["keys"]), "<i4").reshape(2, 600, 8)
    assert (keys <= np.arange(600)[:, None]).all()
    assert unpacked(one["reads"]).size == keys.size


@pytest.mark.parametrize("name", available())
def test_every_registered_mixer_has_a_page(name: str) -> None:
    """Prevents a mixer that is registered but cannot be inspected."""
    options = {key: value for key, value in SMALL.get(name, {}).items() if key != "n_heads"}
    found = page_of(model_of({"mixer": name, **options}, "attention"), n_tokens=40)
    assert len(found["tokens"]) == 40
    for one in found["layers"][1:]:
        assert one["strips"] or one["maps"]
        assert one["reads"]
        assert all(unpacked(strip).size == one["heads"] * 40 for strip in one["strips"])
        assert not any(np.isnan(unpacked(strip)[-1]) for strip in one["strips"])
    parts = [one["label"] for one in found["layers"][1:]]
    assert len(parts) == (3 if name.startswith("memory_as") else 2)


def test_a_text_cannot_end_the_script() -> None:
    """Prevents a text with tags in it from becoming part of the page."""
    evil = "</script><script>alert(1)</script><!-- & <b>" * 3
    page = html(
        inspect_text(model_of("attention"), OwnCoder(ByteTokenizer()), evil),
        model="<i>m</i>",
        text="<u>t</u>",
        command="a <b> c",
    )
    assert "alert(1)</" not in page
    assert "<i>m" not in page
    assert "<u>t" not in page
    assert "".join(data_of(page)["tokens"])[:9] == "</script>"


def test_byte_tokens_show_whole_characters() -> None:
    """Prevents replacement characters where a letter takes several bytes, and text that is lost or doubled."""
    text = "aÆ\u2013日b"
    ids = torch.from_numpy(ByteTokenizer().encode_batch([text])[0].astype("int64"))
    assert token_texts(OwnCoder(ByteTokenizer()), ids) == ["a", "Æ", "", "\u2013", "", "", "日", "", "", "b"]
    assert token_texts(OwnCoder(ByteTokenizer()), ids[:2]) == ["a", "�"]


def test_tokens_of_a_trained_tokenizer_join_to_the_text(tmp_path) -> None:
    """Prevents spaces lost at the beginning of tokens."""
    (tmp_path / "a.txt").write_text(TEXT)
    tokenizer = load_tokenizer(train_tokenizer(tmp_path / "a.txt", vocab_size=300, out=tmp_path))
    ids = torch.from_numpy(np.concatenate([[tokenizer.start], tokenizer.encode_batch([TEXT[:400]])[0]]).astype("int64"))
    assert "".join(token_texts(OwnCoder(tokenizer), ids)) == TEXT[:400]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 1}, "tokens is at least 2"),
        ({"layers": [2]}, "layers of this model are 0 to 1; got 2"),
        ({"layers": [-1]}, "layers of this model are 0 to 1; got -1"),
        ({"text": ""}, "the text is empty"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    """Prevents an empty page, or one of other layers than those asked for."""
    with pytest.raises(ValueError, match=message):
        inspect_text(model_of("attention", "delta_net"), OwnCoder(ByteTokenizer()), **{"text": TEXT, **options})


def test_notes_say_what_was_cut_and_stretched() -> None:
    """Prevents the reader from taking the beginning for the whole, or an extrapolation for what the model was trained on."""
    model = model_of("attention", context=64)
    assert inspect_text(model, OwnCoder(ByteTokenizer()), "short").notes == []
    assert "first 64 tokens" in inspect_text(model, OwnCoder(ByteTokenizer()), TEXT).notes[0]
    assert "made for 64 tokens" in inspect_text(model, OwnCoder(ByteTokenizer()), TEXT, n_tokens=80).notes[1]
