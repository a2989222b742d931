"""What the second of two processes runs; in a file of its own, so that it starts without the rest of the tests."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed

from finetune.training.signals import Agreement, Requests, leave_together


def answers(rank: int, folder: Path) -> None:
    """One of two processes: the second is asked to save after step 2 and to stop after 4; the first saves slowly."""
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)
    requests = Requests(folder)
    agreement = Agreement(requests, 2, is_main_process=rank == 0)
    heard = []
    for step in range(1, 7):
        requests.save = rank == 1 and step == 2
        requests.stop = "SIGTERM came" if rank == 1 and step == 4 else requests.stop
        heard.append(agreement.after_step())
    if rank == 0:
        time.sleep(0.5)
        (folder / "saved").touch()
    leave_together(torch.distributed.barrier, is_main_process=rank == 0)
    (folder / f"{rank}.txt").write_text(repr((heard, (folder / "saved").exists())))
    torch.distributed.destroy_process_group()
