"""The experiments of Miras, arXiv 2504.13173, and the press's claims about it."""

from __future__ import annotations

from typing import Any

from recollect.reproduction.experiment import Asking, Experiment, Published, Training
from recollect.reproduction.parts import SMALL_TEXT, TAUGHT, TEACHING, TINY_TEXT, WORDS, curve, text_size, train_variants

NAMES = {
    "attention": "Transformer++",
    "retnet": "RetNet",
    "gla": "GLA",
    "mamba2": "Mamba2",
    "delta_net": "DeltaNet",
    "gated_delta_net": "Gated DeltaNet",
    "ttt_mlp": "TTT",
    "moneta": "Moneta",
    "yaad": "Yaad",
    "memora": "Memora",
    "moneta-h": "Moneta-H",
}
THREE = ("moneta", "yaad", "memora")
_SIZE = text_size("340 M to 1.3 B parameters, 15 to 100 billion tokens")
_RECALL: dict[str, Any] = {"task": "recall", "budget": "750steps"}
_RUNS = tuple(f"recollect train {name}-{size} out=runs/{name}-{size}" for size in ("340m", "780m", "1.3b") for name in THREE)

TABLE_2 = Published(
    title="Table 2, 340 M parameters, 15 billion tokens (single runs)",
    columns=("Wiki ppl", "LAMBADA ppl", "mean of 8 accuracies"),
    rows={
        "Transformer++": (31.52, 41.08, 42.92),
        "RetNet": (32.50, 49.73, 42.54),
        "GLA": (28.51, 43.02, 44.09),
        "Mamba": (30.83, 40.21, 43.59),
        "DeltaNet": (28.65, 47.30, 44.04),
        "TTT": (27.44, 34.19, 44.51),
        "Gated DeltaNet": (27.01, 30.94, 45.42),
        "Moneta": (26.19, 29.31, 46.45),
        "Yaad": (26.61, 29.11, 45.94),
        "Memora": (27.16, 30.44, 45.51),
    },
    note="The means are ours, over the paper's eight accuracies. Baselines are those that the Titans paper reports.",
)
TABLE_3 = Published(
    title="Table 3: RULER single needle, accuracy %, at 2K/4K/8K (W: 1K/2K/4K) tokens",
    columns=("PK 2K", "PK 4K", "PK 8K", "N 2K", "N 4K", "N 8K", "W 1K", "W 2K", "W 4K"),
    rows={
        "Mamba2": (98.6, 61.4, 31.0, 98.4, 55.8, 14.2, 62.2, 42.2, 4.2),
        "DeltaNet": (96.8, 98.8, 98.6, 47.2, 15.4, 12.8, 85.2, 46.2, 20.0),
        "Gated DeltaNet": (89.8, 91.4, 90.0, 99.2, 91.8, 26.4, 86.4, 82.6, 24.4),
        "TTT": (98.4, 98.8, 98.0, 60.2, 36.6, 10.2, 85.8, 78.8, 28.0),
        "Moneta": (99.4, 98.8, 98.8, 99.4, 99.4, 92.8, 92.2, 88.2, 70.8),
        "Yaad": (99.2, 98.6, 94.4, 99.8, 98.6, 93.2, 91.8, 89.6, 67.4),
        "Memora": (99.2, 98.8, 92.6, 98.4, 99.2, 93.2, 92.4, 88.2, 70.4),
    },
    note="The size of the models is not stated. W is a word or RULER's third task (uuid); no source settles it.",
)

LANGUAGE = Experiment(
    name="miras-lm",
    about="Language models trained alike (section 6, Table 2)",
    published=(TABLE_2,),
    tiny=(
        Training(
            column="bits/byte",
            request={**TINY_TEXT, "mixers": ["attention", "gated_delta_net", "mamba2", *THREE]},
            names=NAMES,
        ),
    ),
    small=(
        Training(
            column="bits/byte",
            request={
                **SMALL_TEXT,
                "mixers": [
                    "attention",
                    "retnet",
                    "gla",
                    "mamba2",
                    "delta_net",
                    "gated_delta_net",
                    "ttt_mlp",
                    *THREE,
                    "moneta-h",
                ],
            },
            names=NAMES,
        ),
    ),
    paper=(
        *_RUNS,
        *(
            f"recollect evaluate runs/{name}-{size} harness -o tasks=wikitext,lambada_openai,piqa,hellaswag,winogrande,arc_easy,"
            f"arc_challenge,social_iqa,boolq --device cuda --dtype bfloat16 --out table2/{name}-{size}"
            for size in ("340m", "780m", "1.3b")
            for name in THREE
        ),
    ),
    size=_SIZE,
)

SCALING = Experiment(
    name="miras-scaling",
    about="Perplexity over training FLOPs and over the training context, 2K to 32K (Figure 3)",
    published=(
        curve(
            "Figure 3: C4",
            "below all baselines at equal FLOPs; better than Mamba2 and GSA as the context grows",
            model="Moneta, Yaad, Memora",
        ),
    ),
    tiny=tuple(
        Training(
            column=f"context {length}",
            request={**TINY_TEXT, "mixers": ["mamba2", *THREE], "seq_len": length, "batch_size": 2048 // length},
            names=NAMES,
        )
        for length in (128, 512)
    ),
    small=tuple(
        Training(
            column=f"context {length}",
            request={**SMALL_TEXT, "mixers": ["mamba2", "gsa", *THREE], "seq_len": length, "batch_size": 4096 // length},
            names=NAMES,
        )
        for length in (256, 1024, 4096)
    ),
    paper=tuple(
        f"recollect train {name}-340m data.seq_len={length} out=runs/{name}-340m-{length}"
        for name in THREE
        for length in (2048, 4096, 8192, 16384, 32768)
    ),
    size=_SIZE,
)


def _key(column: str, *, budget: str, **options: Any) -> Training:
    """A needle taught in words, short texts first."""
    request = {"task": "ruler", "task_options": {**options, **WORDS}, **TEACHING, "budget": budget}
    return Training(column=column, request=request, names=TAUGHT)


NEEDLES = Experiment(
    name="miras-niah",
    about="RULER's single needle (section 6, Table 3)",
    published=(TABLE_3,),
    tiny=(
        _key("PK", haystack="noise", answer_tokens=12, shortest=144, length=256, grow=750, budget="1500steps"),
        Asking(
            of="PK",
            suite="ruler",
            options={"only": ("niah_single_1",), "lengths": (256, 512, 1024), "n": 100},
            by="length",
            context=1024,
        ),
    ),
    small=tuple(
        Training(
            column=column,
            request={
                "task": "ruler",
                "task_options": {**options, "length": 768, "shortest": 512, "answer_tokens": 40},
                "mixers": ["attention", "mamba2", "delta_net", "gated_delta_net", "ttt_mlp", *THREE],
                "budget": "4000steps",
            },
            names=NAMES,
        )
        for column, options in (
            ("PK", {"haystack": "noise"}),
            ("N", {"haystack": "essay", "start": "random"}),
            ("W", {"haystack": "essay", "values": "words", "start": "random"}),
        )
    ),
    paper=tuple(
        f"recollect evaluate runs/{name}-780m ruler -o only=niah_single_1,niah_single_2,niah_single_3,niah_single_words "
        f"-o lengths=1024,2048,4096,8192 -o n=500 -o text=essays.txt --device cuda --dtype bfloat16 --out table3/{name}"
        for name in THREE
    ),
    size={
        "tiny": "2 layers of width 64, taught this task on texts of 144 to 256 tokens; the paper: larger, not taught it.",
        "small": "fewer than 1 M parameters, trained for this task on texts of 512 to 768 bytes; the paper: larger, not so trained.",
    },
)


def _ablation(name: str, about: str, published: Published, variants: dict[str, str]) -> Experiment:
    """Variants of a model on recall and on text; variants: mixer as typed -> name in the table."""
    mixers = list(variants)
    forgetting = {"task": "recall", "task_options": {"variant": "forgetting"}}
    return Experiment(
        name=name,
        about=about,
        published=(published,),
        tiny=(Training(column="recall error", request={**_RECALL, "mixers": mixers}, names=variants),),
        small=(
            Training(column="recall error", request={**_RECALL, "mixers": mixers, "budget": "1500steps"}, names=variants),
            Training(
                column="forgetting error", request={**forgetting, "mixers": mixers, "budget": "1500steps"}, names=variants
            ),
            Training(column="bits/byte", request={**SMALL_TEXT, "mixers": mixers}, names=variants),
        ),
        paper=train_variants(name, mixers, lambda mixer: [f"{mixer}-340m"]),
        size=_SIZE,
    )


_TABLE_4 = Published(
    title="Table 4: Yaad, average of language tasks",
    columns=("average",),
    rows={
        "Yaad": (53.98,),
        "no retention": (50.63,),
        "delta fixed": (52.19,),
        "l2 only": (52.86,),
        "l1 only": (53.04,),
        "linear memory": (51.57,),
    },
    note="Metric and data are not defined in the paper: 53.98 is no average of its Table 2.",
)

ABLATIONS = (
    _ablation(
        "miras-ablation-p",
        "The exponent p of Moneta's bias (Figure 4)",
        curve("Figure 4: contexts 2K to 16K", "best p = 3, worst p = 4, not monotone"),
        {f"moneta:bias={{name: lp, p: {p}}}": f"p = {p}" for p in (1.0, 1.5, 2.0, 2.8, 3.0, 3.2, 4.0)},
    ),
    _ablation(
        "miras-ablation-q",
        "The exponent q of Moneta's retention (Figure 4)",
        curve("Figure 4: contexts 2K to 16K", "q changes how perplexity grows with the context, p does not"),
        {f"moneta:retention={{name: lq, q: {q}}}": f"q = {q}" for q in (2.0, 3.0, 4.0, 5.0)},
    ),
    _ablation(
        "miras-ablation-retention",
        "With and without retention, and other retentions (Table 4)",
        _TABLE_4,
        {
            "yaad": "Yaad",
            "yaad:retention=none": "no retention",
            "yaad:retention=kl": "KL",
            "yaad:retention=elastic_net": "elastic net",
        },
    ),
    _ablation(
        "miras-ablation-delta",
        "The bias of Yaad (Table 4)",
        _TABLE_4,
        {
            "yaad": "Yaad",
            "yaad:bias=l2": "l2 only",
            "yaad:bias=l1": "l1 only",
            "yaad:bias={name: huber, kind: coordinate}": "coordinate-wise",
        },
    ),
    _ablation(
        "miras-ablation-memory",
        "The memory of Yaad (Table 4)",
        _TABLE_4,
        {"yaad": "Yaad", "yaad:memory=matrix": "linear memory", "yaad:memory=gated_mlp": "gated perceptron"},
    ),
)

PRESS = Experiment(
    name="seed-claims",
    about="Six claims of the press about these models: none is in the papers; the nearest real figures",
    published=(
        Published(
            title="Claims and what the papers have instead",
            columns=("in the paper?", "nearest real figure"),
            rows={
                "Moneta: perplexity 23 % lower": ("no", "WikiText 16 to 17 % lower than Transformer++ (340M to 1.3B)"),
                "Yaad: common sense 89.4 %, +7.2 %": ("no", "best average 56.3 % (1.3B), +4.0 points on Transformer++"),
                "Memora: recall 91.8 %": ("no", "92.1 % printed average of single-needle tasks"),
                "PG-19 with 40 % fewer parameters": ("no", "PG-19 is not in the paper"),
                "5 to 8 times faster training than RNNs": ("no", "no timing in the paper; later 34 to 37 K tokens/s, Mamba 33"),
                "CLUTRR 92.3 %": ("no", "CLUTRR is not in the paper; 92.34 % is another work's, with GPT-4"),
            },
            note="What can be measured here is beside: perplexity against a Transformer, recall, and nothing else.",
        ),
    ),
    tiny=(
        Training(column="bits/byte", request={**TINY_TEXT, "mixers": ["attention", *THREE]}, names=NAMES),
        Training(column="recall error", request={**_RECALL, "mixers": ["attention", *THREE]}, names=NAMES),
    ),
    small=(
        Training(column="bits/byte", request={**SMALL_TEXT, "mixers": ["attention", *THREE]}, names=NAMES),
        Training(
            column="recall error", request={**_RECALL, "mixers": ["attention", *THREE], "budget": "1500steps"}, names=NAMES
        ),
    ),
    paper=_RUNS,
    size=_SIZE,
)

EXPERIMENTS = (LANGUAGE, SCALING, NEEDLES, *ABLATIONS, PRESS)
