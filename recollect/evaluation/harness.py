"""lm-evaluation-harness asks a language model: its tasks, its prompts, its metrics; the answers come from our model.

Needs the package lm-eval; nothing else of the library imports this module.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock
from unittest.mock import patch

import numpy as np
import tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recollect.data.tokenizer import FileTokenizer
from recollect.evaluation.language_model import Likelihood, cut
from recollect.tasks.babilong import BabiLong
from recollect.tasks.babilong_prompts import default_parts
from recollect.tasks.files import read_text

try:
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        f'tasks of lm-evaluation-harness need the package lm-eval; install it with: pip install "recollect[eval]" ({error})'
    ) from error

AT_ONCE = 256  # requests between two entries in the cache
ANSWER_TOKENS = 256  # of an answer whose task sets no limit, as the harness's own models have it
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
# What the harness's tasks `niah_*` and `babilong_qa*` ask the hub for, and rows per task and length of the second.
ESSAYS, BABILONG, BABILONG_ROWS = "baber/paul_graham_essays", "RMT-team/babilong-1k-samples", 1000


class Asked(Protocol):
    """What the harness needs of a language model; `recollect.evaluation.language_model.LanguageModel` is one.

    Attributes:
        max_length: tokens that it sees at a time; None: any number.
        tokenizer_name: what identifies its tokenizer.
    """

    max_length: int | None
    tokenizer_name: str

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without those that a tokenizer puts around it."""

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each continuation after its context, which may be empty."""

    def rolling(self, texts: Sequence[str]) -> list[Likelihood]:
        """Of whole texts, every token scored once."""

    def generate(self, prompts: Sequence[str], max_new_tokens: int, until: Sequence[str]) -> list[str]:
        """What greedy decoding writes after each prompt, up to the first of `until`."""


class HarnessModel(LM):
    """A language model as the harness calls it. Answers go to the harness's cache, if it has one, `AT_ONCE` requests at a time."""

    def __init__(self, model: Asked, *, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """
        Args:
            model: what answers.
            progress: called with the number of requests answered and to be answered, of the kind being asked.
        """
        super().__init__()
        self.model = model
        self.progress = progress

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer_name

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results' `config`."""
        return {"tokenizer": self.model.tokenizer_name, "max_length": self.model.max_length}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding would have written it) of each (context, continuation)."""

        def ask(some: Sequence[Instance]) -> list[tuple[float, bool]]:
            found = self.model.log_likelihoods([(each.args[0], each.args[1]) for each in some])
            return [(_number(each), each.greedy) for each in found]

        return self._in_parts("loglikelihood", requests, ask)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability in nats of each text."""

        def ask(some: Sequence[Instance]) -> list[float]:
            return [_number(each) for each in self.model.rolling([each.args[0] for each in some])]

        return self._in_parts("loglikelihood_rolling", requests, ask)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each prompt, without the text that ends it.

        Raises:
            ValueError: a task that samples or searches; we decode greedily.
        """
        groups: dict[_Stop, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_stop(request), []).append(i)
        said = [""] * len(requests)
        n_done = 0
        for stop, members in groups.items():

            def ask(some: Sequence[Instance], stop: _Stop = stop) -> list[str]:
                texts = self.model.generate([each.args[0] for each in some], stop.max_new_tokens, stop.until)
                return [cut(text, stop.until) for text in texts]

            answers = self._in_parts(
                "generate_until", [requests[i] for i in members], ask, n_before=n_done, n_total=len(requests)
            )
            n_done += len(members)
            for i, answer in zip(members, answers, strict=True):
                said[i] = answer
        return said

    def _in_parts(
        self,
        kind: str,
        requests: Sequence[Instance],
        ask: Callable[[Sequence[Instance]], list[Any]],
        *,
        n_before: int = 0,
        n_total: int | None = None,
    ) -> list[Any]:
        """Answers in order; kept in the harness's cache part by part, so that an interruption loses one part."""
        answers: list[Any] = []
        for begin in range(0, len(requests), AT_ONCE):
            part = requests[begin : begin + AT_ONCE]
            for request, answer in zip(part, ask(part), strict=True):
                self.cache_hook.add_partial(kind, request.args, answer)
                answers.append(answer)
            self.progress(n_before + len(answers), len(requests) if n_total is None else n_total)
        return answers


class LocalData(NamedTuple):
    """Files in place of what the harness's RULER and BabiLong ask the Hugging Face hub for.

    essays: a text, in which RULER's tasks hide their needles. facts: a folder with bAbI's qa1_train.jsonl to qa5_train.jsonl (see
    `recollect.tasks.babi.read_stories`), books: a text or a folder of *.txt, of which `recollect.tasks.babilong.BabiLong` mixes the
    rows of babilong_qa1 to babilong_qa5; their lengths ("4k": 4,000, of them 300 for the prompt) are in the model's tokens.
    """

    essays: str | None = None
    facts: str | None = None
    books: str | None = None


def run_harness(
    model: Asked,
    tasks: Sequence[str],
    *,
    include_path: Path | Sequence[Path] | None = None,
    limit: int | None = None,
    n_shots: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    local: LocalData | None = None,
    cache: Path | None = None,
    bootstrap_iters: int = 1000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Ask a model tasks of lm-evaluation-harness.

    A task of the harness reads its data from the Hugging Face hub. To let it read local files, write a YAML file

        include: .../lm_eval/tasks/piqa/piqa.yaml
        task: piqa_local
        dataset_path: json
        dataset_name: null
        dataset_kwargs: {data_files: {validation: /data/piqa_valid.jsonl}}
        training_split: null

    and give its path as the task, or its folder as include_path. As on the harness's command line, the global generators of
    Python, NumPy and torch are seeded (0, 1234, 1234).

    Args:
        model: see `Asked`.
        tasks: names of tasks, groups or tags, or paths of tasks' YAML files.
        include_path: folders of YAML files besides the harness's own.
        limit: rows of each task, at most; None: all.
        n_shots: solved examples before each question, for tasks that do not fix their number; None: each task's own.
        metadata: what generated tasks need: {"tokenizer": PATH, "max_seq_lengths": [4096]} for RULER's, for BabiLong's
            {"max_seq_lengths": "4k"}.
        local: files in place of data sets of the hub.
        cache: start of the name of a database that keeps the answers; the same call with the same model goes on from there.
        bootstrap_iters: resamplings behind the standard errors of metrics that have no formula (perplexity); 0: no standard errors.
        progress: see `HarnessModel`.
    Returns:
        The harness's results: ["results"][task]["acc,none"] and so on; ["samples"][task] has a dict per row. Empty in processes
        other than the first of a torchrun.
    Raises:
        ValueError: no tasks, an unknown one (the nearest is named), one whose file or data cannot be read, local files that no task
            reads, limit or n_shots out of range, a task that needs sampling, or a model that gives nan.
    """
    names = list(tasks)
    if not names:
        raise ValueError("give at least one task of lm-evaluation-harness, such as lambada_openai or piqa")
    if (limit is not None and limit < 1) or (n_shots is not None and n_shots < 0) or bootstrap_iters < 0:
        raise ValueError(f"limit is at least 1, n_shots and bootstrap_iters 0; got {limit}, {n_shots}, {bootstrap_iters}")
    manager = _manager(names, include_path, dict(metadata or {}))
    # As the harness seeds them before it loads tasks: RULER's questions are drawn while loading, and a second run must find them again.
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002  # the harness's generators are the global ones
    with _in_place_of_the_hub(local or LocalData(), model.encode, min(BABILONG_ROWS, limit or BABILONG_ROWS)):
        loaded = [each for name in names for each in _load(manager, name)]
    with patch(
        "lm_eval.evaluator.get_git_commit_hash", return_value=None, create=True
    ):  # of the user's folder; complains without one
        results = simple_evaluate(
            model=HarnessModel(model, progress=progress),
            tasks=loaded,
            task_manager=manager,
            num_fewshot=n_shots,
            limit=limit,
            use_cache=None if cache is None else str(cache),
            bootstrap_iters=bootstrap_iters,
        )
    return dict(results or {})


def tokenizer_of(coder: object, folder: Path) -> str:
    """A copy of a model's tokenizer in a folder, for tasks that make texts of so many tokens and load it with transformers.

    RULER's load it with `trust_remote_code`; a copy names no code, so none of the model's is run.

    Args:
        coder: the loaded model's; without a tokenizer of files, it counts bytes and a start.
        folder: written.
    """
    own = getattr(coder, "tokenizer", None)
    if isinstance(own, FileTokenizer):
        own = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(own.description))
    elif not isinstance(own, PreTrainedTokenizerBase):
        own = ByT5Tokenizer()
    own.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    said.pop("auto_map", None)
    config.write_text(json.dumps(said), encoding="utf-8")
    return str(folder)


def _manager(names: Sequence[str], include_path: Path | Sequence[Path] | None, metadata: dict[str, Any]) -> TaskManager:
    """An index of tasks; the harness's own ten thousand, which take seconds to read, only where they are asked for."""
    paths = [] if include_path is None else [include_path] if isinstance(include_path, (str, Path)) else list(include_path)
    for path in paths:
        if not Path(path).is_dir():
            raise ValueError(f"include_path is a folder of YAML files; {path} is none")
    for name in filter(_is_yaml, names):
        if any(line.startswith("group:") for line in Path(name).read_text(encoding="utf-8").splitlines()):
            raise ValueError(f"{name} holds a group; give the group's name, and the file's folder as include_path")
    own = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if all(name in own.all_subtasks or _is_yaml(name) for name in names):
        return own
    manager = TaskManager(include_path=paths, metadata=metadata)
    for name in names:
        if name not in manager.all_tasks and not _is_yaml(name):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(
                f"lm-evaluation-harness has no task, group or tag {name!r}{hint} `lm-eval ls tasks` lists them, and a YAML file "
                "of your own is named by its path"
            )
    return manager


def _is_yaml(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _load(manager: TaskManager, name: str) -> list[Any]:
    """The group, the task or the tag's tasks of one name, with their data."""
    try:
        loaded = manager.load([name])
    # What a task's file, its data set and their libraries may raise is without bounds; what it means is not.
    except Exception as error:
        where = (
            "; without a connection to the Hugging Face hub, fill its cache (HF_HOME) beforehand, or let the task read local "
            "files: a YAML file with `dataset_path: json`, see recollect.evaluation.harness.run_harness"
        )
        is_download = isinstance(error, OSError)
        reason = str(error).strip() or type(error).__name__
        if "nltk.download('punkt_tab')" in reason:
            reason = "NLTK's rules for splitting sentences are missing: python -m nltk.downloader punkt_tab"
        raise ValueError(
            f"task {name!r} cannot {'get its data' if is_download else 'be loaded'}: {reason}{where if is_download else ''}"
        ) from error
    groups = list(loaded.get("groups", {}).values())
    return groups[:1] or list(loaded["tasks"].values())  # a group comes before the groups in it


@contextlib.contextmanager
def _in_place_of_the_hub(local: LocalData, encode: Callable[[str], Sequence[int]], n_rows: int) -> Iterator[None]:
    """While tasks are loaded inside, `datasets.load_dataset` gives local files for the names `ESSAYS` and `BABILONG`.

    The harness offers no other way: both names are written into its functions, beside what makes the tasks.

    Raises:
        ValueError: books without facts, or files that none of the tasks has read.
    """
    if local.books is not None and local.facts is None:
        raise ValueError("option books is the text between bAbI's facts; give their folder, too: facts=FOLDER")
    hub, unread = datasets.load_dataset, {name for name, path in local._asdict().items() if path is not None} - {"books"}

    def load(path: str, name: str | None = None, *more: Any, split: Any = None, **options: Any) -> Any:
        if path == ESSAYS and local.essays is not None:
            unread.discard("essays")
            return {"text": [read_text("essays", local.essays)]}
        if path == BABILONG and local.facts is not None:
            unread.discard("facts")
            return datasets.Dataset.from_list(_babilong_rows(local, str(split), str(name), encode, n_rows))
        return hub(path, name, *more, split=split, **options)

    _forget_essays()
    try:
        with mock.patch.object(datasets, "load_dataset", load):
            yield
    finally:
        _forget_essays()
    if unread:
        raise ValueError(
            f"no task reads {' or '.join(sorted(unread))}: essays are for RULER's (niah_single_2, niah_multivalue, ...), facts and "
            "books for BabiLong's (babilong_qa1 to babilong_qa5)"
        )


def _forget_essays() -> None:
    """The harness keeps the essays that it has read first, whatever is to be read next."""
    if module := sys.modules.get("lm_eval.tasks.ruler.prepare_niah"):
        module.get_haystack.cache_clear()


def _babilong_rows(
    local: LocalData, split: str, name: str, encode: Callable[[str], Sequence[int]], n: int
) -> list[dict[str, str]]:
    """Rows as the hub has them, of a split ("qa1") at a length ("4k"): the prompt around them is the harness's."""
    qa, length = re.fullmatch(r"qa([1-5])", split), re.fullmatch(r"(\d+)k", name)
    if qa is None:
        raise ValueError("of facts and books, babilong_qa1 to babilong_qa5 can be made (all of them: babilong_longctx)")
    if length is None or (int(length[1]) > 0 and local.books is None):
        raise ValueError(
            f"max_seq_lengths of BabiLong is 0k, the facts alone, or with books=... one such as 4k; got {name!r}"
            + ("" if local.books else " and no books")
        )
    task = BabiLong(
        qa=int(qa[1]),
        length=1000 * int(length[1]),
        facts=str(Path(str(local.facts)) / f"{split}_train.jsonl"),
        background=local.books,
        instruction=False,
        examples=False,
        answer_format=False,
    )
    before, behind = default_parts(task.qa)["frame"].split("{context}")
    rows = []
    for question in task.sample(n, seed=0, measure=lambda text: len(encode(text))):
        asked = question.tags["question"]
        context = question.prompt.removeprefix(before).removesuffix(behind.format(question=asked))
        rows.append({"input": context.strip(), "question": asked, "target": question.answers[0]})
    return rows


class _Stop(NamedTuple):
    """When an answer ends."""

    max_new_tokens: int
    until: tuple[str, ...]


def _stop(request: Instance) -> _Stop:
    """From a request's generation options, which have several names for one thing."""
    options = dict(request.args[1])
    temperature = float(options.get("temperature") or 0)
    is_greedy = not options.get("do_sample") or temperature == 0
    if not is_greedy or int(options.get("num_beams") or 1) > 1:
        raise ValueError(
            f"task {request.task_name!r} asks for sampling or beam search ({options}), and answers are decoded greedily here; "
            "set do_sample: false in its generation_kwargs"
        )
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until
    limit = next((options[name] for name in _LIMITS if options.get(name) is not None), ANSWER_TOKENS)
    return _Stop(int(limit), tuple(text for text in until if text))


def _number(likelihood: Likelihood) -> float:
    """nan would pass for an answer: of several options the harness would take the first."""
    if math.isnan(likelihood.log_prob):
        raise ValueError("the model gave a log-probability that is not a number: it has diverged, or its precision is too low")
    return likelihood.log_prob
