# SPDX-License-Identifier: Apache-2.0
"""The system calls that Python 3.11 does not wrap: namespaces, mounts, capabilities, seccomp.

Each raises OSError where the kernel (or the container around us) says no.
"""

import ctypes
import os
import platform
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
_PDEATHSIG, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVS, _SECCOMP = 1, 4, 36, 38, 22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, name: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    words = [text.encode() for text in (source, target, kind)]
    flags_, options_ = ctypes.c_ulong(flags), options.encode() or None
    _checked(_libc.mount(*words, flags_, options_), f"mount {target}")


def change_root(folder: str) -> None:
    """Makes the mount `folder` the root and lets go of the old one."""
    os.chdir(folder)
    number = {"x86_64": 155, "aarch64": 41}.get(platform.machine())
    if number is None:
        raise OSError(f"pivot_root on {platform.machine()} is not known here")
    _checked(_libc.syscall(number, b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def _prctl(option: int, *values) -> None:
    words = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in values]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    _checked(_libc.prctl(option, *words), f"prctl {option}")


def die_with_parent() -> None:
    """SIGKILL when the parent ends; set after any change of uid, which clears it."""
    _prctl(_PDEATHSIG, 9)


def hide_memory() -> None:
    """No reading of this process's memory, environment or descriptors by others of its uid."""
    _prctl(_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process."""
    _prctl(_SUBREAPER, 1)


def no_new_privileges() -> None:
    """No set-uid program gives anything from here on."""
    _prctl(_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Empties the effective, permitted and inheritable sets."""
    header = struct.pack("Ii", 0x20080522, 0)
    number = {"x86_64": 126, "aarch64": 91}.get(platform.machine())
    if number is not None:
        _checked(_libc.syscall(number, header, bytes(24)), "capset")


# Denied calls: (x86_64, aarch64) numbers, None where the machine has no such call.
_DENIED = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118),
    # Landlock does not cover these: files of the same user would be open to them.
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "truncate": (76, 45),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "seccomp": (317, 277),
}
# clone without CLONE_THREAD is a new process; clone3 hides its flags, so "no such call" makes the C
# library fall back on clone. tgkill is how a program aborts: allowed within its own process alone.
# prlimit64 is for its own limits alone.
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = (56, 220), 435, (234, 131), (302, 261)
_CLONE_THREAD = 0x00010000
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
_ARCHITECTURE = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


def _statement(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, k)


def seccomp_program(machine: str, pid: int) -> bytes:
    """The filter as classic BPF for a machine; `pid` may signal its own threads only."""
    architecture, column = _ARCHITECTURE[machine]
    load, equal, ret, any_bit, at_least = 0x20, 0x15, 0x06, 0x45, 0x35
    deny, allow = _statement(ret, _EPERM), _statement(ret, _ALLOW)
    parts = [
        _statement(load, 4),  # another machine's calls (32 bit on 64) have other numbers
        _statement(equal, architecture, 1, 0),
        deny,
        _statement(load, 0),
    ]
    if machine == "x86_64":  # x32's numbers
        parts += [_statement(at_least, 0x40000000, 0, 1), deny]
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            parts += [_statement(equal, numbers[column], 0, 1), deny]
    parts += [_statement(equal, _CLONE3, 0, 1), _statement(ret, _ENOSYS)]
    # The low 32 bits of the first argument stand at offset 16 of seccomp_data.
    parts += [
        _statement(equal, _CLONE[column], 0, 4),
        _statement(load, 16),
        _statement(any_bit, _CLONE_THREAD, 1, 0),
        deny,
        allow,
        _statement(equal, _TGKILL[column], 0, 4),
        _statement(load, 16),
        _statement(equal, pid, 1, 0),
        deny,
        allow,
        _statement(equal, _PRLIMIT[column], 0, 4),
        _statement(load, 16),
        _statement(equal, 0, 1, 0),
        deny,
        allow,
        allow,
    ]
    return b"".join(parts)


def filter_calls() -> None:
    """Installs the filter on this process for good; needs `no_new_privileges` before."""
    if platform.machine() not in _ARCHITECTURE or os.uname().sysname != "Linux":
        raise OSError(f"no table of system calls for {platform.machine()}")
    program = seccomp_program(platform.machine(), os.getpid())
    held = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held))
    _prctl(_SECCOMP, 2, ctypes.create_string_buffer(fprog, len(fprog)))


_LANDLOCK_READ = (1 << 2) | (1 << 3)  # read a file, list a folder
_LANDLOCK_SCOPES = 0b11  # abstract sockets, signals to others


def fence_files(readable: list[str], writable: list[str]) -> None:
    """Landlock: reads under `readable` alone, all but execution under `writable`."""
    version = _checked(_libc.syscall(444, None, ctypes.c_size_t(0), 1), "landlock")
    every = (1 << 12 + min(version, 3)) - 1  # 13 rights at first, then moving, then truncating
    words = struct.pack("QQQ", every, 0, _LANDLOCK_SCOPES)[: 24 if version >= 6 else 8]
    rules = ctypes.create_string_buffer(words, len(words))
    ruleset = _checked(_libc.syscall(444, rules, ctypes.c_size_t(len(words)), 0), "landlock")
    try:
        for paths, rights in ((readable, _LANDLOCK_READ), (writable, every & ~1)):
            for path in paths:
                _landlock_allow(ruleset, path, rights)
        _checked(_libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _landlock_allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # nothing there, nothing to allow
    try:
        folder = os.path.isdir(path)
        rule = struct.pack("=Qi", rights if folder else rights & 0b110, fd)
        held = ctypes.create_string_buffer(rule, len(rule))
        _checked(_libc.syscall(445, ruleset, 1, held, 0), "landlock_add_rule")
    finally:
        os.close(fd)
