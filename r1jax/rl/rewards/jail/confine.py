# SPDX-License-Identifier: Apache-2.0
"""The layers of the fence: what the warden sets up once, and what each program is put into.

Every layer is tried on its own; one that the kernel or the container refuses is reported with the
reason and the rest stand. Layers: `user` (namespace), `network` `ipc` `files` `pid` (namespaces),
`uid` (another user id), `seccomp`, `landlock`.
"""

import contextlib
import math
import os
import resource
import signal
import time

from jail import kernel

LAYERS = ("user", "network", "ipc", "files", "pid", "uid", "seccomp", "landlock")
FIRST_UID = 0x70000000  # far from any real user; the supervisor's pid is added
STDLIB = os.path.dirname(os.path.realpath(os.__file__))
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_SWEEP_SECONDS = 5.0
_SWEEPERS = 20


def attempt(action, *arguments) -> str:
    """Why the action did not succeed, "" if it did."""
    try:
        action(*arguments)
    except OSError as error:
        return str(error) or type(error).__name__
    return ""


def probe(action, *arguments) -> str:
    """The same in a child, so that nothing of it stays with this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, attempt(action, *arguments).encode()[:4096] or b"\0")
        os._exit(0)
    os.close(writer)
    answer = os.read(reader, 4096)
    os.close(reader)
    os.waitpid(pid, 0)
    return "the attempt died" if not answer else answer.strip(b"\0").decode()


def settle(home: str, without: set[str]) -> dict[str, str]:
    """Puts the warden itself behind the fence.

    Args:
      home: an empty folder of our own, where the new root is mounted.
      without: layers to leave out (for tests of the others).

    Returns:
      layer → "" where it stands, else the reason why not.
    """
    missing = dict.fromkeys(without, "left out")
    if "user" not in missing:
        missing["user"] = "not needed" if not _namespaces_refused() else attempt(_own_user)
    for layer, flag in (("network", kernel.CLONE_NEWNET), ("ipc", kernel.CLONE_NEWIPC)):
        if layer not in missing:
            missing[layer] = attempt(kernel.unshare, flag)
    if "files" not in missing:
        missing["files"] = attempt(_own_files, home)
    if "pid" not in missing:
        missing["pid"] = probe(kernel.unshare, kernel.CLONE_NEWPID)
    if "uid" not in missing:  # in a user namespace there is but one uid, and nobody of it in sight
        missing["uid"] = probe(become, FIRST_UID) if missing["user"] else "not needed"
    if "seccomp" not in missing:
        missing["seccomp"] = probe(_try_seccomp)
    if "landlock" not in missing:
        missing["landlock"] = probe(_try_landlock)
    kernel.hide_memory()
    return {layer: missing[layer] for layer in LAYERS}


def _namespaces_refused() -> bool:
    return bool(probe(kernel.unshare, kernel.CLONE_NEWNS))


def _own_user() -> None:
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(kernel.CLONE_NEWUSER)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _try_seccomp() -> None:
    kernel.no_new_privileges()
    kernel.filter_calls()


def _try_landlock() -> None:
    kernel.no_new_privileges()
    kernel.fence_files([STDLIB], [])


def _own_files(root: str) -> None:
    """A root that holds the standard library and the C libraries, read-only, and no /proc."""
    refusal = probe(_mounted_root, root)
    if refusal:  # half a root is worse than none
        raise OSError(refusal)
    _mounted_root(root)


def _mounted_root(root: str) -> None:
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("none", root, "tmpfs", kernel.MS_NOSUID, "mode=755,size=1m")
    os.makedirs(root + "/tmp")
    for path in (*_LIBRARIES, STDLIB, *_DEVICES, *_mapped_files()):
        if os.path.islink(path) and os.path.isdir(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path) and not os.path.exists(root + path):
            _bind(path, root + path)
    packages = f"{root}{STDLIB}/site-packages"
    if os.path.isdir(packages):  # what is installed there may hold a dataset's answers
        kernel.mount("none", packages, "tmpfs", kernel.MS_RDONLY, "mode=555,size=4k")
    flags = kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("none", root, "", flags | kernel.MS_BIND)
    kernel.change_root(root)


def _mapped_files() -> list[str]:
    with open("/proc/self/maps") as maps:
        words = [line.split(maxsplit=5) for line in maps]
    names = {word[5].strip() for word in words if len(word) == 6}
    return sorted(name for name in names if name.startswith("/") and ".so" in name)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    kernel.mount(source, target, "", kernel.MS_BIND | kernel.MS_REC)
    held = os.statvfs(source).f_flag  # flags of the original may not be taken away
    flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID
    flags |= 0 if source.startswith("/dev/") else kernel.MS_NODEV
    flags |= held & (kernel.MS_NOEXEC | 1024 | 2048) | ((held & 4096) << 9)  # noatime … relatime
    kernel.mount("none", target, "", flags)


def become(uid: int) -> None:
    """Another user without groups or capabilities, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


class Cell:
    """The fence of one run: made by the supervisor, entered by the program, swept at the end."""

    def __init__(self, missing: dict[str, str], home: str, limits: dict):
        """Args: what `settle` returned, its folder, and the limits of the run."""
        self.on = {layer for layer, reason in missing.items() if not reason}
        self.limits = limits
        self.uid = FIRST_UID + os.getpid() if "uid" in self.on else os.getuid()
        self.folder = "/tmp" if "files" in self.on else f"{home}/{os.urandom(8).hex()}"
        if "files" not in self.on:
            os.mkdir(self.folder, 0o700)
        if "files" not in self.on and "uid" in self.on:
            os.chown(self.folder, self.uid, self.uid)

    def fork(self) -> int:
        """fork() of the program: its first process of its own PID namespace."""
        if "pid" in self.on:
            kernel.unshare(kernel.CLONE_NEWPID)
        return os.fork()

    def enter(self) -> None:
        """Called by the program's process before the first untrusted line."""
        if "files" in self.on:
            kernel.unshare(kernel.CLONE_NEWNS)
            size = self.limits["folder_bytes"]
            options = f"mode=777,size={size},nr_inodes=1024"
            kernel.mount("none", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
        os.chdir(self.folder)
        self._limit()
        if "uid" in self.on:
            become(self.uid)
        kernel.drop_capabilities()
        kernel.hide_memory()
        kernel.die_with_parent()
        kernel.no_new_privileges()
        if "landlock" in self.on:
            kernel.fence_files([STDLIB, *_LIBRARIES, *_DEVICES], [self.folder, "/dev/null"])
        if "seccomp" in self.on:
            kernel.filter_calls()

    def _limit(self) -> None:
        seconds = math.ceil(self.limits["cpu_seconds"])
        table = {
            "CPU": seconds,
            "AS": self.limits["memory_bytes"],
            "FSIZE": self.limits["folder_bytes"],
            "NOFILE": self.limits["open_files"],
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
        }
        if {"uid", "user"} & self.on:
            table["NPROC"] = self.limits["processes"]
        elif "seccomp" not in self.on and os.getuid():
            table["NPROC"] = _tasks_of(os.getuid()) + self.limits["processes"]
        for name, value in table.items():
            pair = value if isinstance(value, tuple) else (value, value)
            lower_limit(getattr(resource, f"RLIMIT_{name}"), pair)

    def sweep(self, pid: int) -> None:
        """Ends the program and everything it started; then removes its folder."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if "uid" in self.on and "pid" not in self.on:
            self._kill_uid()
        deadline = time.monotonic() + _SWEEP_SECONDS
        while time.monotonic() < deadline:
            try:
                found, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not found:
                if "pid" not in self.on:
                    _kill_children(os.getpid())
                time.sleep(0.001)
        if "files" not in self.on:
            with contextlib.suppress(OSError):
                remove(self.folder)

    def _kill_uid(self) -> None:
        """kill(-1) as the run's user: the kernel does it at once, no fork slips through.

        The helper must be that user alone: with a real or effective uid 0 the same call would
        end every process of the machine. Being that user, it can be killed by the program first;
        so it is sent again until one comes through.
        """
        for _ in range(_SWEEPERS):
            helper = os.fork()
            if helper == 0:
                try:
                    become(self.uid)
                    if self.uid >= FIRST_UID and os.getresuid() == (self.uid,) * 3:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(-1, signal.SIGKILL)
                        os._exit(0)
                finally:
                    os._exit(1)
            _, status = os.waitpid(helper, 0)
            if status == 0:
                return


def lower_limit(which: int, pair: tuple[int, int]) -> None:
    """setrlimit, never above what is allowed already."""
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        pair = min(pair[0], hard), min(pair[1], hard)
    resource.setrlimit(which, pair)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _tasks_of(uid: int) -> int:
    count = 0
    for pid in _processes():
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def _kill_children(parent: int) -> None:
    """Kills the children of a process; orphans come to their subreaper, so repeat."""
    for pid in _processes() if os.path.isdir("/proc/self") else []:
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                os.kill(pid, signal.SIGKILL)


def remove(folder: str) -> None:
    """Removes a folder however deep, linked or locked: never a path of more than two names in it.

    Folders within folders are moved up first. Not `shutil.rmtree`, which fails on 1,000 levels and
    whose libraries would make every fork dearer. Follows no link.
    """
    found = [folder]
    while found:
        for path in found:
            os.chmod(path, 0o700)
            for entry in list(os.scandir(path)):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                elif path != folder:
                    os.chmod(entry.path, 0o700)  # moving a folder writes to it
                    os.rename(entry.path, f"{folder}/{os.urandom(12).hex()}")
            if path != folder:
                os.rmdir(path)
        found = [entry.path for entry in os.scandir(folder)]
    os.rmdir(folder)


def stdlib_is_readable(missing: dict[str, str]) -> bool:
    """Whether programs will be able to import what is not imported yet."""
    if missing["uid"] or not missing["files"]:
        return True
    return not probe(_read_as, FIRST_UID)


def _read_as(uid: int) -> None:
    become(uid)
    os.listdir(STDLIB)
