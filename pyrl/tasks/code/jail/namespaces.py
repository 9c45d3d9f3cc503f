"""Namespaces of one program: users, processes, mounts, network, IPC; a root with no file of anyone.

The new root is a read-only tmpfs that holds the interpreter's library and the shared libraries
(bound, read-only, without installed packages) and an empty /tmp of limited size. There is no /proc,
no /dev and no /etc: nothing leads to another process, a device or a setting.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sys

from . import kernel

#: Always there, never in the way of a source: the place where the new root is put together.
_BUILD = "/proc"
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store")
_FLAGS = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
)
#: Users from here on are nobody's on the machine; see `_map_users`.
FIRST_USER, USERS = 0x40000000, 0x20000000


def enter() -> bool:
    """Moves this process into new namespaces (its next child is the first process of them).

    True where a program can be given a user of its own (1): then RLIMIT_NPROC counts its
    processes, and nothing of the real user's is its own. A child of ours that stays outside writes
    the map of users, which takes the privileges of the namespace above.
    """
    asked, told = os.pipe(), os.pipe()
    writer = os.fork()
    if writer == 0:
        kernel.die_with_parent()
        ready = os.read(asked[0], 1)
        wide = _map_users(os.getppid()) if ready == b"?" else False
        os.write(told[1], b"2" if wide else b"1")
        os._exit(0)
    for end in (asked[0], told[1]):
        os.close(end)
    try:
        kernel.unshare(_FLAGS)
        os.write(asked[1], b"?")
    finally:
        os.close(asked[1])
        answer = os.read(told[0], 1)
        os.close(told[0])
        os.waitpid(writer, 0)
    if not answer:
        raise OSError("the map of users could not be written")
    build_root()
    return answer == b"2"


def _map_users(pid: int) -> bool:
    """Writes the maps of process `pid`: 0 is oneself and, where this process may say so (True), 1
    is a user that the machine has no other use for."""
    other = another_user()
    try:
        _write(f"/proc/{pid}/gid_map", f"0 {os.getegid()} 1\n1 {other} 1\n")
    except OSError:
        pass
    else:
        _write(f"/proc/{pid}/uid_map", f"0 {os.geteuid()} 1\n1 {other} 1\n")
        return True
    _write(f"/proc/{pid}/setgroups", "deny")
    _write(f"/proc/{pid}/gid_map", f"0 {os.getegid()} 1\n")
    _write(f"/proc/{pid}/uid_map", f"0 {os.geteuid()} 1\n")
    return False


def _write(path: str, text: str) -> None:
    """In one call, as these files need it."""
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def build_root() -> None:
    """Puts the new root together and enters it."""
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    safe = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("root", _BUILD, "tmpfs", safe, "size=1m,mode=755")
    for folder in folders(sys.path):
        target = _BUILD + folder
        if os.path.islink(folder):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(folder), target)
            continue
        os.makedirs(target, exist_ok=True)
        kernel.mount(folder, target, "", kernel.MS_BIND | kernel.MS_REC)
        for hidden in packages(target):
            kernel.mount("none", hidden, "tmpfs", safe | kernel.MS_RDONLY, "size=4k,mode=755")
        found = os.statvfs(target).f_flag & (kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
        kernel.mount(
            "none", target, "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | found
        )
    os.makedirs(_BUILD + "/tmp", exist_ok=True)
    kernel.mount("none", _BUILD, "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | safe)
    kernel.pivot_root(_BUILD)


def folders(library: list[str]) -> list[str]:
    """What a running interpreter may still load, none inside another.

    library: the folders of the standard library.
    """
    wanted = [*_LIBRARIES, *library]
    wanted += [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
    kept: list[str] = []
    for folder in sorted(set(wanted)):
        if os.path.isdir(folder) and not any(folder.startswith(k + "/") for k in kept):
            kept.append(folder)
    return kept


def packages(folder: str) -> list[str]:
    """Folders of installed packages under a library folder: this package's reference solutions
    may be in one of them."""
    found: list[str] = []
    for name in ("site-packages", "dist-packages"):
        for pattern in (name, f"python*/{name}"):
            found += [p for p in glob.glob(f"{folder}/{pattern}") if os.path.isdir(p)]
    return [p for p in found if not os.path.islink(p)]


def fresh_tmp(size: int) -> None:
    """An empty /tmp of `size` bytes in place of what a program left there."""
    os.chdir("/")
    with contextlib.suppress(OSError):  # the first one
        kernel.unmount("/tmp")
    kernel.mount(
        "tmp",
        "/tmp",
        "tmpfs",
        kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC,
        f"size={size},nr_inodes=1024,mode=1777",
    )
    os.chdir("/tmp")


def another_user() -> int:
    """The id of a user that the machine has no other use for."""
    return FIRST_USER + int.from_bytes(os.urandom(4), "little") % USERS
