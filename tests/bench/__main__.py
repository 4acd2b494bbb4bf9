"""`make bench`: the server over its real socket, beside PEFT on the same base, in one run.

Prints a table and writes JSON. Ratios within one run are what counts: machines are shared and noisy.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adapters.base import load_base
from adapters.nf4 import fused_kernel_works
from quickchange import Client
from quickchange.threads import spin_briefly
from tests.bench.adapters import write_random_adapter
from tests.bench.load import Ask, Measurement, closed_loop, random_asks
from tests.bench.server_process import running_server


def main() -> None:
    spin_briefly(os.environ)  # for both sides alike
    options = parse()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = run(options, Path(scratch))
    print_table(report)
    path = out / "throughput.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--base", default="smollm2", help="what to serve (default: smollm2)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--adapters", type=int, default=16, help="different adapters (default: 16)")
    parser.add_argument("--rank", type=int, default=16, help="rank on every linear layer (default: 16)")
    parser.add_argument("--concurrency", type=int, default=16, help="clients (default: 16)")
    parser.add_argument("--rounds", type=int, default=2, help="requests per client (default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    return parser.parse_args()


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    layout = load_base(options.base, device=options.device).layout
    names = [f"a{i:02d}" for i in range(options.adapters)]
    folders = {
        name: write_random_adapter(scratch / name, layout, rank=options.rank, seed=i)
        for i, name in enumerate(names)
    }
    asks = random_asks(options.concurrency * options.rounds, names, options.prompt_tokens, seed=0)
    log = options.out / "server.log"
    with running_server(options.base, scratch / "store", log, "--device", options.device) as (address, _):
        upload_s = upload(address, folders)
        results = measure_ours(address, asks, options)
    baseline = measure_peft(options, folders, asks[: options.concurrency])
    return {
        "machine": {"processor": platform.processor(), "torch": torch.__version__},
        "options": {key: str(value) for key, value in vars(options).items()},
        "upload_to_first_token_s": upload_s,
        "quickchange": [asdict(result) for result in results],
        "peft_set_adapter": baseline,
    }


def upload(address: str, folders: dict[str, Path]) -> float:
    """Publishes all adapters; returns seconds from the last one's first byte to its first token."""
    with Client(address) as client:
        client.generate([1, 2, 3], max_new_tokens=2)
        for name, folder in folders.items():
            began_s = time.perf_counter()
            client.adapters.push(folder, name)
            client.generate([1, 2, 3], adapter=name, max_new_tokens=1)
            seconds = time.perf_counter() - began_s
    return seconds


def measure_ours(address: str, asks: list[Ask], options: argparse.Namespace) -> list[Measurement]:
    base_asks = [Ask(ask.prompt, "") for ask in asks]
    one_asks = [Ask(ask.prompt, asks[0].adapter) for ask in asks]
    scenarios = [("base only", base_asks), ("one adapter", one_asks), ("distinct adapters", asks)]
    results = []
    for name, chosen in scenarios:
        for concurrency in sorted({1, options.concurrency}):
            part = chosen[: max(2, len(chosen) * concurrency // options.concurrency)]
            results.append(asyncio.run(closed_loop(address, name, part, concurrency, options.new_tokens)))
    return results


def measure_peft(options: argparse.Namespace, folders: dict[str, Path], asks: list[Ask]) -> dict[str, float]:
    job = {
        "base": options.base,
        "device": options.device,
        "fused": fused_kernel_works(),
        "adapters": {name: str(folder) for name, folder in folders.items()},
        "requests": [{"prompt": ask.prompt, "adapter": ask.adapter} for ask in asks],
        "new_tokens": options.new_tokens,
    }
    command = [sys.executable, "-m", "tests.bench.peft_baseline"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_table(report: dict[str, Any]) -> None:
    baseline = report["peft_set_adapter"]["tokens_per_second"]
    print(f"\n{'scenario':<34}{'tokens/s':>10}{'× PEFT':>8}{'TTFT p50':>10}{'p99':>9}{'adapters/step':>15}")
    print(f"{'PEFT set_adapter, one by one':<34}{baseline:>10.1f}{1.0:>8.2f}")
    for row in report["quickchange"]:
        name = f"{row['scenario']}, {row['concurrency']} at once"
        rate = row["tokens_per_second"]
        print(
            f"{name:<34}{rate:>10.1f}{rate / baseline:>8.2f}{row['first_token_p50_s'] * 1e3:>8.0f}ms"
            f"{row['first_token_p99_s'] * 1e3:>7.0f}ms{row['adapters_in_a_step']:>15}"
        )
    print(f"upload to first token: {report['upload_to_first_token_s'] * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
