"""What the listener shows over TLS, and whom it lets in: certificates from files, which may change meanwhile.

`app` makes a `TLS` of the files in its settings, and has it read them anew when they are renewed; `listener` takes its
context for each handshake. Files that cannot be used are one clear line before anything is bound; later they change
nothing, and that is told.
"""

import logging
import ssl
from pathlib import Path

from pgbackend import facts
from pgbackend.errors import ConfigError


class TLS:
    """What the server shows, and what clients have to show. `key` may stand in the file of `cert`.

    With `client_ca` only clients with a certificate of one of those authorities get in.
    """

    def __init__(self, cert: Path, key: Path | None = None, client_ca: Path | None = None) -> None:
        """Raises ConfigError for files that cannot be used."""
        self._files = (cert, key, client_ca)
        self.context = _context(*self._files)

    def reload(self) -> None:
        """Connections made from now on get what the files say now. Files that cannot be used change nothing."""
        try:
            self.context = _context(*self._files)
        except ConfigError as error:
            facts.emit("certificates not reloaded", level=logging.ERROR, error=str(error))
        else:
            facts.emit("certificates reloaded", cert=str(self._files[0]))


def _context(cert: Path, key: Path | None, client_ca: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Of TLS 1.2 what Mozilla calls intermediate; those of TLS 1.3 are all good.
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
        # Without a callback OpenSSL would ask the terminal.
        context.load_cert_chain(cert, key, no_password)
    except ssl.SSLError as error:
        where = key or cert
        if encrypted:
            raise ConfigError(f"TLS: the key in {where} is encrypted. Decrypt it: openssl pkey -in {where}.") from None
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"TLS: the key in {where} is not that of the first certificate in {cert}.") from None
        if key is None and _has_certificate(cert):
            raise ConfigError(f"TLS: {cert} has no private key. Give one with --tls-key.") from None
        culprit, what = (cert, "certificate") if not _has_certificate(cert) else (where, "private key")
        raise ConfigError(f"TLS: {culprit} has no {what} in PEM form{_reason(error)}.") from None
    if client_ca is not None:
        _read("client CA", client_ca)
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            said = f"TLS: the client CA {client_ca} has no certificate in PEM form{_reason(error)}."
            raise ConfigError(said) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _read(what: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS: the {what} {path} cannot be read: {error.strerror}.") from None


def _reason(error: ssl.SSLError) -> str:
    # Without one its text is a line of OpenSSL's own source.
    return f" ({error.reason})" if error.reason else ""


def _has_certificate(path: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        return False
    return True
