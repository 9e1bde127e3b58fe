"""Keys and signatures: the only module that imports PyNaCl. Nothing here is of our own making.

CURVE of ZeroMQ is an X25519 key pair, 32 bytes each; a signing key is Ed25519, its secret the seed of 32 bytes.
"""

from __future__ import annotations

from nacl.exceptions import CryptoError
from nacl.public import PrivateKey
from nacl.signing import SigningKey, VerifyKey

KEY_BYTES = 32
SIGNATURE_BYTES = 64


def new_curve_pair() -> tuple[bytes, bytes]:
    """A public and a secret key for CURVE."""
    key = PrivateKey.generate()
    return bytes(key.public_key), bytes(key)


def curve_public(secret: bytes) -> bytes:
    return bytes(PrivateKey(secret).public_key)


def new_signing_pair() -> tuple[bytes, bytes]:
    """A public and a secret key for signatures."""
    key = SigningKey.generate()
    return bytes(key.verify_key), bytes(key)


def sign(secret: bytes, message: bytes) -> bytes:
    return bytes(SigningKey(secret).sign(message).signature)


def verified(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the signature is of this message by this key."""
    try:
        VerifyKey(public).verify(message, signature)
    except (CryptoError, ValueError, TypeError):
        return False
    return True
