"""`quickchange info`: what a server serves and how full it is. Knows no gRPC."""

import argparse
from typing import TYPE_CHECKING

from quickchange.commands.options import add_command, add_json_option, add_server_options, open_client
from quickchange.commands.output import print_facts, print_json, size
from quickchange.server_facts import ServerInfo

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers

_EXAMPLES = """\
  quickchange info
  quickchange info --server 10.0.0.5:50051 --json"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "info", "show what a server serves and how full it is", _EXAMPLES)
    add_json_option(parser)
    add_server_options(parser)


def run(args: argparse.Namespace) -> int:
    with open_client(args) as client:
        info = client.server_info()
    if args.json:
        print_json(info)
    else:
        print_facts(_facts(info))
    return 0


def _merged(info: ServerInfo) -> dict[str, str]:
    """Nothing of a bare base."""
    if info.merged is None:
        return {}
    adapter = info.merged.adapter
    label = f"{adapter.name}@{adapter.version}" if adapter.version else adapter.name
    note = "" if info.merged.into == "dequantized" else ", which is not quite the live adapter"
    return {
        "merged": f"{label} ({adapter.digest}), {info.merged.into}{note}",
        "bare base": info.merged.bare_base_fingerprint,
    }


def _facts(info: ServerInfo) -> dict[str, str]:
    limits, now, steps = info.limits, info.capacity, info.steps
    return {
        "base": f"{info.base_model} ({info.quantization}, {info.dtype} on {info.device})",
        "fingerprint": info.base_fingerprint,
        **_merged(info),
        "version": info.version,
        "context": f"{limits.max_context_tokens} tokens; a prompt up to {_most(limits.max_prompt_tokens)}, "
        f"an answer up to {_most(limits.max_new_tokens)}, {limits.max_answers} answers to a request",
        "requests": f"{now.requests_running} of {limits.max_running_requests} running, "
        f"{now.requests_waiting} of {limits.max_waiting_requests} waiting",
        "cache": f"{now.kv_tokens_free} of {now.kv_tokens_total} tokens free",
        "adapters": f"{size(now.adapter_device_bytes_used)} of {size(now.adapter_device_bytes_total)} on the "
        f"device, {size(now.adapter_host_bytes_used)} of {size(now.adapter_host_bytes_total)} on the host; "
        f"rank up to {limits.max_adapter_rank}, {size(limits.max_upload_bytes)} per upload",
        "steps": f"{steps.steps}, of which {steps.mixed_steps} mixed adapters "
        f"(up to {steps.max_adapters_in_step} at once); {steps.tokens_computed} tokens",
    }


def _most(tokens: int | None) -> str:
    return "all of it" if tokens is None else str(tokens)
