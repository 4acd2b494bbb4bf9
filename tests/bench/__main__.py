"""`make bench`: the server over its real socket, beside others on the same base, in one run.

Prints tables, writes JSON and plots. Ratios within one run are what counts: machines are shared and noisy.
"""

import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from quickchange.threads import spin_briefly
from tests.bench.contender import Progress
from tests.bench.machine import machine
from tests.bench.options import parse
from tests.bench.parts import Bench
from tests.bench.plots import plot_all
from tests.bench.report import Report


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    spin_briefly(os.environ)  # for the server and PEFT alike; others choose for themselves
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    tell = Progress(sys.stderr.write)
    report = Report(machine(), {name: str(value) for name, value in asdict(options).items()})
    with tempfile.TemporaryDirectory(prefix="quickchange-bench.") as folder:
        scratch = Path(folder)
        try:
            bench = Bench.prepare(options, report, scratch, tell)
            for name, part in bench.parts.items():
                tell(name)
                part()
                report.write(options.out / "bench.json")  # a run that is cut off has written what it has
        finally:
            _keep_logs(scratch, options.out / "logs")
    print(report.text())
    pictures = plot_all(report, options.out, options.at)
    print("\nwrote", *[options.out / "bench.json", *pictures])


def _stop(number: int, _: object) -> None:
    """Leaves through every `with`, so that no paused server stays behind."""
    raise SystemExit(128 + number)


def _keep_logs(scratch: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for log in scratch.glob("*.log"):
        shutil.copy(log, folder)


if __name__ == "__main__":
    main()
