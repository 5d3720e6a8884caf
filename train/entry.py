"""What every training command does around its own work: arguments, messages, ``--dry-run``, exit statuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from brainlm.config import parse_entry_args
from brainlm.errors import BrainLMError
from brainlm.world import World, read_world
from train.launcher import Launcher
from train.watchdog import EXIT_STATUS, LostRankError

NOISY = ("DeepSpeed", "deepspeed")


@dataclass(frozen=True)
class Call:
    """One rank of a training command, as it was called."""

    config: str
    overrides: list[str]
    world: World
    launcher: Launcher


def run_entry(
    name: str, doc: str | None, argv: list[str] | None, dry_run: Callable[[Call], str], run: Callable[[Call], None]
) -> int:
    """Run a training command and return its exit status.

    Parameters
    ----------
    name : str
        What messages begin with.
    doc : str
        What ``--help`` shows.
    dry_run : callable
        Returns what ``--dry-run`` prints.
    run : callable
        The work of this rank.

    Returns
    -------
    int
        0 when it is done or stopped on request; 1 for an error that is explained, `EXIT_STATUS` for a lost rank.
    """
    launcher = Launcher()  # before it can have ended
    args = parse_entry_args(doc or "", argv)
    call = Call(args.config, args.overrides, read_world(), launcher)
    level = logging.INFO if call.world.is_rank_zero else logging.ERROR
    logging.basicConfig(level=level, format=f"{name}: %(message)s")
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logger = logging.getLogger(name)
    try:
        if not args.dry_run:
            run(call)
        elif call.world.is_rank_zero:
            print(dry_run(call))
        return 0
    except LostRankError as error:
        logger.error("%s", error)
        return EXIT_STATUS
    except BrainLMError as error:
        logger.error("%s", error)
        return 1
