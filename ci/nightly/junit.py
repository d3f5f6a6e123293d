"""Reads the results of the board tests from pytest's junit.xml."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree


@dataclass(frozen=True)
class Case:
    """A test case: its function's name, whether it ran and passed, and its failure messages."""

    test: str
    ran: bool
    messages: tuple[str, ...]


def cases(junit: Path) -> list[Case]:
    """Every test in the file; empty if pytest wrote none."""
    try:
        found = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []
    return [_case(entry) for entry in found]


def failures(junit: Path) -> list[str]:
    """The messages of the failed board tests; empty if pytest wrote no file."""
    return [message for case in cases(junit) for message in case.messages]


def _case(entry: ElementTree.Element) -> Case:
    faults = [*entry.iter("failure"), *entry.iter("error")]
    messages = [_plain((fault.get("message") or "it printed nothing").strip()) for fault in faults]
    name = (entry.get("name") or "").partition("[")[0]
    return Case(name, not faults and entry.find("skipped") is None, tuple(messages))


def _plain(message: str) -> str:
    """The message without what pytest adds: the exception's class, and `failed on setup with`."""
    message = re.sub(r'(?s)^failed on (?:setup|teardown) with "(.*)"$', r"\1", message)
    return re.sub(r"^(?:[a-z_]\w*\.)*[A-Z]\w*: ", "", message)
