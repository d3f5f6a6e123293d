"""What pytest's junit.xml says of the board tests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree


@dataclass(frozen=True)
class Case:
    """A test: its function's name, whether it ran to its end, and the messages of what failed."""

    test: str
    ran: bool
    messages: tuple[str, ...]


def cases(junit: Path) -> list[Case]:
    """Every test in the file; none where pytest wrote nothing."""
    try:
        found = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []
    return [_case(entry) for entry in found]


def failures(junit: Path) -> list[str]:
    """The messages of the board tests that failed, as pytest wrote them; none where it wrote nothing."""
    return [message for case in cases(junit) for message in case.messages]


def _case(entry: ElementTree.Element) -> Case:
    faults = [*entry.iter("failure"), *entry.iter("error")]
    messages = [_plain((fault.get("message") or "it said nothing").strip()) for fault in faults]
    name = (entry.get("name") or "").partition("[")[0]
    return Case(name, not faults and entry.find("skipped") is None, tuple(messages))


def _plain(message: str) -> str:
    """Without what pytest puts around it: the exception's class, and where a fixture raised it."""
    message = re.sub(r'(?s)^failed on (?:setup|teardown) with "(.*)"$', r"\1", message)
    return re.sub(r"^(?:[a-z_]\w*\.)*[A-Z]\w*: ", "", message)
