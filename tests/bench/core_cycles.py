"""Cycles of a piece of a program on a board's core, estimated by llvm-mca from the instructions it executes.

qemu-user records the address of every executed instruction. Those between the marks `trace_begin` and `trace_end` are
disassembled and simulated in their order, so loops, tails, packing and scales count as often as they run. The model
knows the core's pipelines and latencies; every load hits the first-level cache and every branch is predicted.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

QEMU, MCA, OBJDUMP = "qemu-aarch64-static", "llvm-mca-19", "llvm-objdump-19"
EMULATED = {"cortex-a53": "cortex-a53", "cortex-a55": "cortex-a76"}  # qemu has no A55 in all versions
ADDRESS = re.compile(r"^Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+([0-9a-f]+):\s+(\S.*)$", re.MULTILINE)
MARK = re.compile(r"^([0-9a-f]+) <(trace_begin|trace_end)>:$", re.MULTILINE)
CYCLES = re.compile(r"^Total Cycles:\s+(\d+)", re.MULTILINE)
BRANCH = re.compile(r"(b|bl|br|blr|ret|b\.\w+|cbn?z|tbn?z)\b")
PAIR = re.compile(r"ldp\s+(q\d+), (q\d+), (.*)")
SEVERAL = re.compile(r"ld1\s+\{ (v\d+\.\w+(?:, v\d+\.\w+)+) \}, (.*)")


def cycles(program: Path, core: str, arguments: Sequence[str], folder: Path) -> int:
    """Cycles between the marks of a statically linked program."""
    log, listing = folder / "trace", disassemble(program)
    command = [QEMU, "-cpu", EMULATED[core], "-singlestep", "-d", "exec,nochain", "-D", str(log), str(program)]
    tool([*command, *arguments])
    lines = list(simulated(executed(log.read_text(), listing)))
    log.unlink()
    source = folder / "trace.s"
    source.write_text("\n".join(lines) + "\n")
    views = ("--instruction-info=false", "--resource-pressure=false")
    said = tool([MCA, "-mtriple=aarch64", f"-mcpu={core}", "-mattr=+dotprod", "-iterations=1", *views, str(source)])
    found = CYCLES.search(said)
    assert found, said
    return int(found[1])


def disassemble(program: Path) -> str:
    return tool([OBJDUMP, "--disassemble", "--no-show-raw-insn", "--mattr=+all", str(program)])


def executed(log: str, listing: str) -> Iterator[str]:
    """The instructions between the marks, in the order of execution."""
    code = {int(address, 16): text for address, text in INSTRUCTION.findall(listing)}
    marks = {name: int(address, 16) for address, name in MARK.findall(listing)}
    trace = [int(found[1], 16) for found in ADDRESS.finditer(log)]
    begin, end = trace.index(marks["trace_begin"]), trace.index(marks["trace_end"])
    return (code[address] for address in trace[begin:end])


def simulated(instructions: Iterator[str]) -> Iterator[str]:
    """The instructions as llvm-mca takes them.

    Addresses become constants, and all branches alike, since a call has no known length. Loads of several registers
    become as many loads: the model charges 6 cycles for a pair on a Cortex-A55, but 1 for a single register.
    """
    for line in instructions:
        text = line.split("//")[0].split("<")[0].replace("\t", " ").strip()
        if BRANCH.match(text):
            yield "b #4"
        elif text.startswith("adr"):
            yield f"mov {text.split()[1]} #1"
        elif re.match(r"ldr \w+, 0x", text):
            yield f"{text.split(',')[0]}, [sp]"
        elif pair := PAIR.match(text):
            yield from (f"ldr {pair[1]}, {pair[3]}", f"ldr {pair[2]}, {pair[3].split(']')[0].split(',')[0]}]")
        elif several := SEVERAL.match(text):
            first, *others = (f"q{register.split('.')[0][1:]}" for register in several[1].split(", "))
            base = several[2].split("]")[0] + "]"
            yield f"ldr {first}, {base}" + (several[2].split("]")[1] if ", #" in several[2] else "")
            yield from (f"ldr {register}, {base}" for register in others)
        else:
            yield text


def tool(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"
    return done.stdout
