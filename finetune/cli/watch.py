"""Command that shows a run in the browser."""

from __future__ import annotations

import contextlib
import socket
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
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 picks a free one.")] = 8780,
    host: Annotated[
        str, typer.Option(help="127.0.0.1: only this machine can open the page; 0.0.0.0: any machine on the network.")
    ] = "127.0.0.1",
) -> None:
    """Watch a run in the browser: loss, validation, samples, time left. Ctrl-C closes the page, never the run.

    It only reads the run folder, so it can be started before, during or after training.

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
    port = server.server_port
    typer.echo(
        f"On another machine: ssh -L {port}:127.0.0.1:{port} USER@{socket.gethostname()}; in a notebook: "
        f".../proxy/{port}/; Colab: google.colab.output.serve_kernel_port_as_window({port})"
    )
    with contextlib.suppress(KeyboardInterrupt), server:
        server.serve_forever()
