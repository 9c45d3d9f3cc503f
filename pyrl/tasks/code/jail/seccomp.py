"""A filter of system calls: a list of (call, errno) for the kernel's classic BPF machine.

Denied is what reaches beyond one process: making processes, signals to others, tracing, sockets,
namespaces, mounts, kernel objects whose memory no limit counts. Threads and plain files remain.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from . import kernel

Calls = dict[str, tuple["int | None", "int | None"]]

#: machine → (AUDIT_ARCH of <linux/audit.h>, column of the tables below)
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

#: name → (number on x86_64, number on aarch64); None where that machine has no such call.
DENIED: Calls = {
    # Processes: what runs is one process, and it stays this program.
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # Other processes: signals, memory, descriptors, priorities. `tgkill` to oneself stays.
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # The network; `socketpair` stays.
    "socket": (41, 198),
    # Memory that RLIMIT_AS does not count, and kernel queues.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "io_setup": (206, 0),
    "io_uring_setup": (425, 425), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "vmsplice": (278, 75), "userfaultfd": (323, 282),
    # The machine: namespaces, mounts, handles, tracing, the kernel's own state.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "open_tree_attr": (467, 467), "fsopen": (430, 430),
    "fsmount": (432, 432), "fsconfig": (431, 431), "fspick": (433, 433),
    "mount_setattr": (442, 442), "fanotify_init": (300, 262), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "bpf": (321, 280), "perf_event_open": (298, 241),
    "syslog": (103, 116), "personality": (135, 92), "quotactl": (179, 60),
    "modify_ldt": (154, None),
}  # fmt: skip

#: Denied as well where programs share the user's file system: what changes files …
CHANGES: Calls = {
    "creat": (85, None), "truncate": (76, 45), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "link": (86, None), "linkat": (265, 37),
    "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
#: … and what opens them.
OPENS: Calls = {"open": (2, None), "openat": (257, 56), "openat2": (437, 437)}

#: Their arguments decide.
INSPECTED: Calls = {
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131),
    "prlimit64": (302, 261), "fcntl": (72, 25), "prctl": (157, 167), "ioctl": (16, 29),
}  # fmt: skip
_CLONE_THREAD = 0x00010000
#: With these the kernel signals any process of the same user: F_SETOWN, F_SETSIG, F_SETOWN_EX of
#: fcntl, and FIOSETOWN, SIOCSPGRP, FIOASYNC of ioctl.
_SIGNALLING = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902, 0x5452)}

_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILLED, _ALLOWED, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_FILTER = 2  # SECCOMP_MODE_FILTER


def reason() -> str | None:
    """Why there is no filter on this machine, None where there is one."""
    if os.uname().machine not in ARCHITECTURES:
        return f"the system calls of {os.uname().machine} are not listed here"
    return None


def instructions(pid: int, files: str) -> list[tuple[int, int, int, int]]:
    """The filter for process `pid` as (code, jump if true, jump if false, operand).

    files: "all" leaves files alone, "read" denies every change, "none" denies opening them too.
    """
    architecture, column = ARCHITECTURES[os.uname().machine]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILLED),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if column == 0:  # x32 calls have numbers of their own under the same architecture
        code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILLED)]

    def deny(call: tuple[int | None, int | None], error: int) -> None:
        number = call[column]
        if number is not None:
            code.extend([(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | error)])

    def inspect(call: tuple[int | None, int | None], *body: tuple[int, int, int, int]) -> None:
        number = call[column]
        if number is not None:
            code.append((_EQUAL, 0, len(body), number))
            code.extend(body)

    low, refused, allowed = lambda i: _ARGUMENTS + 8 * i, _ERROR | errno.EPERM, _ALLOWED
    deny(
        INSPECTED["clone3"], errno.ENOSYS
    )  # its flags are out of reach here; the C library then uses clone
    inspect(
        INSPECTED["clone"],
        (_LOAD, 0, 0, low(0)),
        (_BITS, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, refused),
        (_RETURN, 0, 0, allowed),
    )
    for call in (INSPECTED["kill"], INSPECTED["tgkill"]):
        inspect(
            call,
            (_LOAD, 0, 0, low(0)),
            (_EQUAL, 1, 0, pid),
            (_RETURN, 0, 0, refused),
            (_RETURN, 0, 0, allowed),
        )
    inspect(
        INSPECTED["prlimit64"],
        (_LOAD, 0, 0, low(0)),
        (_EQUAL, 2, 0, 0),
        (_EQUAL, 1, 0, pid),
        (_RETURN, 0, 0, refused),
        (_RETURN, 0, 0, allowed),
    )
    for name, commands in _SIGNALLING.items():
        inspect(
            INSPECTED[name],
            (_LOAD, 0, 0, low(1)),
            *((_EQUAL, len(commands) - i, 0, command) for i, command in enumerate(commands)),
            (_RETURN, 0, 0, allowed),
            (_RETURN, 0, 0, refused),
        )
    inspect(
        INSPECTED["prctl"],
        (_LOAD, 0, 0, low(0)),
        (_EQUAL, 0, 1, kernel.PR_SET_PDEATHSIG),
        (_RETURN, 0, 0, refused),
        (_RETURN, 0, 0, allowed),
    )
    for call in DENIED.values():
        deny(call, errno.EPERM)
    if files != "all":
        for call in CHANGES.values():
            deny(call, errno.EROFS)
    if files == "none":
        for call in OPENS.values():
            deny(call, errno.EACCES)
    elif files == "read":
        deny(OPENS["openat2"], errno.ENOSYS)  # its flags are out of reach
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        for name, position in (("open", 1), ("openat", 2)):
            inspect(
                OPENS[name],
                (_LOAD, 0, 0, low(position)),
                (_BITS, 0, 1, writing),
                (_RETURN, 0, 0, _ERROR | errno.EROFS),
                (_RETURN, 0, 0, allowed),
            )
    code.append((_RETURN, 0, 0, allowed))
    return code


def install(pid: int, files: str) -> None:
    """Puts the filter on this process for good. Raises OSError where the kernel has none."""
    code = instructions(pid, files)
    raw = b"".join(struct.pack("=HBBI", *step) for step in code)
    held = ctypes.create_string_buffer(raw, len(raw))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(held)))
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_SECCOMP, _FILTER, ctypes.addressof(head))
