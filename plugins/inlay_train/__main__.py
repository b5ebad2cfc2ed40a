"""`accelerate launch -m inlay_train RECIPE ...`: what `inlay train` does, in every process."""

from __future__ import annotations

import sys

import typer

from inlay_config.errors import InlayError
from inlay_train.cli import train

try:
    typer.run(train)
except InlayError as error:
    typer.secho(f"error: {error}", fg="red", err=True)
    sys.exit(2)
