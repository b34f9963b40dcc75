"""Files of the disk tier: those that are not to be believed, the key that encrypts them, and their folder."""

import os
import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from clo.kvstore.block_file import PAGE_BYTES, ROOT_BYTES, read_disk_key
from clo.kvstore.disk import root_of
from clo.kvstore.prefix import chain
from clo.runtime.config import ModelConfig
from clo.runtime.machine import packages
from clo.runtime.model.files import resolve
from clo.runtime.model.fingerprint import fingerprint
from clo.runtime.wire.errors import ConfigError
from tests.disk_cache import (
    FILE_BYTES,
    KEY,
    OTHER,
    PROMPT,
    ROOT,
    SHAPE,
    SIZE,
    Cache,
    cache,
    files,
    names_of,
    plain_and_encrypted,
    rows_of,
)
from tests.faults import WAIT_S

key = plain_and_encrypted


def flip(place: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)

    return damage


def cut(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


DAMAGE = {
    "the version": flip(8),
    "whether it is encrypted": flip(12),
    "the salt": flip(20),
    "the name": flip(50),
    "the root": flip(90),
    "the length": flip(112),
    "the checksum of the block": flip(121),
    "the checksum of the block, its end": flip(151),
    "nothing in the page": flip(2000),
    "the hash of the page": flip(PAGE_BYTES - 1),
    "empty": cut(0),
    "a part of the page": cut(100),
    "the page alone": cut(PAGE_BYTES),
    "all but a byte": cut(FILE_BYTES - 1),
    "a byte too many": lengthen,
    "the first byte of the block": flip(PAGE_BYTES),
    "the last byte of the block": flip(PAGE_BYTES + SHAPE[0] * SHAPE[2] - 1),
    "nothing behind the block": flip(-1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_a_damaged_file_is_a_miss_and_is_written_anew(
    tmp_path: Path, damage: Callable[[Path], None], restart: bool, key: bytes | None
) -> None:
    file = tmp_path / names_of(PROMPT, key)[1]
    running = Cache(tmp_path, key=key)
    assert running.run(PROMPT) == 0
    if restart:
        running.tier.close()
    damage(file)
    if restart:
        running = Cache(tmp_path, key=key)
    else:
        running.evict()
    assert running.run(PROMPT) == 1, "what is behind the damaged one is of no use"
    assert running.tier.unusable == 1
    running.evict()
    assert running.run(PROMPT) == 3
    assert running.tier.unusable == 1
    running.tier.close()
    assert files(tmp_path) == set(names_of(PROMPT, key))


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_a_file_under_the_name_of_another_is_a_miss(tmp_path: Path, restart: bool, key: bytes | None) -> None:
    """It is whole, and of this model and key; but it has the rows of other tokens."""
    running = Cache(tmp_path, key=key)
    running.run(PROMPT)
    running.run(OTHER)
    if restart:
        running.tier.close()
    first, other = (tmp_path / names_of(prompt, key)[0] for prompt in (PROMPT, OTHER))
    first.rename(tmp_path / "aside")
    other.rename(first)
    (tmp_path / "aside").rename(other)
    if restart:
        running = Cache(tmp_path, key=key)
    else:
        running.evict()
    assert running.run(PROMPT) == running.run(OTHER) == 0
    assert running.tier.unusable == 2
    running.evict()
    assert running.run(PROMPT) == running.run(OTHER) == 3
    running.tier.close()


@pytest.mark.parametrize(
    ("written", "read"),
    [(KEY, KEY[::-1]), (None, KEY), (KEY, None)],
    ids=["another key", "a key for plain files", "no key any more"],
)
def test_files_of_another_key_are_removed_and_counted(
    tmp_path: Path, written: bytes | None, read: bytes | None
) -> None:
    with cache(tmp_path, key=written) as one:
        one.run(PROMPT)
    with cache(tmp_path, key=read) as other:
        assert (files(tmp_path), other.tier.blocks, other.tier.unusable) == (set(), 0, 3)
        assert other.run(PROMPT) == 0
    with cache(tmp_path, key=read) as other:
        assert other.run(PROMPT) == 3


def test_encrypted_files_tell_nothing_of_their_blocks(tmp_path: Path, key: bytes | None) -> None:
    """Neither rows, nor names, nor which of them follow each other, nor whether two files have the same."""
    secrets = [ROOT]
    for name in chain(array("i", PROMPT), SIZE):
        secrets += [name, name.hex().encode(), rows_of(name).tobytes()[:16], rows_of(name).tobytes()[-16:]]
    pieces: list[bytes] = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        with cache(folder, key=key) as one:
            one.run(PROMPT)
        paths = [folder / name for name in names_of(PROMPT, key)]
        found = [path.name.encode() + path.read_bytes() for path in paths]
        told = [secret for secret in secrets if any(secret in data for data in found)]
        assert told == ([] if key else secrets)
        for path in paths:
            data = path.read_bytes()[16:]  # behind what all files begin with
            pieces += [data[start : start + 16] for start in range(0, len(data), 16)]
    assert (len(set(pieces)) == len(pieces)) == (key is not None)


def test_files_of_others_are_left_alone(tmp_path: Path, key: bytes | None) -> None:
    """Also where they have a name of a block, or are no files at all."""
    first, second, third = names_of(PROMPT, key)
    away = tmp_path / "away"
    away.write_bytes(b"something")
    folder = tmp_path / "tier"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "x.tmp").write_text("mine, too")
    (folder / second).symlink_to(away)
    with cache(folder, key=key) as one:
        assert one.run(PROMPT) == 0
        one.evict()
        assert one.run(PROMPT) == 1
    os.unlink(folder / second)
    os.mkfifo(folder / second)
    (folder / third).write_text("of somebody")
    with cache(folder, key=key) as one:
        assert one.run(PROMPT) == 1
        one.evict()
        (folder / first).write_bytes(b"of somebody else".ljust(FILE_BYTES))
        assert one.run(PROMPT) == 0
    assert (folder / first).read_bytes().startswith(b"of somebody else")
    assert files(folder) == {"notes.txt", "x.tmp", first, second, third}
    assert away.read_bytes() == b"something"


def test_files_of_another_model_are_removed(tmp_path: Path) -> None:
    with cache(tmp_path) as one:
        one.run(PROMPT)
    with cache(tmp_path, root=ROOT[::-1]) as other:
        assert (files(tmp_path), other.tier.blocks) == (set(), 0)
        assert other.run(PROMPT) == 0


def test_a_root_follows_from_the_model_and_the_layout(tiny_model: Path, smollm2: Path) -> None:
    tiny = resolve(ModelConfig(model=str(tiny_model), device="cpu"))
    said = fingerprint(tiny, "auto", "exact", "1")
    assert said == fingerprint(tiny, "auto", "exact", "1")
    others = [
        fingerprint(tiny, "dense", "exact", "1"),
        fingerprint(tiny, "auto", "exact", "2"),
        fingerprint(tiny, "auto", "sparse", "1"),
        fingerprint(
            resolve(ModelConfig(model=str(tiny_model), device="cpu", dtype="bfloat16")), "auto", "exact", "1"
        ),
        fingerprint(resolve(ModelConfig(model=str(smollm2), device="cpu")), "auto", "exact", "1"),
    ]
    assert len({said, *others}) == 6
    roots = {
        root_of(said, *shape) for shape in [(4, 2, 16, 64), (2, 4, 16, 64), (4, 2, 32, 64), (4, 2, 16, 32)]
    }
    assert len(roots) == 4 and {len(root) for root in roots} == {ROOT_BYTES}


def test_what_is_behind_a_missing_file_is_removed(tmp_path: Path, key: bytes | None) -> None:
    with cache(tmp_path, key=key) as one:
        one.run(PROMPT)
        one.run(OTHER)
    os.unlink(tmp_path / names_of(PROMPT, key)[0])
    (tmp_path / f"{'0' * 32}.tmp").write_bytes(b"CLOKVBLK and what a killed store had come to")
    with cache(tmp_path, key=key) as one:
        assert files(tmp_path) == set(names_of(OTHER, key))
        assert (one.run(PROMPT), one.run(OTHER)) == (0, 3)


def test_two_stores_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        cache(tmp_path),
        pytest.raises(ConfigError, match="is used by another server; give each a folder of its own"),
    ):
        Cache(tmp_path)
    with cache(tmp_path):
        pass


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/numa0", Path("/proc/numa0")):
        with pytest.raises(ConfigError, match=f"--kv-disk: {folder} cannot be used"):
            Cache(folder)


@pytest.mark.parametrize(
    "text",
    [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"],
    ids=["bytes", "digits", "digits as a line"],
)
def test_a_key_is_bytes_or_digits(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "key").write_bytes(text)
    (tmp_path / "key").chmod(0o600)
    assert read_disk_key(tmp_path / "key") == KEY


WRONG_KEYS = {
    "nothing": b"",
    "a byte too few": KEY[:-1],
    "a byte too many": KEY + b"x",
    "a digit too few": KEY.hex()[:-1].encode(),
    "two digits too many": KEY.hex().encode() + b"00",
    "no digits": b"x" * 64,
    "no text": b"\xff" * 64,
}


@pytest.mark.parametrize("text", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_what_is_no_key_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "key").write_bytes(text)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(ConfigError, match=f"^--kv-disk-key: {tmp_path}/key holds no key, which is 32 random"):
        read_disk_key(tmp_path / "key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match=f"^--kv-disk-key: other users can read {tmp_path}/key; take a new"):
        read_disk_key(tmp_path / "key")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    os.chown(tmp_path / "key", 65534, 65534)
    with pytest.raises(ConfigError, match="other users can read"):
        read_disk_key(tmp_path / "key")


def test_a_key_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    for name, what in (
        ("none", "none cannot be read (No such file"),
        ("pipe", "pipe holds no key"),
        ("folder", "folder holds no key"),
    ):
        with pytest.raises(ConfigError, match=f"^--kv-disk-key: {tmp_path}/{re.escape(what)}"):
            read_disk_key(tmp_path / name)


def test_encryption_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else needs it."""
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with cache(tmp_path):
        pass
    with pytest.raises(ConfigError) as error:
        Cache(tmp_path, key=KEY)
    assert str(error.value) == (
        "--kv-disk-key needs the package 'cryptography', which is not installed; run "
        "\"pip install 'clo-llm[encryption]'\", or \"pip install -e '.[encryption]'\" in a clone."
    )
    code = "import sys, clo.kvstore.__main__; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=WAIT_S).returncode == 0
