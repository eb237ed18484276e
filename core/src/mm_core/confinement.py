"""What a process gives up for good: for children that read what strangers sent, and for those who start them.

Linux only; elsewhere, and where the system does not let it, each of these does nothing. The system calls that are
refused are refused by a seccomp filter (seccomp(2), bpf: linux/filter.h), on x86-64 and 64-bit ARM.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Mapping

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITIES_3 = 0x20080522
_FILTER_MODE, _ALL_THREADS = 1, 1
_KILL, _ERRNO_EPERM, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06  # of 32 bits, with a constant
_NR, _ARCH, _ARG0 = 0, 4, 16  # offsets in seccomp_data; arguments are of 64 bits, little-endian
_X32 = 0x40000000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_PASSED_ON = (
    "PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR",
)  # fmt: skip

# Calls that make or find a connection, a process, or another process' memory; that change files; and what goes around
# a filter. Of the newer ones the numbers are the same everywhere: pidfd_send_signal, io_uring (3), open_tree,
# move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_open, clone3, openat2, pidfd_getfd, process_madvise,
# mount_setattr, fchmodat2.
_NEWER = frozenset((*range(424, 436), 437, 438, 440, 442, 452))
_REFUSED: Mapping[str, frozenset[int]] = {
    "x86_64": frozenset((
        # socket connect accept bind listen socketpair accept4, clone fork vfork execve execveat
        41, 42, 43, 49, 50, 53, 288, 56, 57, 58, 59, 322,
        # kill tkill rt_sigqueueinfo rt_tgsigqueueinfo, ptrace process_vm_readv process_vm_writev
        62, 200, 129, 297, 101, 310, 311,
        # truncate rename renameat renameat2 mkdir mkdirat rmdir creat link linkat unlink unlinkat symlink symlinkat
        76, 82, 264, 316, 83, 258, 84, 85, 86, 265, 87, 263, 88, 266,
        # chmod fchmodat chown lchown fchownat mknod mknodat, chroot pivot_root mount umount2 unshare setns
        90, 268, 92, 94, 260, 133, 259, 161, 155, 165, 166, 272, 308,
        # init_module finit_module kexec_load add_key request_key keyctl perf_event_open open_by_handle_at bpf
        # userfaultfd
        175, 313, 246, 248, 249, 250, 298, 304, 321, 323,
    )),
    "aarch64": frozenset((
        198, 203, 202, 200, 201, 199, 242, 220, 221, 281,
        129, 130, 138, 240, 117, 270, 271,
        45, 38, 276, 34, 37, 35, 36,
        53, 54, 33, 51, 41, 40, 39, 97, 268,
        105, 273, 104, 217, 218, 219, 241, 265, 280, 282,
    )),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Calls one of whose arguments decides: (open, openat): the flags; (tgkill, prlimit64): the process, at 0
_OPENS = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
_OWN_ONLY = {"x86_64": (234, 302), "aarch64": (131, 261)}
_SECCOMP = {"x86_64": 317, "aarch64": 277}


def child_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a child needs of this process' environment: no keys. Its numeric libraries have one thread."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**kept, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **(more or {})}


def hide() -> None:
    """From here on other processes of the same user cannot read this one's memory, environment and descriptors, nor
    attach to it; it leaves no core dumps, either."""
    _prctl(_PR_SET_DUMPABLE, 0)


def drop_privileges() -> None:
    """No rights are gained from here on, by whatever is executed; root's are given up."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if sys.platform == "linux":
        header = struct.pack("=Ii", _CAPABILITIES_3, 0)
        ctypes.CDLL(None).capset(header, bytes(24))  # none effective, permitted, or inheritable


def limit(**bounds: int) -> None:
    """Lower bounds of resources for good, by their names in `resource` without RLIMIT_."""
    for name, wanted in bounds.items():
        what = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(what)[1]
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(what, (bound, bound))


def refuse_calls() -> bool:
    """From here on, in all threads: no connections, processes or threads, no other process is touched, no file is
    written, removed or renamed. Whether the system does so; call `drop_privileges` first."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _SECCOMP or struct.calcsize("P") != 8:
        return False
    program = _program(machine, os.getpid())
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    call = ctypes.CDLL(None).syscall
    number, mode, flags = (ctypes.c_long(each) for each in (_SECCOMP[machine], _FILTER_MODE, _ALL_THREADS))
    return bool(call(number, mode, flags, ctypes.c_char_p(described)) == 0)


def _program(machine: str, pid: int) -> bytes:
    """Each block looks at one call, and falls through to the next."""
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
        (0x35, 0, 1, _X32),  # at least: another set of numbers, of x86-64 alone
        (_RETURN, 0, 0, _KILL),
    ]
    for number in sorted(_REFUSED[machine] | _NEWER):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO_EPERM)]
    for number, at in _OPENS[machine]:
        code += [
            (_EQUAL, 0, 5, number),
            (_LOAD, 0, 0, _ARG0 + 8 * at),
            (_AND, 0, 0, _WRITES),
            (_EQUAL, 1, 0, 0),
            (_RETURN, 0, 0, _ERRNO_EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    for number in _OWN_ONLY[machine]:
        code += [
            (_EQUAL, 0, 5, number),
            (_LOAD, 0, 0, _ARG0),
            (_EQUAL, 2, 0, 0),
            (_EQUAL, 1, 0, pid),
            (_RETURN, 0, 0, _ERRNO_EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *each) for each in code)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        zero = ctypes.c_ulong(0)
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), zero, zero, zero)
