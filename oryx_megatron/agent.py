"""`python -m oryx_megatron.agent …`: torchrun, with a rendezvous of its own; its options, and --rdzv-backend=oryx.

What differs from torchrun's c10d:
- its stores listen on one address, that of --rdzv-endpoint and --local-addr, and not on all interfaces: what agents
  tell each other is pickled, so who reaches the port can run code. With ORYX_LISTEN=any, on all.
- What ends its ranks with 2, an error of the user's that they have told in one line, would end them again: they are not
  restarted, and torchrun's own report is left out. It ends with 2 too.
- ORYX_START names a start of the ranks alike on all nodes. TORCHELASTIC_RESTART_COUNT does not: an agent whose ranks
  were well when another's died does not count the restart, and ranks that go by it would wait for each other for ever.

All options: torchrun --help.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.errors import USER_ERROR


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run torchrun."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):  # torchrun's own takes torch
        usage = "%(prog)s [torchrun's options] [-m] PROGRAM …"
        name = "oryx_megatron.agent"
        argparse.ArgumentParser(name, usage, __doc__, formatter_class=HelpFormatter, add_help=False).print_help()
        return 0
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from oryx_megatron import compat
    from oryx_megatron.platform import rendezvous

    rendezvous.register()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: torchrun would end all at a closed terminal
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    compat.torch.never_restart(USER_ERROR)
    try:
        torchrun(argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == USER_ERROR:
            return USER_ERROR
        sys.stderr.write(f"{error}\n")  # without the stack of torchrun
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
