"""Settings: their sources, their ranges, and errors that say what to correct."""

import dataclasses
from pathlib import Path

import pytest

from server.config import GIB, MIB, BaseSettings, EngineSettings, ServerSettings
from server.setting_sources import SettingsError, all_settings, settings_from


def test_defaults_need_nothing_but_a_base() -> None:
    settings = settings_from({"base": "smollm2"}, {})
    assert settings == ServerSettings(base=BaseSettings(source="smollm2"))
    assert (settings.grpc.host, settings.grpc.port) == ("127.0.0.1", 50051)
    assert (settings.metrics.host, settings.metrics.port) == ("127.0.0.1", 9464)


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("[engine]\nmax_running_requests = 2\nmax_waiting_requests = 3\nblock_tokens = 8\n")
    environ = {"QUICKCHANGE_ENGINE_MAX_WAITING_REQUESTS": "4", "QUICKCHANGE_ENGINE_BLOCK_TOKENS": "32"}
    settings = settings_from({"base": "b", "block_tokens": 64}, environ, file)
    assert settings.engine.max_running_requests == 2
    assert settings.engine.max_waiting_requests == 4
    assert settings.engine.block_tokens == 64
    assert settings.engine.max_batch_tokens == EngineSettings().max_batch_tokens


def test_a_step_has_room_for_every_running_request() -> None:
    assert EngineSettings().batch_tokens_on("cpu") == 128
    assert EngineSettings().batch_tokens_on("cuda") == 2048
    assert EngineSettings(max_running_requests=300).batch_tokens_on("cpu") == 300
    assert EngineSettings(max_batch_tokens=40).batch_tokens_on("cpu") == 40


def test_every_setting_can_come_from_every_source(tmp_path: Path) -> None:
    """Nobody has to remember to wire a new setting."""
    values = {"quantization": "none", "dtype": "float32", "device": "cpu", "host": "::1", "root": "/r"}
    values |= {"source": "s", "cache_dir": "/c", "cache": "/k", "kernels": "torch"}
    values |= {"max_batch_tokens": "64"}
    values |= {
        "fused_layers": "off",
        "screened_head": "off",
        "prefix_cache": "off",
        "matmul_precision": "medium",
    }
    values |= {"adapter_eviction": "lru", "merged": "sql", "merged_into": "requantized"}
    values |= {"lora_info_gauge": "on"}
    values |= {"log_format": "json", "otlp_endpoint": "http://collector:4317"}
    values |= {"tokens": "/tokens", "insecure_open": "on", "audit_log": "/audit"}
    values |= {"cert": "/cert", "key": "/key", "client_ca": "/ca"}
    pair = {"tls.cert": "/other", "tls.key": "/other"}
    companions = {"tls.cert": pair, "tls.key": pair, "tls.client_ca": pair}  # no use without each other
    for setting in all_settings():
        section, name = setting.path.split(".")
        # Half the default stays within every range and every rule between fields.
        value = values.get(
            name, str(int(setting.default) // 2 if isinstance(setting.default, int | float) else 8)
        )
        file = tmp_path / f"{setting.path}.toml"
        quoted = value if value.isdigit() else f'"{value}"'
        file.write_text(f"[{section}]\n{name} = {quoted}\n")
        base = {} if setting.path == "base.source" else {"base": "b"}
        base |= {
            path: value for path, value in companions.get(setting.path, {}).items() if path != setting.path
        }
        variable = f"QUICKCHANGE_{section}_{name}".upper()
        by_flag = settings_from(base | {setting.path: value}, {})
        by_environment = settings_from(base, {variable: value})
        by_file = settings_from(base, {}, file)
        assert by_flag == by_environment == by_file
        seen = getattr(getattr(by_flag, section), name)
        assert str(seen) in (value, f"{value}.0")
        assert seen != setting.default


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"tls_cert": "/c"}, "tls.key is not set: give the private key of /c"),
        ({"tls_key": "/k"}, "tls.cert is not set: give the certificate that /k belongs to"),
        ({"tls_client_ca": "/a"}, "tls.cert is not set: clients' certificates need the server to have one"),
    ],
)
def test_a_certificate_and_its_key_are_given_together(given: dict[str, object], missing: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings_from({"base": "b"} | given, {})
    assert missing in str(refused.value)


def test_the_shared_cache_variable_is_heeded() -> None:
    assert settings_from({"base": "b"}, {"QUICKCHANGE_CACHE": "/big"}).base.cache_dir == Path("/big")


def test_variables_of_others_are_left_alone() -> None:
    environ = {"QUICKCHANGE_SERVER": "x:1", "QUICKCHANGE_TOKEN": "t", "PATH": "/bin"}
    assert settings_from({"base": "b"}, environ) == settings_from({"base": "b"}, {})


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("512MiB", 512 * MIB), ("2 GiB", 2 * GIB), ("4KiB", 4096)]
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    assert settings_from({"base": "b", "kv_bytes": text}, {}).engine.kv_bytes == size


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({}, {}, "base.source is not set: give --base, QUICKCHANGE_BASE_SOURCE or source under [base]"),
        ({"port": "70000"}, {}, "grpc.port is 70000, must be 0 to 65535 (--port)"),
        ({"metrics_port": -1}, {}, "metrics.port is -1, must be 0 to 65535 (--metrics-port)"),
        (
            {"quantization": "int8"},
            {},
            "base.quantization is 'int8', must be one of nf4, none (--quantization)",
        ),
        (
            {},
            {"QUICKCHANGE_ENGINE_THREADS": "many"},
            "engine.threads is 'many', must be a whole number, or a size such as 512MiB "
            "(QUICKCHANGE_ENGINE_THREADS)",
        ),
        ({}, {"QUICKCHANGE_ENGINE_THREADZ": "2"}, "QUICKCHANGE_ENGINE_THREADZ=2: no such setting"),
        ({"threadz": 2}, {}, "--threadz=2: no such setting"),
        (
            {"prefill_chunk_tokens": 1024, "max_batch_tokens": 512},
            {},
            "engine.prefill_chunk_tokens is 1024, must not exceed max_batch_tokens (512) "
            "(--prefill-chunk-tokens)",
        ),
        ({"drain_grace_s": "nan"}, {}, "grpc.drain_grace_s is nan, must be 0 to 86400 (--drain-grace-s)"),
        ({"drain_grace_s": "soon"}, {}, "grpc.drain_grace_s is 'soon', must be a number (--drain-grace-s)"),
        ({"threads": True}, {}, "engine.threads is True, must be a whole number"),
        ({"host": ""}, {}, "grpc.host is '', must be a text that is not empty (--host)"),
    ],
)
def test_errors_name_setting_value_and_source(
    flags: dict[str, object], environ: dict[str, str], message: str
) -> None:
    base = {} if "base.source" in message else {"base": "b"}
    with pytest.raises(SettingsError) as caught:
        settings_from(base | flags, environ)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engine]\nthreads = 'x'", "engine.threads is 'x', must be a whole number"),
        ("[engine]\nthreads = 0", "engine.threads is 0, must be 1 to 1024"),
        ("[engine]\nthread = 1", "engine.thread = 1 in"),
        ("[motor]\nthreads = 1", "[motor] in"),
        ("threads = 1", "[threads] in"),
        ("[engine", "--config"),
    ],
)
def test_errors_of_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        settings_from({"base": "b"}, {}, file)
    assert str(caught.value).startswith(message)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot be read: No such file"):
        settings_from({"base": "b"}, {}, tmp_path / "none.toml")


def test_settings_cannot_be_changed_after_construction() -> None:
    settings = settings_from({"base": "b"}, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.engine.threads = 3  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize("url", ["s3://bucket/store", "file:///store", "memory://"])
def test_a_store_may_be_a_url_with_a_folder_for_copies(url: str, tmp_path: Path) -> None:
    flags = {"base": "smollm2", "store": url}
    settings = settings_from(flags | {"store_cache": str(tmp_path), "store_refresh_s": "5"}, {})
    assert (settings.store.root, settings.store.cache, settings.store.refresh_s) == (url, tmp_path, 5.0)
    with pytest.raises(SettingsError, match=f"store.cache is not set: give a folder for copies of {url}"):
        settings_from(flags, {})
    with pytest.raises(SettingsError, match=r"store.gc_interval_s is 60.0, but .* is changed elsewhere"):
        settings_from(flags | {"store_cache": str(tmp_path), "gc_interval_s": "60"}, {})
    with pytest.raises(SettingsError, match="must be a folder of this machine"):
        settings_from(flags | {"store_cache": url}, {})
