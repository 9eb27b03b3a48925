"""`recollect retrofit`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from recollect.cli.shared import app, refuse


@app.command()
def retrofit(
    model: Annotated[str, typer.Argument(help="A trained causal model: a folder, or a name on the Hugging Face hub.")],
    out: Annotated[Path, typer.Option(help="Folder for the new model.")],
    mixer: Annotated[
        str, typer.Option(help="mta, mta_v1, talking_heads: into the attention; yaad, titans, ...: a memory beside it.")
    ] = "mta",
    layers: Annotated[str, typer.Option(help="all, every-4th (2, 6, 10, ...), or numbers: 2,6.")] = "every-4th",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of the mixer, name=value; repeatable.")
    ] = None,
) -> None:
    """Add Multi-Token Attention or a memory to a trained model; its outputs stay as they are until the new parameters are trained.

    Train it with `recollect train RUN.yaml model.start_from=OUT`, everything or, with model.train_only=[new], what was added.
    """
    try:
        from transformers.utils import logging as transformers_logging

        from recollect.comparison.options import parse_options
        from recollect.models import new_parameters
        from recollect.models import retrofit as run

        transformers_logging.disable_progress_bar()
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out} is not empty; give a new folder")
        changed = run(model, mixer=mixer, layers=layers, **parse_options(option or [], of="--option"))
        changed.save_pretrained(out)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (Path(model) / name).is_file():
                shutil.copyfile(Path(model) / name, out / name)
        sizes = dict(changed.named_parameters())
        added = sum(sizes[name].numel() for name in new_parameters(changed))
        total = sum(p.numel() for p in sizes.values())
    except (ValueError, TypeError, OSError) as error:
        refuse(error)
    print(f"written to {out}: {total:,} parameters, {added:,} of them new ({mixer}, layers {layers})")
