"""The certificates of the listener, and the authorities of its clients' certificates, from files that may change.

`app` makes a `TLS` from its options, `reloader` reloads it when the files change, and `listener` uses its context for
each handshake. The promise: files that cannot be used are one clear error before the broker starts, and change nothing
later, which is logged.
"""

import logging
import ssl
from pathlib import Path

from pgbackend import facts
from pgbackend.errors import ConfigError


class TLS:
    """The server's certificate. Its key may be in the same file, so `key` is optional.

    With `client_ca`, only clients with a certificate of one of those authorities are accepted.
    """

    def __init__(self, cert: Path, key: Path | None = None, client_ca: Path | None = None) -> None:
        """Raises ConfigError if a file cannot be used."""
        self._files = (cert, key, client_ca)
        self.context = _context(*self._files)

    def reload(self) -> None:
        """New connections use the files as they are now. If one cannot be used, nothing changes."""
        try:
            self.context = _context(*self._files)
        except ConfigError as error:
            facts.emit("certificates not reloaded", level=logging.ERROR, error=str(error))
        else:
            facts.emit("certificates reloaded", cert=str(self._files[0]))


def _context(cert: Path, key: Path | None, client_ca: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # For TLS 1.2, Mozilla's "intermediate" list; all ciphers of TLS 1.3 are good.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    _read("certificate", cert)
    if key is not None:
        _read("key", key)
    encrypted = False

    def no_password() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    try:
        # Without a callback, OpenSSL would ask at the terminal.
        context.load_cert_chain(cert, key, no_password)
    except ssl.SSLError as error:
        where = key or cert
        if encrypted:
            raise ConfigError(f"TLS: the key in {where} is encrypted. Decrypt it: openssl pkey -in {where}.") from None
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"TLS: the key in {where} does not match the first certificate in {cert}.") from None
        if key is None and _has_certificate(cert):
            raise ConfigError(f"TLS: {cert} has no private key. Give one with --tls-key.") from None
        culprit, what = (cert, "certificate") if not _has_certificate(cert) else (where, "private key")
        raise ConfigError(f"TLS: {culprit} has no {what} in PEM form{_reason(error)}.") from None
    if client_ca is not None:
        _read("client CA", client_ca)
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise ConfigError(
                f"TLS: the client CA {client_ca} has no certificate in PEM form{_reason(error)}."
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _read(what: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS: the {what} {path} cannot be read: {error.strerror}.") from None


def _reason(error: ssl.SSLError) -> str:
    # Without a reason, the error's text is a line of OpenSSL's source.
    return f" ({error.reason})" if error.reason else ""


def _has_certificate(path: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        return False
    return True
