"""What somebody else's code tries; each program leaves what it found in `told`."""

from __future__ import annotations

#: Everything a process can see and read, outside what every Debian has.
LOOK = """
import os
told = {"environ": dict(os.environ), "at_load": at_load, "files": [], "processes": [], "root": []}
for folder, folders, files in os.walk("/"):
    if folder == "/":
        told["root"] = sorted(folders)
        folders[:] = set(folders) - {"usr", "bin", "lib", "lib64", "proc", "sys", "environment"}
    told["files"] += [os.path.join(folder, name) for name in files]
told["processes"] = [int(name) for name in os.listdir("/proc") if name.isdigit()]
told["own"] = os.getpid()
"""
OPEN = """
told = []
for path in paths:
    try:
        with open(path, "rb") as file:
            told.append([path, file.read(100).decode(errors="replace")])
    except OSError:
        pass
"""
#: Every kind of socket, and the two ways to one that needs no call of socket().
CALL_OUT = """
import os, socket
told = []
kinds = ((socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 22)),
         (socket.AF_INET, socket.SOCK_STREAM, (address, 5432)),
         (socket.AF_INET, socket.SOCK_DGRAM, (address, 53)),
         (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 22)),
         (socket.AF_UNIX, socket.SOCK_STREAM, helper),
         (socket.AF_UNIX, socket.SOCK_STREAM, "/run/dbus/system_bus_socket"),
         (socket.AF_UNIX, socket.SOCK_STREAM, bytes(1) + b"odsp-abstract"),
         (socket.AF_NETLINK, socket.SOCK_RAW, (0, 0)))
for family, kind, target in kinds:
    try:
        with socket.socket(family, kind) as connection:
            connection.settimeout(2)
            connection.connect(target)
            told.append([int(family), str(target), "connected"])
    except ConnectionError:
        told.append([int(family), str(target), "reached"])
    except OSError:
        pass
"""
WRITE = """
import os
told = {}
folders = ["/", "/model", "/environment", "/environment/bin", "/runner", "/usr/bin", "/etc", "/tmp",
           "/var/tmp", "/var/lib/odsp/model_server", "/run", "/sys/fs/cgroup", "/proc/sys/kernel",
           "/scratch", "/dev/shm", "/dev"]
with open("/proc/self/mountinfo") as file:
    kinds = {line.split()[2]: line.partition(" - ")[2].split()[0] for line in file}
for folder in folders:
    try:
        with open(f"{folder}/odsp-was-here", "w") as file:
            file.write("x")
            device = os.fstat(file.fileno()).st_dev
        told[folder] = kinds[f"{os.major(device)}:{os.minor(device)}"]
    except OSError:
        pass
"""
FILL = """
import os
told = 0
try:
    with open("/scratch/filler", "wb") as file:
        while told < 4096:
            file.write(bytes(2**20))
            file.flush()
            told += 1
except OSError:
    pass
finally:
    os.remove("/scratch/filler")
"""
FORK = """
import os, signal, time
children = []
try:
    while len(children) < 4000:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        children.append(child)
except OSError:
    pass
time.sleep(2)
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
told = len(children)
"""
EAT = """
told = []
while True:
    told.append(b"x" * 2**24)
"""
#: Signals and traces others, and leaves its confinement by namespaces.
ATTACK = """
import ctypes, os
libc, told = ctypes.CDLL(None, use_errno=True), []
PTRACE_SEIZE, CLONE_NEWUSER = 0x4206, 0x10000000
for process in processes:
    try:
        os.kill(process, 0)
        told.append(["signalled", process])
    except OSError:
        pass
    if libc.ptrace(PTRACE_SEIZE, process, None, None) == 0:
        told.append(["traced", process])
    for name in ("environ", "maps", "root/etc/hostname", "fd"):
        if os.path.exists(f"/proc/{process}/{name}"):
            told.append(["seen", process, name])
if libc.unshare(CLONE_NEWUSER) == 0:
    told.append(["user namespace"])
if libc.setuid(0) == 0:
    told.append(["root"])
"""
