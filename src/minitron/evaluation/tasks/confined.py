"""A script that confines its process and then runs a program; sandbox.py starts it.

The kernel enforces the confinement: seccomp allows only the system calls listed here (no socket, no process, no signal,
    no way to write or change a file), Landlock allows only reading Python and its libraries, and resource limits bound
    memory, processor time and open files. The job comes as JSON on stdin; READY goes to stdout when the confinement
    stands, then the job's token when the program has run to its end. Only the standard library is used.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

READY = b"+"
REFUSED = b"!"  # followed by the reason

# System calls of a program that computes. The numbers are those of the kernel's unistd.h.
ALLOWED = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
        "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
        "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25,
        "madvise": 28, "dup": 32, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39,
        "exit": 60, "uname": 63, "getcwd": 79, "chdir": 80, "readlink": 89, "gettimeofday": 96, "getrlimit": 97,
        "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
        "getppid": 110, "sigaltstack": 131, "arch_prctl": 158, "gettid": 186, "time": 201, "futex": 202,
        "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221,
        "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262,
        "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "getcpu": 309,
        "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439,
    },
    "aarch64": {
        "getcwd": 17, "dup": 23, "faccessat": 48, "chdir": 49, "close": 57, "getdents64": 61, "lseek": 62, "read": 63,
        "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73, "readlinkat": 78,
        "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "set_tid_address": 96, "futex": 98,
        "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113,
        "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
        "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165, "getcpu": 168, "gettimeofday": 169,
        "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178,
        "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "fadvise64": 223, "mprotect": 226,
        "madvise": 233, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293, "faccessat2": 439,
    },
}  # fmt: skip
# System calls that are allowed with some arguments only.
CHECKED = {
    "x86_64": {"ioctl": 16, "clone": 56, "fcntl": 72, "openat": 257, "prlimit64": 302},
    "aarch64": {"fcntl": 25, "ioctl": 29, "openat": 56, "clone": 220, "prlimit64": 261},
}
CLONE3 = 435  # its arguments are in memory, where a filter cannot look; without it, the C library uses clone
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_CALLS = 0x40000000

CLONE_THREAD = 0x00010000
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, and the bit of O_TMPFILE that O_DIRECTORY lacks.
WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000
FCNTL_COMMANDS = (0, 1, 2, 3, 1030)  # duplicate, and get and set flags; none that lets the kernel send a signal
IOCTL_COMMANDS = (0x5401, 0x5450, 0x5451)  # whether it is a terminal; whether it is closed on exec

RET_ALLOW, RET_KILL, RET_ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in the kernel's seccomp_data

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_DUMPABLE = 38, 22, 2, 4
PR_SET_PDEATHSIG = 1


def run_confined() -> None:
    job = json.load(sys.stdin.buffer)
    end_with_parent(job["parent"])
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    try:
        limit_resources(job["cpu_seconds"], job["memory_bytes"])
        restrict_files()
        restrict_calls(platform.machine())
    except OSError as error:
        os.write(report, REFUSED + str(error).encode())
        os._exit(1)
    write, leave = os.write, os._exit
    write(report, READY)
    try:
        exec(job["program"], {})
    except BaseException:
        leave(1)
    write(report, job["token"].encode())
    leave(0)


def end_with_parent(parent: int) -> None:
    """End this process with its parent, which watches the time, even if that is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit_resources(cpu_seconds: int, memory_bytes: int) -> None:
    for limit, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))


def restrict_files() -> None:
    """Landlock: only the files of Python and the system's libraries can be read, and none can be changed."""
    version = _call(LANDLOCK_CREATE, None, 0, 1, what="Landlock, of Linux 5.13 and later and switched on,")
    handled = (1 << min(12 + version, 15)) - 1
    rules = _call(LANDLOCK_CREATE, struct.pack("Q", handled), 8, 0, what="Landlock")
    for path in {sys.prefix, sys.base_prefix, sys.exec_prefix, *_LIBRARIES, os.getcwd()}:
        if Path(path).is_dir():
            _may_read(rules, path, READ_FILE | READ_DIR)
    for path in ("/dev/null", "/dev/urandom", "/etc/ld.so.cache"):
        if Path(path).exists():
            _may_read(rules, path, READ_FILE)
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("no_new_privs cannot be set")
    _call(LANDLOCK_RESTRICT, rules, 0, what="Landlock")
    os.close(rules)


_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")


def _may_read(rules: int, path: str, access: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    _call(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", access, opened), 0, what="Landlock")
    os.close(opened)


def restrict_calls(machine: str) -> None:
    """Seccomp: every system call that is not listed fails with EPERM, in this thread and all that it starts."""
    if machine not in ALLOWED:
        raise OSError(f"the list of system calls is not known for {machine} processors")
    steps = filter_program(machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(f"seccomp is not to be had: {os.strerror(ctypes.get_errno())}")


def filter_program(machine: str) -> list[tuple[int, int, int, int]]:
    """Write the filter as classic BPF: (code, steps to skip if true, steps to skip if false, operand)."""
    deny, allow = (RETURN, 0, 0, RET_ERRNO | EPERM), (RETURN, 0, 0, RET_ALLOW)
    checked = CHECKED[machine]
    steps = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, RET_KILL), (LOAD, 0, 0, NUMBER)]
    steps += [(AT_LEAST, 0, 1, X32_CALLS), deny]
    for number in ALLOWED[machine].values():
        steps += [(EQUAL, 0, 1, number), allow]
    steps += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, RET_ERRNO | ENOSYS)]
    steps += [(EQUAL, 0, 4, checked["openat"]), _argument(2), (ANY_BIT, 0, 1, WRITING), deny, allow]
    steps += [(EQUAL, 0, 4, checked["clone"]), _argument(0), (ANY_BIT, 1, 0, CLONE_THREAD), deny, allow]
    # Reading limits, not setting them: the address of the new ones must be zero, in both halves.
    high = (LOAD, 0, 0, ARGUMENTS + 8 * 2 + 4)
    steps += [(EQUAL, 0, 6, checked["prlimit64"]), _argument(2), (EQUAL, 0, 2, 0), high, (EQUAL, 1, 0, 0), deny, allow]
    for name, commands in (("fcntl", FCNTL_COMMANDS), ("ioctl", IOCTL_COMMANDS)):
        tests = [step for command in commands for step in ((EQUAL, 0, 1, command), allow)]
        steps += [(EQUAL, 0, 2 + len(tests), checked[name]), _argument(1), *tests, deny]
    return [*steps, deny]


def _argument(index: int) -> tuple[int, int, int, int]:
    """Load the lower half of an argument, on the little-endian machines that are listed."""
    return (LOAD, 0, 0, ARGUMENTS + 8 * index)


def _call(number: int, *arguments: Any, what: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(f"{what} is not to be had: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    run_confined()
