"""The public names and their parameters are frozen: people build on them. Say so in LOG.md when one changes."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

# Module -> name -> parameters as they are called ("*" starts the keyword-only ones); "" for what is not called.
PUBLIC: dict[str, dict[str, str]] = {
    "recollect": {
        "Mixer": "config",
        "__version__": "",
        "available": "",
        "build": "name, *, dim, n_heads, **options",
        "mixers": "",
        "models": "",
        "ops": "",
        "presets": "",
        "state": "",
        "tasks": "",
    },
    "recollect.ops": {
        "Mixing": "kq_pre, head_pre, kq_post, head_post",
        "Rows": "raw, weights",
        "differential_attention": "q, k, v, lam, *, scale, start, dropout_p",
        "multi_token_attention": (
            "q, k, v, *, kq_pre, head_pre, kq_post, head_post, scale, document_ids, start, pad_key, dropout_p, seed, backend"
        ),
        "multi_token_rows": "q, k, v, mixing, rows, *, scale, start, pad_key, dropout_p, seed, backend",
        "rotary": "x, positions, *, theta",
        "softmax_attention": "q, k, v, *, scale, start, window, dropout_p",
    },
    "recollect.ops.miras": {
        "Divergence": "ratio, give, one, pole",
        "AttentionalBias": "name, loss, grad, gates, reads, options",
        "BACKENDS": "",
        "BIASES": "",
        "Frame": "moving, fixed, scale, centred, even",
        "LearningRule": "name, update, gates, momentum, window, n_steps, implicit, n_iterations, kind, ridge",
        "MEMORIES": "",
        "Memory": (
            "name, shapes, axes, read, pullback, n_slow, offset_free, initial_std, diagonal, residual, kind, n_slots, options"
        ),
        "MirasSpec": "*, memory, bias, retention, rule, chunk_size, gradient_at, read",
        "MirasState": "dual, anchor, kept, momentum, tail, phase",
        "Parameters": "fast, slow",
        "RETENTIONS": "",
        "RULES": "",
        "Retention": "name, link, start, frame, settle, exact, decays, row_constant, couple, options",
        "initial_state": "spec, q, k, v, gates, *, parameters",
        "scan": "spec, q, k, v, gates, state, *, parameters, reset, valid, decay_floor, backend",
    },
    "recollect.presets": {
        "atlas": "window, *, gated, chunk_size",
        "delta_net": "",
        "delta_product": "n",
        "gated_delta_net": "",
        "gla": "",
        "gsa": "n_slots",
        "hgrn2": "",
        "lightning": "",
        "linear_attention": "",
        "longhorn": "",
        "mamba2": "",
        "memora": "*, chunk_size, read",
        "mesa": "ridge",
        "moneta": "p, q, mode, *, chunk_size, read",
        "omega": "window, *, chunk_size",
        "retnet": "",
        "rwkv7": "",
        "softmax_attention": "",
        "titans": "depth, *, chunk_size",
        "ttt_linear": "*, chunk_size",
        "ttt_mlp": "*, chunk_size",
        "yaad": "kind, *, chunk_size",
    },
    "recollect.mixers": {
        "MIXERS": "",
        "PATTERNS": "",
        "Mixer": "config",
        "MixerConfig": "*, dim, n_heads, layer",
        "available": "",
        "build": "name, *, dim, n_heads, **options",
        "configure": "name, *, dim, n_heads, **options",
        "entry": "name",
        "layer_options": "name, n_layers",
        "register": "name, *, config, summary, source, state, options, pattern",
        "register_pattern": "name, layers, *, summary, source",
    },
    "recollect.models": {
        "RecollectCache": "states, *, n_seen",
        "RecollectConfig": (
            "vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, layers, mlp, "
            "tie_word_embeddings, rms_norm_eps, max_position_embeddings, use_cache, pad_token_id, bos_token_id, eos_token_id"
        ),
        "RecollectForCausalLM": "config",
        "RecollectModel": "config",
        "SIZES": "",
        "load_memory": "model, path",
        "load_retrofitted": "path, *, dtype",
        "n_parameters": "config",
        "new_parameters": "model",
        "remember": "model, tokens, cache, *, piece",
        "retrofit": "model_or_path, *, mixer, layers, **options",
        "save_memory": "model, cache, path",
        "set_inner_steps": "model, share",
        "size": "name, mixer, *, vocab_size",
    },
    "recollect.tasks": {
        "BabiLong": (
            "*, qa, length, facts, background, window, instruction, examples, answer_format, templates, answer_tokens"
        ),
        "Kinship": "*, k_min, k_max, noise, n_noise, shuffle, files, instruction, templates, answer_tokens",
        "Needles": ("*, n_needles, depths, placing, n_digits, length, text, start, cities, templates, answer_tokens"),
        "Question": "prompt, answers, tags",
        "Ruler": (
            "*, haystack, keys, values, n_keys, n_values, n_queries, length, text, start, adjectives, nouns, "
            "templates, answer_tokens"
        ),
        "TEXT_TASKS": "",
        "TextTask": "",
        "register_text_task": "cls",
        "Batch": "inputs, labels, tags",
        "FindBlock": "*, n_letters, n_question, answer, n_blocks",
        "IGNORE": "",
        "Recall": "*, vocab_size, length, n_pairs, variant, n_reassigned, random_non_queries, power, n_passes",
        "TASKS": "",
        "Task": "",
        "build_task": "name, **options",
        "register_task": "cls",
        "stream_seed": "kind, *parts",
    },
}

METHODS: dict[str, str] = {
    "recollect.mixers.Mixer.forward": "self, x, state, *, mask, document_ids",
    "recollect.mixers.Mixer.init_state": "self, batch_size",
    "recollect.mixers.Mixer.maps": "self, x",
    "recollect.mixers.Mixer.reset_parameters": "self",
    "recollect.tasks.Task.sample": "self, n, *, seed",
    "recollect.tasks.Task.solve": "self, inputs",
    "recollect.tasks.Task.text": "self, tokens",
    "recollect.tasks.Task.correct": "self, predictions, labels",
    "recollect.state.detach": "state",
    "recollect.state.select": "state, index",
    "recollect.state.to": "state, device",
    "recollect.state.nbytes": "state",
    "recollect.state.save": "state, path, *, fingerprint",
    "recollect.state.load": "path, like, *, fingerprint",
}

MIXER_NAMES = {
    "atlas",
    "attention",
    "delta_net",
    "delta_product",
    "diff",
    "diff_v2",
    "gated_delta_net",
    "gla",
    "gsa",
    "hgrn2",
    "lightning",
    "linear_attention",
    "longhorn",
    "mamba",
    "mamba2",
    "memora",
    "memory_as_gate",
    "memory_as_layer",
    "mesa",
    "miras",
    "moneta",
    "mta",
    "mta_toy",
    "mta_v1",
    "mta_v2",
    "omega",
    "retnet",
    "rwkv7",
    "sliding_window",
    "talking_heads",
    "titans",
    "ttt_linear",
    "ttt_mlp",
    "yaad",
}
TASK_NAMES = {"find-block", "recall"}


def parameters(thing: Any) -> str:
    """Parameter names of a callable, with the marks of keyword-only and variable ones; "" for anything else."""
    if inspect.ismodule(thing) or not callable(thing):
        return ""
    words, keyword_only = [], False
    for name, parameter in inspect.signature(thing).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        keyword_only = keyword_only or parameter.kind is parameter.VAR_POSITIONAL
        words.append({parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + name)
    return ", ".join(words)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_frozen(module: str) -> None:
    """Prevents a name that disappears or appears, or a parameter that is renamed, without anybody deciding it."""
    loaded = importlib.import_module(module)
    found = {name: parameters(getattr(loaded, name)) for name in loaded.__all__}
    if module == "recollect.models":  # its own fields; the base class's belong to Hugging Face
        found["RecollectConfig"] = ", ".join(
            name for name in vars(loaded.RecollectConfig)["__annotations__"] if name != "model_type"
        )
    assert found == PUBLIC[module]
    assert all(inspect.ismodule(getattr(loaded, name)) or getattr(loaded, name) is not None for name in PUBLIC[module])


@pytest.mark.parametrize("path", METHODS)
def test_methods_are_frozen(path: str) -> None:
    """Prevents interfaces that change under the classes people wrote against them."""
    module, *names = path.split(".")[0:2], *path.split(".")[2:]
    thing: Any = importlib.import_module(".".join(module))
    for name in names:
        thing = getattr(thing, name)
    assert parameters(thing) == METHODS[path]


def test_registered_names_are_frozen() -> None:
    """Prevents saved models and commands that no longer find their mixer or task; new names may be added."""
    from recollect.mixers import available
    from recollect.tasks import TASKS

    assert set(available()) >= MIXER_NAMES
    assert set(TASKS) >= TASK_NAMES


@pytest.mark.parametrize("module", PUBLIC)
def test_public_callables_are_documented(module: str) -> None:
    """Prevents a public function or class without a docstring of its own."""
    loaded = importlib.import_module(module)
    undocumented = [
        name
        for name in loaded.__all__
        if (inspect.isfunction(o := getattr(loaded, name)) or inspect.isclass(o)) and not vars_doc(o)
    ]
    assert undocumented == []


def vars_doc(thing: Any) -> str | None:
    """The docstring written on the thing itself, not one inherited or generated."""
    doc = thing.__doc__ if inspect.isfunction(thing) else vars(thing).get("__doc__")
    return None if doc and doc.startswith(f"{thing.__name__}(") else doc
