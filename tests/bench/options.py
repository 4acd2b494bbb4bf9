"""What a run of the benchmark may be told."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.cache import default_cache_dir

PARTS = ("throughput", "open-loop", "cold", "residents", "merged", "memory")
SCENARIOS = ("base", "one", "distinct", "sweep", "zipf", "prefix")

_QUICK = {
    "concurrency": [1, 8],
    "at": 8,
    "adapters": 8,
    "many": 16,
    "cycle": 24,
    "registered": 100,
    "passes": 1,
    "prompt_tokens": 64,
    "new_tokens": 16,
    "open_requests": 12,
}


@dataclass(frozen=True, slots=True)
class Options:
    """See `parser`."""

    base: str
    device: str
    rank: int
    concurrency: list[int]
    at: int
    adapters: int
    many: int
    cycle: int
    registered: int
    passes: int
    rounds: int
    prompt_tokens: int
    new_tokens: int
    exponent: float
    load_factors: list[float]
    open_requests: int
    only: list[str]
    scenarios: list[str]
    peft: bool
    llama_server: Path | None
    llama_cpp: Path | None
    llama_quantize: Path | None
    vllm: str | None
    quick: bool
    seed: int
    cache: Path
    out: Path

    @property
    def most_clients(self) -> int:
        return max([*self.concurrency, self.at])

    @property
    def context(self) -> int:
        """Tokens of prompt and answer, rounded up, for servers that want to know."""
        return -(-(self.prompt_tokens + self.new_tokens + 1) // 256) * 256


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options; `--quick` changes the defaults, and whatever is given wins over it."""
    parser = _parser()
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**_QUICK)
    given = vars(parser.parse_args(arguments))
    given["concurrency"] = sorted(set(given["concurrency"]))
    options = Options(**given)
    if options.llama_server and not options.llama_cpp:
        parser.error("--llama-server needs --llama-cpp: the folder with its conversion scripts")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="The server over its real socket, beside others."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a short run: fewer of everything, figures are rough")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    add("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="of the throughput part")
    add("--passes", type=int, default=3, help="times that everything is measured (default: 3)")
    add("--rounds", type=int, default=2, help="requests per client and pass (default: 2)")
    add("--seed", type=int, default=0, help="of prompts, arrivals and popularity (default: 0)")
    add("--cache", type=Path, default=default_cache_dir() / "bench", help="adapters and GGUF files are kept")
    add("--out", type=Path, default=Path("bench-out"), help="for JSON, plots and logs (default: bench-out)")
    _add_work(parser.add_argument_group("work"))
    _add_others(parser.add_argument_group("others"))
    return parser


def _add_work(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--base", default="smollm2", help="what to serve (default: smollm2)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--rank", type=int, default=16, help="of adapters, on every linear layer (default: 16)")
    add("--prompt-tokens", type=int, default=128)
    add("--new-tokens", type=int, default=64)
    add("--concurrency", type=int, nargs="+", default=[1, 8, 16, 32], help="clients (default: 1 8 16 32)")
    add("--at", type=int, default=16, help="clients where only one number is measured (default: 16)")
    add("--adapters", type=int, default=16, help="different adapters, for everybody (default: 16)")
    add("--many", type=int, default=64, help="adapters of the Zipf scenario (default: 64)")
    add("--exponent", type=float, default=1.0, help="of the Zipf scenario (default: 1)")
    add("--cycle", type=int, default=100, help="adapters that are cold in turn (default: 100)")
    add("--registered", type=int, default=1000, help="adapters when memory is measured (default: 1000)")
    add("--open-requests", type=int, default=40, help="requests of an open loop and pass (default: 40)")
    add(
        "--load-factors",
        type=float,
        nargs="+",
        default=[0.5, 0.8],
        help="open-loop rates, as parts of our own closed-loop rate in the same run (default: 0.5 0.8)",
    )


def _add_others(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--no-peft", dest="peft", action="store_false", help="leave PEFT out")
    add("--llama-server", type=Path, metavar="PROGRAM", help="measure llama.cpp's server, too")
    add("--llama-cpp", type=Path, metavar="FOLDER", help="llama.cpp's conversion scripts")
    add("--llama-quantize", type=Path, metavar="PROGRAM", help="default: beside llama-server")
    add("--vllm", metavar="PROGRAM", help="measure vLLM, too: its command, or the Python that has it")
