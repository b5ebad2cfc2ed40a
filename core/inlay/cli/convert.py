"""`inlay models convert`: a published checkpoint in its original layout as a diffusers pipeline."""

from __future__ import annotations

import json
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.listing import Json
from inlay_config.errors import InputError


class Order(StrEnum):
    """How query, key and value lie in the checkpoint."""

    legacy = "legacy"
    new = "new"


def convert(
    file: Annotated[Path, typer.Argument(help="Checkpoint: .pt, .ckpt or .safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    head_channels: Annotated[
        int, typer.Option(min=1, help="Channels of an attention head (num_head_channels).")
    ] = 64,
    size: Annotated[
        int | None, typer.Option(min=8, help="Side of its pictures; by default as published.")
    ] = None,
    order: Annotated[
        Order, typer.Option(help="new: trained with use_new_attention_order.")
    ] = Order.legacy,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of the configurations of a Stable Diffusion."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to a diffusers pipeline with equal outputs: of guided-diffusion (ADM),
    Stable Diffusion 1, InstructPix2Pix and what was tuned from it (MagicBrush, EraseDraw)."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("it is there already", where=f"--out {out}", fix="Give a new folder.")
    from diffusers import DDPMPipeline

    from inlay.backbones import compvis
    from inlay.backbones.adm import adm_scheduler, load_adm

    if base or compvis.holds(file):
        pipe = compvis.load(file, base)
        model = pipe.unet
    else:
        model = load_adm(file, head_channels=head_channels, size=size, order=order.value)
        pipe = DDPMPipeline(model, adm_scheduler(model))
    partial = out.with_name(f"{out.name}.partial")
    try:
        pipe.save_pretrained(partial)
        if out.exists():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror or str(error)
        raise InputError(f"cannot be written: {reason}", where=f"--out {out}") from error
    if as_json:
        config = {"path": str(out), "parameters": model.num_parameters(), **model.config}
        typer.echo(json.dumps(config, default=str))
    else:
        typer.echo(
            f"{out}: {model.num_parameters():,} parameters, {model.config['sample_size']} px"
        )
