"""What an address says, in the words of GLIDE."""

from pathlib import Path
from types import ModuleType
from typing import Any

from kvkeep.errors import ConfigError
from kvkeep.tiers.resp_stream import Address, UnixAddress
from kvkeep.tiers.resp_url import RespUrl, TlsFiles

__all__ = ["glide_config"]


def glide_config(glide: ModuleType, url: RespUrl, timeout_s: float) -> object:
    """The configuration of a client, for a cluster or one server; raises ConfigError for TLS files."""
    credentials = None
    if url.password is not None:
        credentials = glide.ServerCredentials(password=url.password, username=url.user)
    timeout_ms = max(1, round(timeout_s * 1000))
    options: dict[str, Any] = {
        "addresses": [_node_address(glide, address) for address in url.addresses],
        "use_tls": url.tls is not None,
        "credentials": credentials,
        "request_timeout": timeout_ms,
        "client_name": url.client_name,
        "protocol": getattr(glide.ProtocolVersion, f"RESP{url.protocol}"),
    }
    advanced = {"connection_timeout": timeout_ms, "tls_config": _tls_config(glide, url.tls)}
    if url.is_cluster:
        return glide.GlideClusterClientConfiguration(
            **options, advanced_config=glide.AdvancedGlideClusterClientConfiguration(**advanced)
        )
    return glide.GlideClientConfiguration(
        **options,
        database_id=url.database,
        advanced_config=glide.AdvancedGlideClientConfiguration(**advanced),
    )


def _node_address(glide: ModuleType, address: Address) -> object:
    if isinstance(address, UnixAddress):
        return glide.NodeAddress(unix_socket_path=address.path)
    return glide.NodeAddress(address.host, address.port)


def _tls_config(glide: ModuleType, files: TlsFiles | None) -> object:
    if files is None:
        return None
    try:
        authorities = None if files.ca_file is None else Path(files.ca_file).read_bytes()
    except OSError as error:
        raise ConfigError(f"ca_file={files.ca_file!r}: {error}; give a file in PEM form") from error
    return glide.TlsAdvancedConfiguration(
        use_insecure_tls=None if files.verifies else True,
        root_pem_cacerts=authorities,
        client_cert_path=files.cert_file,
        client_key_path=files.key_file or files.cert_file,
    )
