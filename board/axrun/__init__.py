"""The runner."""

VERSION = "0.1.0"
