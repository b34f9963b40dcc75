"""The files of the disk tier: what one of them says, how it is believed, and how nobody else can read it.

One file is one block: a page of 4096 bytes, then the block's bytes in the order
[layer][kv_head][token][K|V][head_dim], then zeros up to the next multiple of 4096. Integers are
little-endian; the page has

======  =====  =========================================================================
offset  bytes  field
======  =====  =========================================================================
     0      8  ``CLOKVBLK``
     8      4  version of this format: 2
    12      4  1 where the file is encrypted, 0 where it is not
    16     32  salt of an encrypted file, zeros in others
    48     16  name of the block (``clo.kvstore.prefix``)
    64     16  name of the block before it in its prompt, zeros for the first one
    80     32  root: a hash of the model, of what else decides about rows, and of the layout
   112      8  bytes of the block
   120     32  BLAKE2b of bytes 0 to 119 of this page and of the CRC-32 (4 bytes) of each 2**18
               bytes behind it; in an encrypted file the 16 bytes of their tag, and zeros
   152   3928  zeros
  4080     16  BLAKE2b of bytes 0 to 4079 of this page; in an encrypted file their tag
======  =====  =========================================================================

and the file is called by the name in hexadecimal digits and ``.kv``. Against a disk that makes mistakes a
CRC does, in less than half the time of BLAKE2b; and who may write files may write their hashes, too.

A name is a hash of tokens, against which anybody can test a guess of a prompt. So an encrypted file is called
by a hash of the name under the key, and all but the first 48 bytes of it are encrypted. What it still shows
is its size, which is that of all the others, and when it was written and used.

An encrypted file has a key of its own, derived from the key of ``--kv-disk-key`` and from its salt by
HKDF-SHA256 (RFC 5869). With that key AES-256-GCM is used twice: with nonce 0 for the page, whose first 48
bytes are authenticated with it, and with nonce 1 for what is behind it. So no nonce is used again unless two
files have the same 32 random bytes. To draw 96 bits for each file instead would allow 2**32 files for one key
(NIST SP 800-38D, section 8.3), which somebody would have to count over all servers that were ever given it.
"""

import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clo.kvstore.prefix import NAME_BYTES
from clo.runtime.machine.packages import need
from clo.runtime.wire.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
    from cryptography.hazmat.primitives.ciphers.modes import GCM

VERSION = 2
PAGE_BYTES = 4096
ROOT_BYTES, KEY_BYTES = 32, 32
SUFFIX = ".kv"

_MAGIC = b"CLOKVBLK"
_HEAD = struct.Struct("<8sII32s")
_FIELDS = struct.Struct("<16s16s32sQ")
_FIELDS_END = _HEAD.size + _FIELDS.size
_PLAIN, _ENCRYPTED = 0, 1
_DIGEST_BYTES, _TAG_BYTES = 32, 16
_PAGE_NONCE, _BLOCK_NONCE = bytes(12), bytes(11) + b"\1"
_PIECE = 2**18  # bytes with a CRC of their own, or encrypted at a time; a core's cache holds them

Buffer = NDArray[np.uint8]


class Foreign(Exception):
    """A file that is not of this tier."""


class Unusable(Exception):
    """A file of this tier that is damaged, or of another version, root or key."""


class Fields(NamedTuple):
    """What a file says of its block: its name, and that of the block before it."""

    name: bytes
    parent: bytes


class BlockFiles:
    """The files of one store, not encrypted.

    Args:
        root: ``ROOT_BYTES`` that differ where the rows of equal names might.
        block_bytes: of one block.

    Attributes:
        file_bytes: of one file.
    """

    _kind = _PLAIN

    def __init__(self, root: bytes, block_bytes: int) -> None:
        self._root, self._block_bytes = root, block_bytes
        self.file_bytes = PAGE_BYTES + -(-block_bytes // PAGE_BYTES) * PAGE_BYTES

    def file(self, name: bytes) -> str:
        """What the file of a block is called."""
        return name.hex() + SUFFIX

    def block(self, buffer: Buffer) -> Buffer:
        """The block in the bytes of a whole file."""
        return buffer[PAGE_BYTES : PAGE_BYTES + self._block_bytes]

    def seal(self, fields: Fields, buffer: Buffer) -> None:
        """Make a file of a buffer of ``file_bytes`` whose ``block`` is filled."""
        buffer[PAGE_BYTES + self._block_bytes :] = 0
        salt = self._salt()
        head = _HEAD.pack(_MAGIC, VERSION, self._kind, salt)
        text = _FIELDS.pack(*fields, self._root, self._block_bytes)
        text += self._seal_block(salt, head + text, buffer[PAGE_BYTES:])
        text = text.ljust(PAGE_BYTES - _TAG_BYTES - len(head), b"\0")
        buffer[:PAGE_BYTES] = np.frombuffer(head + self._seal_page(salt, head, text), np.uint8)

    def page(self, file: str, buffer: Buffer, size: int) -> Fields:
        """What the page at the beginning of a buffer says, in a file of ``size`` bytes with that name.

        Raises:
            Foreign, Unusable: it is not to be used.
        """
        return self._fields(file, self._page(file, buffer, size))

    def open(self, file: str, buffer: Buffer) -> None:
        """Have the ``block`` of a whole file in its buffer, once it is found to be what was written.

        Raises:
            Foreign, Unusable: it is not.
        """
        page = self._page(file, buffer, len(buffer))
        self._fields(file, page)
        if not self._open_block(page, buffer[PAGE_BYTES:]):
            raise Unusable(f"{file} is damaged.")

    def _page(self, file: str, buffer: Buffer, size: int) -> bytes:
        """The page as it was before it was sealed."""
        page = buffer[:PAGE_BYTES].tobytes()
        begun = page[: min(size, len(_MAGIC))]
        if not _MAGIC.startswith(begun):
            raise Foreign
        if size != self.file_bytes:
            raise Unusable(f"{file} has {size} bytes instead of {self.file_bytes}.")
        _, version, kind, salt = _HEAD.unpack_from(page)
        if version != VERSION:
            raise Unusable(f"{file} has version {version} of the format instead of {VERSION}.")
        if kind != self._kind:
            raise Unusable(f"{file} is {'' if kind == _ENCRYPTED else 'not '}encrypted.")
        head, text = page[: _HEAD.size], self._open_page(salt, page[: _HEAD.size], page[_HEAD.size :])
        if text is None:
            raise Unusable(f"{file} is damaged{' or of another key' if kind == _ENCRYPTED else ''}.")
        return head + text

    def _fields(self, file: str, page: bytes) -> Fields:
        name, parent, root, count = _FIELDS.unpack_from(page, _HEAD.size)
        if root != self._root:
            raise Unusable(f"{file} is of another model.")
        if self.file(name) != file or count != self._block_bytes:
            raise Unusable(f"{file} is of another block.")
        return Fields(name, parent)

    # ------------------------------------------------------------------------ with a key these differ

    def _salt(self) -> bytes:
        return bytes(KEY_BYTES)

    def _seal_block(self, salt: bytes, page: bytes, block: Buffer) -> bytes:
        """What the page says of all behind it."""
        checks = (zlib.crc32(piece.data).to_bytes(4, "little") for piece in _pieces(block))
        return hashlib.blake2b(page + b"".join(checks), digest_size=_DIGEST_BYTES).digest()

    def _open_block(self, page: bytes, block: Buffer) -> bool:
        """Whether it says so of that."""
        said = page[_FIELDS_END : _FIELDS_END + _DIGEST_BYTES]
        return self._seal_block(b"", page[:_FIELDS_END], block) == said

    def _seal_page(self, salt: bytes, head: bytes, text: bytes) -> bytes:
        """The rest of a page behind its head."""
        return text + hashlib.blake2b(head + text, digest_size=_TAG_BYTES).digest()

    def _open_page(self, salt: bytes, head: bytes, sealed: bytes) -> bytes | None:
        text = sealed[:-_TAG_BYTES]
        return text if self._seal_page(salt, head, text) == sealed else None


class EncryptedBlockFiles(BlockFiles):
    """The same, encrypted.

    Args:
        root, block_bytes: see ``BlockFiles``.
        key: ``KEY_BYTES`` that nobody else knows.

    Raises:
        ConfigError: the package for it is missing.
    """

    _kind = _ENCRYPTED

    def __init__(self, root: bytes, block_bytes: int, key: bytes) -> None:
        super().__init__(root, block_bytes)
        need("--kv-disk-key", "encryption", {"cryptography": "cryptography"})
        self._key = key
        self._names = self._derive(None, b"clo kv-disk names")

    def file(self, name: bytes) -> str:
        return hashlib.blake2b(name, key=self._names, digest_size=NAME_BYTES).hexdigest() + SUFFIX

    def _salt(self) -> bytes:
        return os.urandom(KEY_BYTES)

    def _seal_block(self, salt: bytes, page: bytes, block: Buffer) -> bytes:
        cipher = self._cipher(salt, _BLOCK_NONCE).encryptor()
        _pass_through(cipher, block)
        cipher.finalize()
        tag: bytes = cipher.tag
        return tag

    def _open_block(self, page: bytes, block: Buffer) -> bool:
        from cryptography.exceptions import InvalidTag

        _, _, _, salt = _HEAD.unpack_from(page)
        cipher = self._cipher(salt, _BLOCK_NONCE).decryptor()
        _pass_through(cipher, block)
        try:
            cipher.finalize_with_tag(page[_FIELDS_END : _FIELDS_END + _TAG_BYTES])
        except InvalidTag:
            return False
        return True

    def _seal_page(self, salt: bytes, head: bytes, text: bytes) -> bytes:
        cipher = self._cipher(salt, _PAGE_NONCE).encryptor()
        cipher.authenticate_additional_data(head)
        sealed: bytes = cipher.update(text) + cipher.finalize() + cipher.tag
        return sealed

    def _open_page(self, salt: bytes, head: bytes, sealed: bytes) -> bytes | None:
        from cryptography.exceptions import InvalidTag

        cipher = self._cipher(salt, _PAGE_NONCE).decryptor()
        cipher.authenticate_additional_data(head)
        text: bytes = cipher.update(sealed[:-_TAG_BYTES])
        try:
            cipher.finalize_with_tag(sealed[-_TAG_BYTES:])
        except InvalidTag:
            return None
        return text

    def _derive(self, salt: bytes | None, purpose: bytes) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        key: bytes = HKDF(SHA256(), KEY_BYTES, salt, purpose).derive(self._key)
        return key

    def _cipher(self, salt: bytes, nonce: bytes) -> "Cipher[GCM]":
        """AES-256-GCM under the key of the file with this salt."""
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES256
        from cryptography.hazmat.primitives.ciphers.modes import GCM

        return Cipher(AES256(self._derive(salt, b"clo kv-disk file")), GCM(nonce))


def _pieces(data: Buffer) -> Iterator[Buffer]:
    return (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))


def _pass_through(cipher: "CipherContext", data: Buffer) -> None:
    """Encrypt or decrypt in place."""
    for piece in _pieces(data):
        piece[:] = np.frombuffer(cipher.update(piece.data), np.uint8)


def read_disk_key(file: Path) -> bytes:
    """The key in a file: ``KEY_BYTES``, as they are or in hexadecimal digits.

    Raises:
        ConfigError: it cannot be read, others can read it, or it holds something else.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # no waiting for a pipe
        try:
            found, data = os.fstat(descriptor), b""
            if stat.S_ISREG(found.st_mode):
                data = os.read(descriptor, 4 * KEY_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"--kv-disk-key: {file} cannot be read ({error.strerror}).") from None
    if found.st_mode & 0o077 or found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"--kv-disk-key: other users can read {file}; take a new key, in a file of mode 600 that is this "
            "user's."
        )
    if len(data) == KEY_BYTES:
        return data
    with suppress(ValueError):  # no hexadecimal digits
        if len(key := bytes.fromhex(data.decode())) == KEY_BYTES:
            return key
    raise ConfigError(
        f"--kv-disk-key: {file} holds no key, which is {KEY_BYTES} random bytes or {2 * KEY_BYTES} "
        f"hexadecimal digits; 'openssl rand -hex {KEY_BYTES}' prints one."
    )
