"""Command that shows a run on a live page."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.app import Overrides, Recipe, app
from finetune.live.server import serve
from finetune.run_files import load_run


@app.command()
def watch(
    recipe: Recipe,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0: any that is free.")] = 8780,
    host: Annotated[
        str, typer.Option(help="127.0.0.1: seen on this machine only. 0.0.0.0: by all who reach it.")
    ] = "127.0.0.1",
) -> None:
    """Show a run while it trains: loss, validation, samples, time left. Ctrl-C ends the page, never the run.

    It reads the run folder only, before, while and after the run goes on, in this process or another.

    Examples:

      finetune watch runs/mine

      finetune watch my.yaml --host 0.0.0.0 --port 8000
    """
    folder = Path(recipe)
    if not folder.is_dir():
        folder = load_run(recipe, overrides or ()).output_dir
    server = serve(folder, host, port)
    own = "127.0.0.1" if host in ("", "0.0.0.0") else host
    typer.echo(f"{folder}: http://{own}:{server.server_port}/")
    typer.echo(
        f"On another machine: ssh -L {server.server_port}:127.0.0.1:{server.server_port}; in a notebook: "
        f".../proxy/{server.server_port}/; Colab: google.colab.output.serve_kernel_port_as_window({server.server_port})"
    )
    with contextlib.suppress(KeyboardInterrupt), server:
        server.serve_forever()
