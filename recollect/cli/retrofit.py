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
        from safetensors import SafetensorError
        from transformers.utils import logging as transformers_logging

        from recollect.comparison.options import parse_options
        from recollect.models import new_parameters
        from recollect.models import retrofit as run
        from recollect.models.configuration import model_folder

        transformers_logging.disable_progress_bar()
        if out.is_file():
            raise ValueError(f"--out {out} is a file; give a new folder")
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out} is not empty; give a new folder")
        source = model_folder(Path(model))
        try:
            changed = run(str(source or model), mixer=mixer, layers=layers, **parse_options(option or [], of="--option"))
        except SafetensorError as error:
            raise ValueError(f"{model}: its weights are damaged: {error}") from error
        changed.save_pretrained(out)
        _copy_tokenizer(source, model, out)
        sizes = dict(changed.named_parameters())
        added = sum(sizes[name].numel() for name in new_parameters(changed))
        total = sum(p.numel() for p in sizes.values())
    except (ValueError, TypeError, OSError) as error:
        refuse(error)
    print(f"written to {out}: {total:,} parameters, {added:,} of them new ({mixer}, layers {layers})")


def _copy_tokenizer(source: Path | None, name: str, out: Path) -> None:
    """The model's tokenizer, byte by byte where its files are here; a model without one is left without one."""
    if source is not None:
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (source / file).is_file():
                shutil.copyfile(source / file, out / file)
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(name).save_pretrained(out)
    except (OSError, ValueError) as error:
        print(f"{name} has no tokenizer that could be copied: {str(error).splitlines()[0]}")
