"""axrun, the runner of bundles."""

VERSION = "0.1.0"
